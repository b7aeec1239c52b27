"""Read delimited text (CSV, TSV) into records, each with its first physical line.

Quotes follow RFC 4180; a quote inside an unquoted cell is an ordinary character. The standard library's `csv` is not
used: it reports neither the position of a quote nor of a cell, and needs a process-wide setting for long cells. A
broken quote in a record of several lines makes the file unreadable, because the start of the next row is unknown. Every
cell is a string.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data.record import ReadReport, Record, Records, file_error, shown

DELIMITER_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


class BrokenQuote(Exception):
    """A quoted cell that does not end as it should; `line` and `column` are the position of the opening quote."""

    def __init__(self, line: int, column: int, cell: int, reason: str, spans_lines: bool) -> None:
        super().__init__(reason)
        self.line, self.column, self.cell, self.reason, self.spans_lines = line, column, cell, reason, spans_lines


def delimited_records(lines: Iterator[tuple[int, str]], source: str, delimiter: str, report: ReadReport) -> Records:
    """Yield the rows below the header.

    Args:
        lines: `(number, line)` from `decoding.read_lines`.
        source: the file's name for diagnostics.
        delimiter: one character; for "," another is taken, and said, where the header has none but a ";" or a tab.
        report: blank lines and decisions are noted in it.
    Raises:
        DataError: a bad header, a quote that never closes or breaks a record of several lines.
    """
    header, header_line, delimiter = _header(lines, source, delimiter, report)
    width = len(header)
    for number, line in lines:
        if line in ("", "\r"):
            report.blank_lines += 1
            continue
        if '"' in line:
            try:
                cells = split_record(number, line, lines, delimiter)
            except BrokenQuote as broken:
                diagnostic = _quote_diagnostic(source, broken, header)
                if broken.spans_lines:
                    raise DataError([diagnostic]) from broken
                yield diagnostic
                continue
        else:
            cells = line.removesuffix("\r").split(delimiter)
        if len(cells) != width:
            yield _width_diagnostic(source, number, cells, header, header_line)
        elif any("\0" in cell for cell in cells):
            name = next(name for name, cell in zip(header, cells, strict=True) if "\0" in cell)
            yield Diagnostic(source, number, None, name, "a NUL character (byte 0)", "text", "remove the byte")
        else:
            yield Record(number, dict(zip(header, cells, strict=True)))


def split_record(number: int, line: str, lines: Iterator[tuple[int, str]], delimiter: str) -> list[str]:
    """Cells of the record that begins with `line`, taking further lines while a quoted cell is open.

    Raises:
        BrokenQuote: a quote that is not closed, or is followed by something other than a delimiter.
    """
    cells: list[str] = []
    first, position = number, 0
    while True:
        if not line.startswith('"', position):
            end = line.find(delimiter, position)
            if end < 0:
                cells.append(line[position:].removesuffix("\r"))
                return cells
            cells.append(line[position:end])
            position = end + 1
            continue
        opened, column, parts = number, position + 1, list[str]()
        position += 1
        while True:
            close = line.find('"', position)
            if close >= 0:
                parts.append(line[position:close])
                if not line.startswith('"', close + 1):
                    break
                parts.append('"')
                position = close + 2
                continue
            parts.append(line[position:] + "\n")
            following = next(lines, None)
            if following is None:
                raise BrokenQuote(opened, column, len(cells), "is never closed", True)
            (number, line), position = following, 0
        cells.append("".join(parts))
        if line[close + 1 :] in ("", "\r"):
            return cells
        if not line.startswith(delimiter, close + 1):
            after = shown(line[close + 1 : close + 21])
            where = f" on line {number}" if number > opened else ""
            raise BrokenQuote(
                opened, column, len(cells) - 1, f"is closed{where} and followed by {after}", number > first
            )
        position = close + 2


def _header(
    lines: Iterator[tuple[int, str]], source: str, delimiter: str, report: ReadReport
) -> tuple[list[str], int, str]:
    for number, line in lines:
        if not line.strip():
            report.blank_lines += 1
            continue
        if number == 1 and len(mark := line.strip()) == 5 and mark.startswith("sep="):
            delimiter = mark[-1]
            continue
        delimiter = _delimiter_of(line, source, delimiter, report)
        try:
            names = [name.strip() for name in split_record(number, line, lines, delimiter)]
        except BrokenQuote as broken:
            raise DataError([_quote_diagnostic(source, broken, [])]) from broken
        return _checked_header(names, number, source, report), number, delimiter
    raise file_error(source, "blank lines only", "a header line and rows", "for example: text,label", line=1)


def _delimiter_of(line: str, source: str, delimiter: str, report: ReadReport) -> str:
    if delimiter == "," and "," not in line:
        for other in ("\t", ";"):
            if other in line:
                report.say(f"{source}: the delimiter is the {DELIMITER_NAMES[other]}, as in the header")
                return other
    return delimiter


def _checked_header(names: list[str], number: int, source: str, report: ReadReport) -> list[str]:
    if names[0] == "" and len(names) > 1:
        # pandas writes its row index under an empty name, the commonest nameless column there is.
        names = ["column 1", *names[1:]]
        report.say(f'{source}: the first column has no name and is called "column 1"')
    starts: dict[str, int] = {}
    for position, name in enumerate(names, start=1):
        if not name:
            raise file_error(
                source,
                f"no name for column {position} of {len(names)}",
                "a name for every column",
                "the first line must be the header; look for a delimiter too many",
                line=number,
                field="header",
            )
        if starts.setdefault(name, position) != position:
            raise file_error(
                source,
                f"the column name {shown(name)} twice (columns {starts[name]} and {position})",
                "distinct names",
                "the first line must be the header; rename one of the two",
                line=number,
                field="header",
            )
        if "\0" in name:
            raise file_error(source, "a NUL character (byte 0)", "text", "remove the byte", line=number, field="header")
        if "\r" in name:
            raise file_error(
                source,
                f"a carriage return inside the column name {shown(name)}",
                "line ends of one kind: LF, CRLF or CR",
                "the file mixes them: save it again with one kind",
                line=number,
                field="header",
            )
    return names


def _width_diagnostic(
    source: str, number: int, cells: Sequence[str], header: list[str], header_line: int
) -> Diagnostic:
    if len(cells) < len(header):
        field, hint = header[len(cells)], "add the missing cells; an empty one needs its delimiter"
    else:
        field, hint = f"cell {len(header) + 1}", "put a cell that holds the delimiter into double quotes"
    names = ", ".join(header) if len(header) <= 8 else ", ".join(header[:8]) + ", ..."
    actual = f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"
    return Diagnostic(
        source, number, None, field, actual, f"{len(header)}, as the header on line {header_line} ({names})", hint
    )


def _quote_diagnostic(source: str, broken: BrokenQuote, header: list[str]) -> Diagnostic:
    field = (
        header[broken.cell] if broken.cell < len(header) else ("header" if not header else f"cell {broken.cell + 1}")
    )
    return Diagnostic(
        source,
        broken.line,
        broken.column,
        field,
        f"a double quote that {broken.reason}",
        "a closing quote before the next delimiter or the line's end",
        'a quote inside a quoted cell is written ""',
    )
