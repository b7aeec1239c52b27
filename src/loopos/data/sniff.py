"""What a .txt file holds, by its content.

Enters: the first lines of a text file. Leaves: "jsonl", "json", "worked" (problems with their steps: `worked_text`),
"preferences" (comparisons: `preference_text`), "csv" or "tsv", and the delimiter. A file counts as delimited if its
first line splits into names (short, without a sentence's punctuation) and the lines under it split into as many cells.
Left out: plain prose, which has no label; it is refused with what was seen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from loopos.config.faults import DataError
from loopos.data.columns import plain_name
from loopos.data.delimited import DELIMITER_NAMES, BrokenQuote, split_record
from loopos.data.json_records import is_json_lines
from loopos.data.preference_text import is_preference_text
from loopos.data.record import file_error, shown
from loopos.data.worked_text import is_worked_text

TextFormat: TypeAlias = Literal["jsonl", "json", "worked", "preferences", "csv", "tsv"]
SAMPLE_LINES = 100
_TABLE_LINES = 20
_WORDS: Mapping[str, str] = {
    "jsonl": "JSON Lines",
    "json": "a JSON document",
    "csv": "CSV",
    "tsv": "TSV",
    "worked": "worked problems",
    "preferences": "comparisons of two responses",
}
_NAME = re.compile(r"[^\W\d][\w .-]{0,39}")


def sniff(lines: Sequence[tuple[int, str]], source: str) -> tuple[TextFormat, str]:
    """The format and, for delimited text, the delimiter of the file that begins with `lines`.

    Raises:
        DataError: the lines are neither JSON nor worked problems nor comparisons nor delimited text with a header.
    """
    filled = [(number, line.rstrip("\r")) for number, line in lines if line.strip()]
    if not filled:
        raise file_error(source, "blank lines only", "JSON Lines, CSV or TSV", line=1)
    number, first = filled[0]
    opening = first.lstrip()
    if opening.startswith("{"):
        alone = len(filled) == 1 and '"data"' not in opening
        return ("jsonl" if alone or is_json_lines("\n".join(line for _, line in filled[:2])) else "json"), ""
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
        'write one {"text": "...", "label": "..."} a line, or begin with the header line text,label',
        line=number,
        field="format",
    )


def is_lines(lines: Sequence[tuple[int, str]], source: str, names: frozenset[str]) -> bool:
    """Whether the file that begins with `lines` is no data but one text a line: it is in no known format, or a table
    whose header holds none of `names`, as two lines with a comma each may look like one.
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
    """The format in words, for the report."""
    return f"{_WORDS[name]} (delimiter: {DELIMITER_NAMES[delimiter]})" if delimiter else _WORDS[name]


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
