"""Parses `--columns ROLE=COLUMN` and `--encoding NAME`."""

from __future__ import annotations

from collections.abc import Sequence

from loopos.config.checks import is_text_encoding
from loopos.config.diagnostics import UserError
from loopos.data.decoding import TextRules


def parse_columns(arguments: Sequence[str]) -> dict[str, str]:
    """Role → column. Raises `UserError` for an argument without = and for a role that occurs twice."""
    columns: dict[str, str] = {}
    for argument in arguments:
        role, equals, column = argument.partition("=")
        if not equals or not role or not column:
            raise UserError(f"--columns: got {argument}; expected ROLE=COLUMN, for example text=review")
        if role in columns:
            raise UserError(f"--columns: got {role} twice ({columns[role]} and {column}); expected one column per role")
        columns[role] = column
    return columns


def text_rules(encoding: str | None) -> TextRules:
    """How text files are read under --encoding. Raises `UserError` for an unknown encoding."""
    if encoding is not None and not is_text_encoding(encoding):
        raise UserError(f"--encoding: got {encoding}; expected the name of a text encoding, for example cp1252")
    return TextRules(encoding)
