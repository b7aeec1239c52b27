"""Read tables without text lines: Excel workbooks, parquet, arrow, `save_to_disk` folders and hub ids.

Each row becomes a `Record` with Python values. Excel rows have the row number that Excel shows; the header is the first
row that is not empty, dates become ISO text, and a formula has its last stored value; .xls is not supported. Class
names that `datasets` stores in a schema are reported. The packages are imported when a table is opened, because that
takes a second; files are read in place, without a cache.
"""

from __future__ import annotations

import datetime
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.config.diagnostics import Diagnostic, MissingRequirement
from loopos.data.decoding import TextRules, check_expansion, require_regular
from loopos.data.record import ReadReport, Record, Records, file_error, shown
from loopos.data.sources import sheet_of
from loopos.storage.hub import quiet_datasets, why_unreachable

if TYPE_CHECKING:
    import pyarrow


_DAMAGE = (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, EOFError, OSError, SyntaxError)
"""What openpyxl raises for a damaged file or one that is not a workbook (syntax errors are from its XML)."""


def spreadsheet_records(source: str, rules: TextRules, report: ReadReport) -> Records:
    """Yield the rows of one sheet: the named one, or the only one with rows.

    Raises:
        DataError: a damaged file, several sheets with rows and none named, a missing sheet, a bad header.
        MissingRequirement: without the `openpyxl` package.
    """
    path, sheet = sheet_of(source)
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise MissingRequirement(
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
            "a complete Excel workbook (.xlsx)",
            "open and save it again, or save the sheet as CSV",
            field="xlsx",
        ) from error


def _chosen(path: str, book: Any, sheet: str | None, report: ReadReport) -> Any:
    """The named worksheet, or the only one that is not empty."""
    names = [worksheet.title for worksheet in book.worksheets]
    if sheet is not None:
        if sheet not in names:
            expected = f"one of the existing sheets: {', '.join(map(shown, names))}"
            raise file_error(path, f"the sheet {shown(sheet)}", expected, field="sheet")
        return book[sheet]
    filled = [worksheet for worksheet in book.worksheets if next(_filled(worksheet), None) is not None]
    if len(filled) > 1:
        names = [worksheet.title for worksheet in filled]
        actual = f"{len(filled)} sheets with rows: {', '.join(map(shown, names))}"
        hint = f"name one after a #: {os.path.basename(path)}#{names[0]}"
        raise file_error(path, actual, "one sheet", hint, field="sheet")
    if not filled:
        raise file_error(path, "an empty workbook", "a sheet with a header and rows", field="rows")
    if len(names) > 1:
        report.say(f"{path}: read the sheet {shown(filled[0].title)}, the only one with rows")
    return filled[0]


def _filled(worksheet: Any) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The rows that are not empty, with their numbers."""
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
        beyond = next((index for index, cell in enumerate(cells) if index not in header and not _is_empty(cell)), None)
        if beyond is not None:
            actual = f"{shown(cells[beyond])} in column {_letters(beyond)}, which has no name"
            yield Diagnostic(
                path, number, None, _letters(beyond), actual, f"a column name in row {head_line}, or an empty cell"
            )
            continue
        values = {name: _value(cells[index] if index < len(cells) else None) for index, name in header.items()}
        yield Record(number, values)


def _header(path: str, number: int, cells: Sequence[Any]) -> dict[int, str]:
    """Index → name of each column with a name."""
    header: dict[int, str] = {}
    taken: dict[str, int] = {}
    for index, cell in enumerate(cells):
        name = "" if _is_empty(cell) else str(_value(cell)).strip()
        if not name:
            continue
        if taken.setdefault(name, index) != index:
            actual = f"the column name {shown(name)} twice (columns {_letters(taken[name])} and {_letters(index)})"
            hint = "the first row must be the header; rename one of the two"
            raise file_error(path, actual, "distinct names", hint, line=number, field="header")
        header[index] = name
    return header


def _value(cell: Any) -> object:
    """The value of a cell; dates and times become ISO text."""
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        cell = cell.date()
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell) if isinstance(cell, datetime.timedelta) else cell


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _letters(index: int) -> str:
    """Excel's name of column `index` (from 0): A, B, ..., Z, AA."""
    name = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        name = chr(65 + letter) + name
    return name


BATCH_ROWS = 1024


def parquet_records(path: str, report: ReadReport) -> Records:
    """Yield the rows of a parquet file.

    Raises:
        DataError: a damaged file.
    """
    import pyarrow
    import pyarrow.parquet

    require_regular(path)
    with (
        _damage(path, "parquet", (pyarrow.ArrowException, OSError, ValueError)),
        pyarrow.parquet.ParquetFile(path) as table,
    ):
        schema = table.schema_arrow
        _note_schema(schema, report)
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            yield from _batch_records(batch)


