"""Read data sources (files, folders, globs, hub ids) into rows, each with its file and line.

Formats are csv, tsv, json, jsonl, ndjson, txt (plain, .gz, .zst), parquet, arrow, `save_to_disk` folders and hub ids. A
.txt file is recognized by its content. Text files are read with the standard library, because the readers of `datasets`
lose the line of a row and infer one type per column ("01" becomes 1, a missing cell turns integers into floats).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.paths import ENVIRONMENT_ROWS, expanded
from loopos.data.columns import plain_name
from loopos.data.decoding import PLAIN_RULES, TextRules, read_lines, read_text
from loopos.data.delimited import DELIMITER_NAMES, BrokenQuote, delimited_records, split_record
from loopos.data.environment_rows import environment_records
from loopos.data.json_records import is_json_lines, json_document, json_lines
from loopos.data.reasoning_gym import task_records
from loopos.data.record import MAXIMUM_DIAGNOSTICS, SKIP_ROWS, BadRows, ReadReport, Record, Records, file_error, shown
from loopos.data.sources import FileFormat, Location, locate
from loopos.data.tables import (
    arrow_records,
    hub_records,
    parquet_records,
    saved_records,
    spreadsheet_records,
)
from loopos.data.text_records import is_preference_text, is_worked_text, preference_records, worked_records

TextFormat: TypeAlias = Literal["jsonl", "json", "worked", "preferences", "csv", "tsv"]
SAMPLE_LINES = 100
_TABLE_LINES = 20
_FORMAT_NAMES: Mapping[str, str] = {
    "jsonl": "JSON Lines",
    "json": "a JSON document",
    "csv": "CSV",
    "tsv": "TSV",
    "worked": "worked problems",
    "preferences": "comparisons of two responses",
}
_NAME = re.compile(r"[^\W\d][\w .-]{0,39}")


def sniff(lines: Sequence[tuple[int, str]], source: str) -> tuple[TextFormat, str]:
    """Detect the format and, for delimited text, the delimiter of a file from its first `lines`.

    Raises:
        DataError: the lines are neither JSON nor worked problems nor comparisons nor delimited text with a header.
    """
    filled = [(number, line.rstrip("\r")) for number, line in lines if line.strip()]
    if not filled:
        raise file_error(source, "blank lines only", "JSON Lines, CSV or TSV", line=1)
    number, first = filled[0]
    opening = first.lstrip()
    if opening.startswith("{"):
        is_single_line = len(filled) == 1 and '"data"' not in opening
        return ("jsonl" if is_single_line or is_json_lines("\n".join(line for _, line in filled[:2])) else "json"), ""
    if re.match(r"\[\s*([{\]]|$)", opening):
        return "json", ""
    if is_worked_text([line for _, line in filled]):
        return "worked", ""
    if is_preference_text([line for _, line in filled]):
        return "preferences", ""
    for delimiter in ("\t", ",", ";"):
        if delimiter in first and _is_delimited(filled[:_TABLE_LINES], delimiter):
            return ("tsv" if delimiter == "\t" else "csv"), delimiter
    raise file_error(
        source,
        f"plain text: {shown(first)}",
        "JSON Lines, CSV or TSV with a header line, or worked problems (Problem: ..., its steps, Answer: ...), or "
        "comparisons (Prompt: ..., Chosen: ..., Rejected: ...)",
        'write one {"text": "...", "label": "..."} per line, or start with the header line text,label',
        line=number,
        field="format",
    )


def is_lines(lines: Sequence[tuple[int, str]], source: str, names: frozenset[str]) -> bool:
    """Whether a file with these first `lines` has one text per line rather than a table.

    True if it has no known format, or if it looks like a table whose header has none of `names` (two lines with a comma
    each look like a table).
    """
    if not any(line.strip() for _, line in lines):
        return False
    try:
        chosen, delimiter = sniff(lines, source)
    except DataError:
        return True
    header = next(line for _, line in lines if line.strip()).split(delimiter) if delimiter else []
    return chosen in ("csv", "tsv") and names.isdisjoint(plain_name(name.strip().strip('"')) for name in header)


def describe(name: str, delimiter: str) -> str:
    """The format as text for the report."""
    return f"{_FORMAT_NAMES[name]} (delimiter: {DELIMITER_NAMES[delimiter]})" if delimiter else _FORMAT_NAMES[name]


def _is_delimited(filled: Sequence[tuple[int, str]], delimiter: str) -> bool:
    cells = filled[0][1].split(delimiter)
    header = [name.strip().strip('"') for name in cells]
    if not all(_NAME.fullmatch(name) for name in header) or len(set(header)) < len(header):
        return False
    if all(re.fullmatch(r'[\w.-]+|"[\w.-]+"', cell) for cell in cells):
        return True
    lines, widths = iter(filled), list[int]()
    for number, line in lines:
        try:
            widths.append(len(split_record(number, line, lines, delimiter)))
        except BrokenQuote:
            break
    return len(widths) > 1 and set(widths) == {len(header)}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its values by column and its location.

    `source` is the file or hub id, `line` the first physical line of the row (from 1; None without lines), `index` its
    number over all files (from 0, bad rows included).
    """

    values: dict[str, object]
    source: str
    line: int | None
    index: int

    @property
    def source_label(self) -> str:
        """The source for diagnostics, with the row number if there are no lines."""
        return self.source if self.line is not None else f"{self.source} (row {self.index})"

    @property
    def location(self) -> str:
        """Source and line, or the row number if there are no lines."""
        return self.source_label if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Lines:
    """Read a .txt file as one row per line, in `column`, if it is plain text or its header has none of `unless`."""

    column: str
    unless: frozenset[str]


