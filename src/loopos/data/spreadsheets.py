"""Excel workbooks (.xlsx) → records, each with the row number that Excel shows.

Enters: a path, or "FILE.xlsx#SHEET". Leaves: a `Record` for each row below the header, with Python values: text,
numbers, true and false, dates as ISO text, None for an empty cell. The header is the first row with anything in it.
A formula gives the value that Excel stored last. Needs openpyxl (the extra `excel`).
Left out: .xls, the format before 2007.
"""

from __future__ import annotations

import datetime
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from loopos.config.faults import EnvironmentFault, Fault
from loopos.data.decoding import TextRules
from loopos.data.record import ReadReport, Record, Records, file_error, shown
from loopos.data.sources import sheet_of
from loopos.data.unpacking import check_expansion, require_regular

_DAMAGE = (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, EOFError, OSError, SyntaxError)
"""What openpyxl raises for a file that is no workbook, or a damaged one; a syntax error is one of its XML."""


def spreadsheet_records(source: str, rules: TextRules, report: ReadReport) -> Records:
    """Yields the rows of one sheet: the one that is named, or the only one with rows.

    Raises:
        DataError: a damaged file, several sheets with rows and none named, a sheet that is not there, a bad header.
        EnvironmentFault: without the `openpyxl` package.
    """
    path, sheet = sheet_of(source)
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f'{path}: reading .xlsx files needs the package openpyxl (the extra "excel"): pip install openpyxl, or '
            "save the sheet as CSV"
        ) from error
    require_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        check_expansion(path, unpacked, rules.max_expansion)
        with open(path, "rb") as stream:
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
            yield from _sheet_records(path, _chosen(path, book, sheet, report), report)
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise file_error(
            path,
            f"what can't be read as .xlsx ({reason[:200]})",
            "a whole Excel workbook (.xlsx)",
            "open and save it again, or save the sheet as CSV",
            field="xlsx",
        ) from error


def _chosen(path: str, book: Any, sheet: str | None, report: ReadReport) -> Any:
    """The worksheet that is named, or the only one that holds anything."""
    names = [worksheet.title for worksheet in book.worksheets]
    if sheet is not None:
        if sheet not in names:
            wanted = f"one of the sheets that are there: {', '.join(map(shown, names))}"
            raise file_error(path, f"the sheet {shown(sheet)}", wanted, field="sheet")
        return book[sheet]
    filled = [worksheet for worksheet in book.worksheets if next(_filled(worksheet), None) is not None]
    if len(filled) > 1:
        names = [worksheet.title for worksheet in filled]
        given = f"{len(filled)} sheets with rows: {', '.join(map(shown, names))}"
        hint = f"name one behind a #: {os.path.basename(path)}#{names[0]}"
        raise file_error(path, given, "one sheet", hint, field="sheet")
    if not filled:
        raise file_error(path, "an empty workbook", "a sheet with a header and rows", field="rows")
    if len(names) > 1:
        report.say(f"{path}: read the sheet {shown(filled[0].title)}, the only one with rows")
    return filled[0]


def _filled(worksheet: Any) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The rows with anything in them, with their numbers."""
    for number, cells in enumerate(worksheet.iter_rows(values_only=True), start=1):
        if any(not _is_empty(cell) for cell in cells):
            yield number, cells


def _sheet_records(path: str, worksheet: Any, report: ReadReport) -> Records:
    worksheet.reset_dimensions()
    rows = _filled(worksheet)
    head_line, cells = next(rows, (1, ()))
    header = _header(path, head_line, cells)
    last = head_line
    for number, cells in rows:
        report.blank_lines += number - last - 1
        last = number
        beyond = next((place for place, cell in enumerate(cells) if place not in header and not _is_empty(cell)), None)
        if beyond is not None:
            given = f"{shown(cells[beyond])} in column {_letters(beyond)}, which has no name"
            yield Fault(path, number, None, _letters(beyond), given, f"a name for it in row {head_line}, or nothing")
            continue
        values = {name: _value(cells[place] if place < len(cells) else None) for place, name in header.items()}
        yield Record(number, values)


def _header(path: str, number: int, cells: Sequence[Any]) -> dict[int, str]:
    """Place → name of each column; columns without a name are left out."""
    header: dict[int, str] = {}
    taken: dict[str, int] = {}
    for place, cell in enumerate(cells):
        name = "" if _is_empty(cell) else str(_value(cell)).strip()
        if not name:
            continue
        if taken.setdefault(name, place) != place:
            given = f"the column name {shown(name)} twice (columns {_letters(taken[name])} and {_letters(place)})"
            hint = "the first row must be the header; rename one of the two"
            raise file_error(path, given, "distinct names", hint, line=number, field="header")
        header[place] = name
    return header


def _value(cell: Any) -> object:
    """A cell as a row holds it: dates and times as ISO text."""
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        cell = cell.date()
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell) if isinstance(cell, datetime.timedelta) else cell


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _letters(place: int) -> str:
    """The name of the column at `place`, counted from 0, as Excel writes it: A, B, ..., Z, AA."""
    name = ""
    place += 1
    while place:
        place, letter = divmod(place - 1, 26)
        name = chr(65 + letter) + name
    return name