def arrow_records(path: str, report: ReadReport) -> Records:
    """Yield the rows of an arrow file, in the file format (feather too) or the stream format (as `datasets` writes).

    Raises:
        DataError: a damaged file.
    """
    import pyarrow

    require_regular(path)
    with _damage(path, "arrow", (pyarrow.ArrowException, OSError, ValueError)), pyarrow.memory_map(path) as memory:
        schema, batches = _arrow_batches(memory)
        _note_schema(schema, report)
        for batch in batches:
            yield from _batch_records(batch)


def _arrow_batches(memory: pyarrow.NativeFile) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """Schema and batches of a file in either format, none of them checked."""
    import pyarrow
    import pyarrow.ipc

    is_file = memory.read(6) == b"ARROW1"
    memory.seek(0)
    if is_file:
        table = pyarrow.ipc.open_file(memory)
        return table.schema, (table.get_batch(number) for number in range(table.num_record_batches))
    stream = pyarrow.ipc.open_stream(memory)
    return stream.schema, iter(stream)


def _batch_records(batch: pyarrow.RecordBatch) -> Records:
    """The rows of a batch, after a full validation: Arrow follows damaged offsets anywhere in memory and crashes."""
    batch.validate(full=True)
    for values in batch.to_pylist():
        yield Record(None, values)


def saved_records(folder: str, split: str, report: ReadReport) -> Records:
    """Yield the rows of a folder written by `save_to_disk`; of `split`, if it holds several.

    Raises:
        DataError: a damaged folder, a split or column that is not there.
    """
    import datasets
    import pyarrow

    damage = (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    with _damage(folder, "save_to_disk", damage):
        for file in sorted(Path(folder).rglob("*.arrow")):
            with pyarrow.memory_map(str(file)) as memory:
                for batch in _arrow_batches(memory)[1]:
                    batch.validate(full=True)
        with quiet_datasets():
            table = datasets.load_from_disk(folder)
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise file_error(
                folder,
                f"the split {shown(split)}",
                f"one of the existing splits: {', '.join(table)}",
                "set data.training_split or data.validation_split",
                field="split",
            )
        table = table[split]
    yield from _dataset_records(table, report)


def hub_records(name: str, split: str, subset: str | None, streaming: bool, report: ReadReport) -> Records:
    """Yield the rows of a data set on the hub; `streaming` reads them while they download, without a copy on disk.

    Raises:
        DataError: no such data set, split or subset, no network, or one that needs a login.
    """
    why_unreachable()
    import datasets

    failures = (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError)
    try:
        with quiet_datasets():
            table = datasets.load_dataset(name, name=subset, split=split, streaming=streaming)
        yield from _dataset_records(table, report)
    except failures as error:
        expected = f"the split {shown(split)}" + (f" of the subset {shown(subset)}" if subset else "")
        first = (str(error).strip() or "?").splitlines()[0][:200]
        reason = "; ".join(each for each in (why_unreachable(), f"{type(error).__name__}: {first}") if each)
        raise file_error(
            name,
            f"a hub id that could not be loaded ({reason})",
            expected,
            "check the id, data.subset and the split; set HF_TOKEN for a private or gated one; without a network, copy "
            "the data set to a folder (datasets: save_to_disk) and give its path",
            field="hub",
        ) from error


def _dataset_records(table: Any, report: ReadReport) -> Records:
    for name, feature in (table.features or {}).items():
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        if names:
            report.class_names[name] = tuple(names)
    for values in table:
        yield Record(None, values)


def _note_schema(schema: pyarrow.Schema, report: ReadReport) -> None:
    stored = (schema.metadata or {}).get(b"huggingface")
    features: Any = json.loads(stored) if stored is not None else {}
    for key in ("info", "features"):
        features = features.get(key) if isinstance(features, dict) else None
    for name, feature in features.items() if isinstance(features, dict) else ():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        names = inner.get("names") if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and all(isinstance(each, str) for each in names):
            report.class_names[name] = tuple(names)


@contextmanager
def _damage(path: str, kind: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    caught: tuple[type[Exception], ...] = (*errors, RecursionError)
    try:
        yield
    except caught as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise file_error(
            path,
            f"what can't be read as {kind} ({reason[:200]})",
            f"a complete {kind} file or folder",
            "the file is damaged, cut off or of another format: copy or write it again",
            field=kind,
        ) from error