Convert: TypeAlias = Callable[[Mapping[str, object], str], Mapping[str, object]]
"""The values of a row and its location → its values in other columns; raises ValueError for a row that has none."""


class RowReader:
    """An iterable of the rows of one source; each pass reads the source again and fills a new `report`.

    Bad rows are counted; with the policy "error" the pass then raises `BadRows` with the first `MAXIMUM_DIAGNOSTICS`
    diagnostics: at the end of the source, or at once when streaming, which may have no end.
    """

    def __init__(
        self,
        location: Location,
        *,
        split: str,
        subset: str | None,
        streaming: bool,
        max_rows: int | None,
        on_bad_row: Literal["error", "skip"],
        rules: TextRules = PLAIN_RULES,
        lines: Lines | None = None,
    ) -> None:
        assert on_bad_row in ("error", "skip"), on_bad_row
        assert max_rows is None or max_rows > 0, max_rows
        self.location, self.split, self.subset, self.rules = location, split, subset, rules
        self.streaming, self.max_rows, self.on_bad_row = streaming, max_rows, on_bad_row
        self.lines = lines
        self.convert: Convert | None = None
        self.report = self._new_report()

    def __iter__(self) -> Iterator[Row]:
        yield from self.rows()
        self.finish()

    def rows(self) -> Iterator[Row]:
        """A pass without the final error, for callers that reject more rows and then call `finish`."""
        report = self.report = self._new_report()
        with closing(self._records(report)) as records:
            for index, (source, record) in enumerate(itertools.islice(records, self.max_rows)):
                report.rows_read += 1
                if isinstance(record, Diagnostic):
                    numbered = record if record.line is not None else replace(record, source=f"{source} (row {index})")
                    self.reject([numbered])
                elif self.convert is None:
                    yield Row(record.values, source, record.line, index)
                else:
                    yield from self._converted(self.convert, Row(record.values, source, record.line, index))

    def _converted(self, convert: Convert, row: Row) -> Iterator[Row]:
        """The row in other columns, if the format accepts it."""
        try:
            yield replace(row, values=dict(convert(row.values, row.location)))
        except ValueError as problem:
            self.reject([Diagnostic(row.source_label, row.line, None, "row", str(problem), "")])

    def reject(self, diagnostics: Sequence[Diagnostic]) -> None:
        """Count one row of the current pass as bad, with `diagnostics` from the reader or from `formats`.

        Raises:
            BadRows: at once when streaming with the policy "error"; else `finish` raises.
        """
        report = self.report
        report.bad_rows += 1
        report.num_diagnostics += len(diagnostics)
        room = len(diagnostics) if self.on_bad_row == "skip" else max(0, MAXIMUM_DIAGNOSTICS - len(report.diagnostics))
        report.diagnostics.extend(diagnostics[:room])
        if self.streaming:
            self.finish()

    def finish(self) -> None:
        """End a pass; raises `BadRows` if there were bad rows and the policy is "error"."""
        if self.report.bad_rows and self.on_bad_row == "error":
            raise BadRows(self.report.diagnostics, self.report.num_diagnostics, "correct the rows", SKIP_ROWS)

    def _new_report(self) -> ReadReport:
        files = [path for path, _ in self.location.files] or [self.location.name]
        return ReadReport(self.location.name, files, summary=list(self.location.summary))

    def _records(self, report: ReadReport) -> Generator[tuple[str, Record | Diagnostic], None, None]:
        for source, records in self._sources(report):
            empty = True
            for record in records:
                empty = False
                yield source, record
            if empty:
                raise file_error(
                    source, "no rows", "at least one row", "a header without rows is not data", field="rows"
                )

    def _sources(self, report: ReadReport) -> Iterator[tuple[str, Records]]:
        name = self.location.name
        match self.location.kind:
            case "files":
                for path, file_format in self.location.files:
                    yield path, _file_records(path, file_format, self.rules, self.lines, report)
            case "saved":
                yield name, saved_records(name, self.split, report)
            case "hub":
                yield name, hub_records(name, self.split, self.subset, self.streaming, report)
            case "task":
                yield name, environment_records(name) if name.startswith(ENVIRONMENT_ROWS) else task_records(name)


