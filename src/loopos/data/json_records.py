"""Read JSON and JSON Lines into records, each with its first line.

A document is an array of objects, or an object with such an array under "data". A line of JSON Lines that is not valid
is a bad row; a syntax error in an array makes the file unreadable, because the start of the next row is unknown.
Duplicate names and NaN are errors; pandas' column-oriented JSON is refused by name.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data.record import ReadReport, Record, Records, file_error, shown

_BLANK = re.compile(r"[ \t\n\r]*")
_OBJECT_EXPECTED = 'an object such as {"text": "...", "label": "..."}'
_DOCUMENT_EXPECTED = 'an array of objects, {"data": [...]}, or one object a line (JSON Lines)'


class JsonReader:
    """Decodes JSON values and keeps what the standard decoder lets through: names given twice, NaN and Infinity."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._doubled: list[str] = []
        self._constants: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._members, parse_constant=self._constant)

    def _members(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            self._doubled.append(next(name for name, count in counts.items() if count > 1))
        return members

    def _constant(self, name: str) -> float:
        self._constants.append(name)
        return float(name.replace("Infinity", "inf"))

    def decode(self, text: str, position: int, line: int | None = None) -> tuple[object, int]:
        """The value at `position` and the position behind it.

        Args:
            line: the number of the only line that `text` is; None where `text` is a whole file.
        Raises:
            DataError: the syntax error with line and column.
        """
        self._doubled.clear()
        self._constants.clear()
        start = _skip(text, position)
        try:
            return self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise DataError([self.syntax_diagnostic(text, error.pos, error.msg, line)]) from error
        except RecursionError as error:
            raise DataError([self.syntax_diagnostic(text, start, "nested too deeply", line)]) from error
        except ValueError as error:
            raise DataError([self.syntax_diagnostic(text, start, "a number of too many digits", line)]) from error

    def syntax_diagnostic(self, text: str, position: int, reason: str, line: int | None) -> Diagnostic:
        """The diagnostic for a syntax error at `position` of `text`."""
        before = text.rfind("\n", 0, position) + 1
        number = line if line is not None else text.count("\n", 0, position) + 1
        end = text.find("\n", position)
        rest = text[position : end if end >= 0 else len(text)].rstrip("\r")
        actual = f"{shown(rest, 40)} ({reason})" if rest else f"the end of the line ({reason})"
        return Diagnostic(
            self.source,
            number,
            position - before + 1,
            "JSON",
            actual,
            "valid JSON",
            _syntax_hint(rest, reason, line is not None),
        )

    def record(self, value: object, line: int) -> Record | Diagnostic:
        """The last decoded value as a row, or why it is none."""
        if not isinstance(value, dict):
            hint = "each value of a row needs a column name" if isinstance(value, list) else ""
            return Diagnostic(self.source, line, None, "row", shown(value), _OBJECT_EXPECTED, hint)
        if self._doubled:
            name = self._doubled[0]
            return Diagnostic(
                self.source, line, None, name, f"the name {shown(name)} twice in one object", "distinct names"
            )
        if self._constants:
            field = next((name for name, item in value.items() if _holds_constant(item)), "row")
            expected = "a number, or null (JSON has no NaN and no Infinity)"
            return Diagnostic(self.source, line, None, field, self._constants[0], expected)
        return Record(line, value)


def json_lines(lines: Iterator[tuple[int, str]], source: str, report: ReadReport) -> Records:
    """Yields one row for each line that is not blank; blank lines are counted in `report`."""
    reader = JsonReader(source)
    for number, line in lines:
        text = line.strip()
        if not text:
            report.blank_lines += 1
            continue
        try:
            value, end = reader.decode(line, 0, number)
        except DataError as error:
            yield error.diagnostics[0]
            continue
        rest = line[end:].strip()
        if rest:
            position = line.index(rest, end)
            yield reader.syntax_diagnostic(line, position, "more text after the value", number)
        else:
            yield reader.record(value, number)


def is_json_lines(text: str) -> bool:
    """Whether `text`, which begins with an object, is JSON Lines: a second line that is not blank begins an object too,
    or follows a whole one."""
    first, second = itertools.islice(itertools.chain(_filled_lines(text), ("", "")), 2)
    if not second:
        return False
    if second.startswith("{"):
        return True
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _filled_lines(text: str) -> Iterator[str]:
    """The lines that are not blank, without the white space around them."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line = text[start:end].strip()
        if line:
            yield line
        start = end + 1


def json_document(text: str, source: str) -> Records:
    """Yield the rows of a JSON array of objects, or of the array under "data" of an object.

    Raises:
        DataError: a syntax error (line and column), another kind of document.
    """
    start = _skip(text, 0)
    if start == len(text):
        raise file_error(source, "blank text", _DOCUMENT_EXPECTED, line=1)
    reader = JsonReader(source)
    if text[start] == "[":
        end = yield from _array(reader, text, start)
    elif text[start] == "{":
        end = yield from _object_with_data(reader, text, start)
    else:
        raise file_error(
            source, shown(text[start : start + 40]), _DOCUMENT_EXPECTED, line=text.count("\n", 0, start) + 1
        )
    behind = _skip(text, end)
    if text[start] == "{" and text.startswith("{", behind):
        line = text.count("\n", 0, behind) + 1
        hint = "put them into one array: [{...}, {...}], or write each on one line, in a file named .jsonl"
        raise file_error(source, "a second object after the first", _DOCUMENT_EXPECTED, hint, line=line)
    if behind < len(text):
        raise DataError([reader.syntax_diagnostic(text, behind, "more text after the document", None)])


def _array(reader: JsonReader, text: str, start: int) -> Generator[Record | Diagnostic, None, int]:
    """Yields the elements of the array whose bracket is at `start`; returns the position behind it."""
    position = _skip(text, start + 1)
    line, counted = text.count("\n", 0, position) + 1, position
    if text.startswith("]", position):
        return position + 1
    while True:
        value, end = reader.decode(text, position)
        yield reader.record(value, line)
        position, closed = _after_member(reader, text, end, "]")
        if closed:
            return position
        line += text.count("\n", counted, position)
        counted = position


def _object_with_data(reader: JsonReader, text: str, start: int) -> Generator[Record | Diagnostic, None, int]:
    """Yields the elements of the array under "data" of the object at `start`; returns the position after the object."""
    names: dict[str, None] = {}
    lists: list[str] = []
    rows_found = False
    position, closed = _skip(text, start + 1), False
    if text.startswith("}", position):
        position, closed = position + 1, True
    while not closed:
        name, end = reader.decode(text, position)
        if not isinstance(name, str):
            raise DataError([reader.syntax_diagnostic(text, position, "a name in double quotes is expected", None)])
        colon = _skip(text, end)
        if not text.startswith(":", colon):
            raise DataError([reader.syntax_diagnostic(text, colon, "a colon is expected", None)])
        if name in names:
            line = text.count("\n", 0, position) + 1
            raise file_error(reader.source, f"the name {shown(name)} twice", "distinct names", line=line, field=name)
        names[name] = None
        value = _skip(text, colon + 1)
        if name == "data" and text.startswith("[", value):
            rows_found = True
            end = yield from _array(reader, text, value)
        else:
            found, end = reader.decode(text, value)
            lists += [name] if isinstance(found, list) else []
        position, closed = _after_member(reader, text, end, "}")
    if not rows_found and not text.startswith("{", _skip(text, position)):
        raise _no_rows(reader.source, list(names), lists, text.count("\n", 0, start) + 1)
    return position


def _no_rows(source: str, names: Sequence[str], lists: Sequence[str], line: int) -> DataError:
    """The error of an object whose rows are not under "data". lists: the names of its lists."""
    present = ", ".join(map(shown, names[:8])) + (", ..." if len(names) > 8 else "") if names else "nothing"
    hint = 'put the rows into a list under the key "data": {"data": [{"text": "...", "label": "..."}, ...]}'
    if len(lists) == 1:
        hint = f'if {shown(lists[0])} holds the rows, rename it to "data", or leave only its array in the file'
    actual = f'an object with {present} and no list of rows under the key "data"'
    return file_error(source, actual, _DOCUMENT_EXPECTED, hint, line=line, field="data")


def _after_member(reader: JsonReader, text: str, position: int, closing: str) -> tuple[int, bool]:
    """The position after the comma at `position`, or after the closing bracket; and whether it closed."""
    position = _skip(text, position)
    if text.startswith(closing, position):
        return position + 1, True
    if position == len(text):
        raise DataError([reader.syntax_diagnostic(text, position, f"no closing {closing}: is the file cut off?", None)])
    if text[position] != ",":
        raise DataError([reader.syntax_diagnostic(text, position, f"a comma or {closing} is expected", None)])
    following = _skip(text, position + 1)
    if text.startswith(closing, following):
        raise DataError([reader.syntax_diagnostic(text, position, f"a comma before the closing {closing}", None)])
    return following, False


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


def _holds_constant(value: object) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(_holds_constant(item) for item in value.values())
    return isinstance(value, list) and any(_holds_constant(item) for item in value)


def _syntax_hint(rest: str, reason: str, is_line: bool) -> str:
    if "property name" in reason and rest.startswith("'"):
        return "JSON strings need double quotes"
    if rest.startswith(","):
        return "a line of JSON Lines ends without a comma" if "after the value" in reason else ""
    if "control character" in reason:
        return r"write a line end inside a string as \n and a tab as \t"
    if "Unterminated" in reason or not rest:
        part = "the line may be cut off; JSON Lines needs each object complete on one line"
        return part if is_line else "the file may be cut off"
    return ""
