"""JSON Lines of a study as frozen sections, with the line and column of what does not fit.

Used for items and for events; `config.load` does the same for whole files.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from loopos.config.diagnostics import ConfigError, DataError, Diagnostic, UserError
from loopos.config.json_text import MappingNode, parse_json
from loopos.config.keys import Section
from loopos.config.wording import diagnostics_of
from loopos.storage.json_files import json_text

SectionT = TypeVar("SectionT", bound=Section)


def section_of(kind: type[SectionT], line: bytes, path: Path, number: int) -> SectionT:
    """The section in line `number` (from 1) of a file. Raises `DataError` with line, column and field."""
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise DataError(_diagnostics(error, kind, line, path, number)) from error


def checked(kind: type[SectionT], values: dict[str, Any], what: str) -> SectionT:
    """A section of values that a program or a page sends. Raises `UserError` that names `what` and the field."""
    try:
        return kind.model_validate_json(json_text(values))
    except ValidationError as error:
        found = _diagnostics(error, kind, json_text(values).encode(), Path(what), 1)
        raise UserError("\n".join(str(each).replace(f"{each.location}:", f"{what}:", 1) for each in found)) from error


def line_of(section: Section) -> bytes:
    """A section as a line, without the keys that are at their defaults."""
    values = section.model_dump(mode="json", exclude_defaults=True)
    # `kind` is at its default in every event, and says which event it is.
    kind = {"kind": section.kind} if "kind" in type(section).model_fields else {}  # type: ignore[attr-defined]
    return json_text({**kind, **values}, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _diagnostics(error: ValidationError, kind: type[Section], line: bytes, path: Path, number: int) -> list[Diagnostic]:
    """Diagnostics of a line, located in its file."""
    try:
        # Blank lines before it give the line its number.
        root = parse_json("\n" * (number - 1) + line.decode("utf-8", errors="replace"), str(path))
    except ConfigError as problem:
        return list(problem.diagnostics)
    if not isinstance(root, MappingNode):
        return [Diagnostic(str(path), number, 1, "line", "a value that is no object", 'an object such as {"...": ...}')]
    return [each for _, each in diagnostics_of(error, root, _schema_of(kind), {})]


@cache
def _schema_of(kind: type[Section]) -> dict[str, Any]:
    return kind.model_json_schema()