def read(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    rules: TextRules = PLAIN_RULES,
    lines: Lines | None = None,
) -> RowReader:
    """Open a data source.

    Args:
        source: a file, a folder, a glob or a hub id "org/name".
        split: which split of a hub id, of a saved data set, or of a folder whose file names state one.
        subset: the configuration of a hub id that has several.
        streaming: read a hub id while it downloads; raise at the first bad row instead of the end.
        max_rows: maximum number of rows, including bad rows.
        on_bad_row: "error" raises at the end of a pass with bad rows; "skip" counts them in `report`.
        rules: encoding and limits of text files.
        lines: how a .txt file that is not a table is read; an error if None.
    Raises:
        DataError: missing or unreadable, now or while iterating; bad rows as `BadRows`, a subclass.
        MissingRequirement: a package that the format needs is not installed.
    """
    return RowReader(
        locate(expanded(source), split),
        split=split,
        subset=subset,
        streaming=streaming,
        max_rows=max_rows,
        on_bad_row=on_bad_row,
        rules=rules,
        lines=lines,
    )


def _file_records(
    path: str,
    file_format: FileFormat,
    rules: TextRules,
    plain: Lines | None,
    report: ReadReport,
) -> Records:
    delimiter = "\t" if file_format == "tsv" else ","
    chosen: str = file_format
    if file_format == "txt":
        with closing(read_lines(path, rules)) as lines:
            first = list(itertools.islice(lines, SAMPLE_LINES))
        if plain is not None and is_lines(first, path, plain.unless):
            report.say(f"{path}: read as one {plain.column} per line")
            yield from _line_records(read_lines(path, rules), plain.column, report)
            return
        chosen, delimiter = sniff(first, path)
        report.say(f"{path}: read as {describe(chosen, delimiter)}, by its content")
    match chosen:
        case "csv" | "tsv":
            yield from delimited_records(read_lines(path, rules), path, delimiter, report)
        case "jsonl":
            yield from json_lines(read_lines(path, rules), path, report)
        case "json":
            yield from _json_records(path, rules, report)
        case "worked":
            yield from worked_records(read_lines(path, rules), path, report)
        case "preferences":
            yield from preference_records(read_lines(path, rules), path, report)
        case "parquet":
            yield from parquet_records(path, report)
        case "arrow":
            yield from arrow_records(path, report)
        case "xlsx":
            yield from spreadsheet_records(path, rules, report)


def _line_records(lines: Iterator[tuple[int, str]], column: str, report: ReadReport) -> Records:
    """One row for each line that is not blank."""
    for number, line in lines:
        if line.strip():
            yield Record(number, {column: line.rstrip("\r")})
        else:
            report.blank_lines += 1


def _json_records(path: str, rules: TextRules, report: ReadReport) -> Records:
    text = read_text(path, rules)
    if text.lstrip().startswith("{") and is_json_lines(text):
        report.say(f"{path}: read as JSON Lines, by its content")
        yield from json_lines(enumerate(text.split("\n"), start=1), path, report)
    else:
        yield from json_document(text, path)


_PROSE = (".md", ".text")


def is_plain_text(source: str, rules: TextRules = PLAIN_RULES) -> bool:
    """Whether a source is plain text: .md or .text, or .txt in no other known format; also with .gz or .zst."""
    name = source.lower().removesuffix(".gz").removesuffix(".zst")
    if not Path(source).is_file() or not name.endswith((".txt", *_PROSE)):
        return False
    if name.endswith(_PROSE):
        return True
    with closing(read_lines(source, rules)) as lines:
        first = list(itertools.islice(lines, SAMPLE_LINES))
    if not any(line.strip() for _, line in first):
        return True
    try:
        sniff(first, source)
    except DataError:
        return True
    return False


def read_plain_text(source: str, rules: TextRules = PLAIN_RULES) -> str:
    """The whole text. Raises `DataError` if the file is missing, unreadable or has no text."""
    text = read_text(source, rules)
    if not text.strip():
        raise DataError([Diagnostic(source, None, None, "text", "no text", "a file with text")])
    return text
