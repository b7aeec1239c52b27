"""What went wrong and where, in the user's words.

Enters: the place (file, line, column, field), what was given, what was expected, what to do. Leaves: `Diagnostic`
records and the `UserError` exceptions that carry them. What to do often is a key to set: it is kept as a `Remedy`, so
that a command can name its own option for that key (`Wording`). Left out: printing and exiting (the CLI's work) and
programming errors (`assert`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

MOST_DIAGNOSTICS_SHOWN = 50


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but the line end and the tab, marks that turn the direction of writing around, lone surrogates."""


def printable(text: str) -> str:
    """`text` with every character escaped that a terminal obeys instead of showing it, or that has no bytes: what
    labels, names and models' answers hold must not move the cursor or rename the window.
    """
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def printable_json(text: str) -> str:
    """JSON of the same value without those characters: they stand inside strings alone, where JSON can escape them."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


@dataclass(frozen=True, slots=True)
class Remedy:
    """Keys of a config that mend a mistake, each with its value, and the words that lead to them ("choose one").

    The keys of `data.columns` name one role each: `("data.columns.text", "review")`.
    """

    lead: str
    settings: tuple[tuple[str, str], ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The dotted names of the keys."""
        return tuple(key for key, _ in self.settings)


class Wording:
    """How messages name a setting: as a key of the config. Commands that have an option for it name that instead."""

    def field(self, key: str) -> str:
        """The name under which the user knows `key`."""
        return key

    def remedy(self, remedy: Remedy) -> str:
        """The remedy as the user can apply it; empty where there is no such way."""
        summary: dict[str, str] = {}
        grouped: dict[str, dict[str, str]] = {}
        for key, value in remedy.settings:
            section, _, name = key.rpartition(".")
            if "." in section:
                grouped.setdefault(section, {})[name] = value
                summary[section] = f"{section}: {json.dumps(grouped[section], ensure_ascii=False)}"
            else:
                summary[key] = f"{key}: {json.dumps(value, ensure_ascii=False)}"
        return f"{remedy.lead}: {', '.join(summary.values())}"


IN_CONFIG = Wording()
"""The wording of a config file, and of Python."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One mistake of the user's.

    `str()` is `source:line:column: field: actual ...; expected ...`, or a sentence of its own where nothing is
    `expected`, with hint and remedy, if any, on a second line. Lines and columns are counted from 1; None where the
    source has none (the command line, a Parquet file).
    """

    source: str
    line: int | None
    column: int | None
    field: str
    actual: str
    expected: str
    hint: str = ""
    remedy: Remedy | None = None

    @property
    def place(self) -> str:
        """`source:line:column`, as far as known."""
        known = [str(number) for number in (self.line, self.column) if number is not None]
        return ":".join([self.source, *known])

    def text(self, wording: Wording) -> str:
        """The fault in words, with keys and remedy as `wording` names them."""
        field = wording.field(self.field)
        head = f"{self.place}: {field}" if field else self.place
        text = f"{head}: got {self.actual}; expected {self.expected}" if self.expected else f"{head}: {self.actual}"
        advice = [self.hint, wording.remedy(self.remedy) if self.remedy is not None else ""]
        hint = " ".join(part for part in advice if part)
        return printable(f"{text}\n    {hint}" if hint else text)

    def __str__(self) -> str:
        return self.text(IN_CONFIG)


@dataclass(frozen=True, slots=True)
class Problem:
    """A mistake found in valid values, before its place is known: `fields` are the dotted names it was read from.

    The place is that of the first of `fields` that the user wrote; a finding counts only if none of `fields` is itself
    faulty.
    """

    fields: tuple[str, ...]
    actual: str
    expected: str
    hint: str = ""


class UserError(Exception):
    """A mistake of the user's, or of the machine's set-up: shown as its message, never as a traceback."""

    exit_code: int = 2

    def message(self, wording: Wording) -> str:
        """What is shown, with settings as `wording` names them."""
        return str(self)


class SettingError(UserError):
    """A setting that cannot be used as it is: `key` is its name in a config, `problem` says why."""

    key: str
    problem: str

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(key, problem)

    def message(self, wording: Wording) -> str:
        """The problem under the name that the user knows; an argument of a command needs none."""
        name = wording.field(self.key)
        return f"{name}: {self.problem}" if name else self.problem

    def __str__(self) -> str:
        return self.message(IN_CONFIG)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work at once. The message is the user's; the exit code is that of an end by this signal."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DiagnosticsError(UserError):
    """Faults reported together; the message lists at most `MOST_DIAGNOSTICS_SHOWN` of them and counts the rest."""

    diagnostics: tuple[Diagnostic, ...]

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        assert diagnostics, "an error without faults says nothing"
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def message(self, wording: Wording) -> str:
        shown = [diagnostic.text(wording) for diagnostic in self.diagnostics[:MOST_DIAGNOSTICS_SHOWN]]
        left = len(self.diagnostics) - len(shown)
        return "\n".join([*shown, f"... and {left} more"] if left else shown)

    def __str__(self) -> str:
        return self.message(IN_CONFIG)


class ConfigError(DiagnosticsError):
    """Faults of a config file or of the overrides on the command line."""


class DataError(DiagnosticsError):
    """Faults of the user's data files."""


class MissingRequirement(UserError):
    """Something that the machine lacks: an extra that is not installed, a device that is not there."""

    exit_code: int = 1
