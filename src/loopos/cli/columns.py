"""`--columns ROLE=COLUMN` and `--encoding NAME`: the words of the command line as readers take them.

Enters: words. Leaves: role → column, `TextRules`. Left out: whether the role and the column exist (`data.formats`).
"""

from __future__ import annotations

from collections.abc import Sequence

from loopos.config.checks import is_text_encoding
from loopos.config.diagnostics import UserError
from loopos.data.decoding import TextRules


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """Role → column. Raises `UserError` for a word without = and for a role that is given twice."""
    columns: dict[str, str] = {}
    for word in words:
        role, equals, column = word.partition("=")
        if not equals or not role or not column:
            raise UserError(f"--columns: got {word}; expected ROLE=COLUMN, for example text=review")
        if role in columns:
            raise UserError(f"--columns: got {role} twice ({columns[role]} and {column}); expected one column a role")
        columns[role] = column
    return columns


def text_rules(encoding: str | None) -> TextRules:
    """How text files are read under --encoding. Raises `UserError` for no encoding of text."""
    if encoding is not None and not is_text_encoding(encoding):
        raise UserError(f"--encoding: got {encoding}; expected the name of a text encoding, such as cp1252")
    return TextRules(encoding)
