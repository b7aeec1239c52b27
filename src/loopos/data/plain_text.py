"""Files of plain text, told from files of rows.

Enters: the value of a data source. Leaves: whether it is running text, and the text. Left out: documents of such a file
(`corpus`), rows (`rows`).
"""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path

from loopos.config.faults import DataError, Fault
from loopos.data import sniff
from loopos.data.decoding import PLAIN_RULES, TextRules, read_lines, read_text

_PROSE = (".md", ".text")


def is_plain_text(source: str, rules: TextRules = PLAIN_RULES) -> bool:
    """Whether a source is a file of running text: .md or .text, or a .txt that holds neither JSON nor a table nor
    worked problems nor comparisons; each also with .gz or .zst behind.
    """
    name = source.lower().removesuffix(".gz").removesuffix(".zst")
    if not Path(source).is_file() or not name.endswith((".txt", *_PROSE)):
        return False
    if name.endswith(_PROSE):
        return True
    with closing(read_lines(source, rules)) as lines:
        first = list(itertools.islice(lines, sniff.SAMPLE_LINES))
    if not any(line.strip() for _, line in first):
        return True
    try:
        sniff.sniff(first, source)
    except DataError:
        return True
    return False


def read_plain_text(source: str, rules: TextRules = PLAIN_RULES) -> str:
    """The whole text. Raises `DataError` for a file that is not there, cannot be read or holds no text."""
    text = read_text(source, rules)
    if not text.strip():
        raise DataError([Fault(source, None, None, "text", "no text", "a file with running text in it")])
    return text
