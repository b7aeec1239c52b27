"""Plain text for pretraining: files and data sets → documents.

In a text file, blank lines separate documents; any other source needs a text column. Imports neither torch nor
transformers, so that the text is checked before these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.pretraining import PretrainingDataSection
from loopos.data import rows
from loopos.data.decoding import PLAIN_RULES, TextRules, read_text
from loopos.data.formats import read_labeled
from loopos.data.read_ahead import reusable
from loopos.data.reading import converter_of, text_rules
from loopos.data.rows import Convert

_TEXT_FILES = (".txt", ".md", ".text")
_BLANK_LINES = re.compile(r"\n[ \t\r]*\n\s*")


@dataclass(frozen=True)
class Corpus:
    """Documents in their order. `summary`: what was read, in words."""

    documents: tuple[str, ...]
    summary: str


@reusable
def load_corpus(data: PretrainingDataSection, source: str) -> Corpus:
    """The documents of one source of a run. Raises `DataError` as `read_corpus`."""
    columns = {str(role): column for role, column in data.columns.items()}
    convert = converter_of(data.format)
    return read_corpus(source, columns, max_rows=data.max_rows, rules=text_rules(data), convert=convert)


def read_corpus(
    source: str,
    columns: Mapping[str, str],
    *,
    max_rows: int | None = None,
    rules: TextRules = PLAIN_RULES,
    convert: Convert | None = None,
) -> Corpus:
    """The documents of a text file, or the text column of any other source. convert: the format of the rows.

    Raises `DataError` for an unreadable file, one without text, rows without a text column, and a format of running
    text.
    """
    name = source.lower().removesuffix(".gz").removesuffix(".zst")
    if Path(source).is_file() and name.endswith(_TEXT_FILES):
        if convert is not None:
            expected = "no format: running text has no rows"
            raise DataError([Diagnostic(source, None, None, "data.format", "a format of rows", expected)])
        parts = [part.strip() for part in _BLANK_LINES.split(read_text(source, rules))]
        documents = tuple(part for part in parts if part)[:max_rows]
        summary = f"{source}: {len(documents)} documents, parted by blank lines"
    else:
        reader = rows.read(source, max_rows=max_rows, rules=rules)
        reader.convert = convert
        examples, report = read_labeled(reader, dict(columns), require_label=False)
        documents = tuple(example.text for example in examples)
        summary = f"{source}: {len(documents)} documents; {'; '.join(report.notes)}; {report.summary()}"
    if not documents:
        raise DataError([Diagnostic(source, None, None, "text", "no text", "at least one document")])
    return Corpus(documents, summary)
