"""What went wrong and where, in the user's words.

Enters: the place (file, line, column, field), what was given, what was wanted, what to do. Leaves: `Fault` records and
the `UserError` exceptions that carry them. Left out: printing and exiting (the CLI's work) and programming errors
(`assert`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_FAULTS_SHOWN = 50


def printable(text: str) -> str:
    """`text` with every character that no terminal prints (control characters, lone surrogates) escaped."""
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake of the user's.

    `str()` is `source:line:column: field: given ...; wanted ...` with the hint, if any, on a second line.
    Lines and columns are counted from 1; None where the source has none (the command line, a Parquet file).
    """

    source: str
    line: int | None
    column: int | None
    field: str
    given: str
    wanted: str
    hint: str = ""

    @property
    def place(self) -> str:
        """`source:line:column`, as far as known."""
        known = [str(number) for number in (self.line, self.column) if number is not None]
        return ":".join([self.source, *known])

    def __str__(self) -> str:
        head = f"{self.place}: {self.field}" if self.field else self.place
        text = f"{head}: given {self.given}; wanted {self.wanted}"
        return printable(f"{text}\n    {self.hint}" if self.hint else text)


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake found in valid values, before its place is known: `fields` are the dotted names it was read from.

    The place is that of the first of `fields` that the user wrote; a finding counts only if none of `fields` is itself
    faulty.
    """

    fields: tuple[str, ...]
    given: str
    wanted: str
    hint: str = ""


class UserError(Exception):
    """A mistake of the user's, or of the machine's set-up: shown as its message, never as a traceback."""

    exit_code: int = 2


class Interrupted(KeyboardInterrupt):
    """A signal ended the work at once. The message is the user's; the exit code is that of an end by this signal."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class FaultsError(UserError):
    """Faults reported together; the message lists at most `MOST_FAULTS_SHOWN` of them and counts the rest."""

    faults: tuple[Fault, ...]

    def __init__(self, faults: Sequence[Fault]) -> None:
        assert faults, "an error without faults says nothing"
        self.faults = tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        shown = [str(fault) for fault in self.faults[:MOST_FAULTS_SHOWN]]
        left = len(self.faults) - len(shown)
        return "\n".join([*shown, f"... and {left} more"] if left else shown)


class ConfigError(FaultsError):
    """Faults of a config file or of the overrides on the command line."""


class DataError(FaultsError):
    """Faults of the user's data files."""


class EnvironmentFault(UserError):
    """Something that the machine lacks: an extra that is not installed, a device that is not there."""

    exit_code: int = 1
