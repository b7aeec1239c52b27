"""Diagnostics for users: what is wrong, where, and what to do.

A `Diagnostic` holds one mistake with its file, line, column and field; a `UserError` carries one or several. A `Remedy`
names the config keys that fix the mistake, so that a command can show its own option for a key (`Wording`). Programming
errors use `assert`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

MOST_DIAGNOSTICS_SHOWN = 50


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than newline and tab, bidirectional marks, lone surrogates."""


def printable(text: str) -> str:
    """Escape the characters that control a terminal or that UTF-8 cannot encode.

    Labels, names and generated text must not move the cursor or rename the window.
    """
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def printable_json(text: str) -> str:
    """Like `printable` for JSON text: escapes the characters as \\uXXXX, so that the value stays the same."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


@dataclass(frozen=True, slots=True)
class Remedy:
    """Config keys and values that fix a mistake, and the text that introduces them ("choose one").

    Each key of `data.columns` names one role: `("data.columns.text", "review")`.
    """

    lead: str
    settings: tuple[tuple[str, str], ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The dotted names of the keys."""
        return tuple(key for key, _ in self.settings)


class Wording:
    """How messages name a setting: by its config key. A command with an option for the key overrides this."""

    def field(self, key: str) -> str:
        """The name of `key` to show to the user."""
        return key

    def remedy(self, remedy: Remedy) -> str:
        """The remedy as text; empty if the user cannot apply it."""
        settings: dict[str, str] = {}
        grouped: dict[str, dict[str, str]] = {}
        for key, value in remedy.settings:
            section, _, name = key.rpartition(".")
            if "." in section:
                grouped.setdefault(section, {})[name] = value
                settings[section] = f"{section}: {json.dumps(grouped[section], ensure_ascii=False)}"
            else:
                settings[key] = f"{key}: {json.dumps(value, ensure_ascii=False)}"
        return f"{remedy.lead}: {', '.join(settings.values())}"


IN_CONFIG = Wording()
"""Wording for config files and for Python."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One mistake in the user's input.

    `str()` is `source:line:column: field: got ...; expected ...`; without `expected`, `actual` is the whole message.
    Hint and remedy follow on a second line. Lines and columns start at 1; they are None where the source has none (the
    command line, a Parquet file).
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
    def location(self) -> str:
        """`source:line:column`, without the parts that are not known."""
        known = [str(number) for number in (self.line, self.column) if number is not None]
        return ":".join([self.source, *known])

    def text(self, wording: Wording) -> str:
        """The message, with keys and remedy named by `wording`."""
        field = wording.field(self.field)
        head = f"{self.location}: {field}" if field else self.location
        text = f"{head}: got {self.actual}; expected {self.expected}" if self.expected else f"{head}: {self.actual}"
        advice = [self.hint, wording.remedy(self.remedy) if self.remedy is not None else ""]
        hint = " ".join(part for part in advice if part)
        return printable(f"{text}\n    {hint}" if hint else text)

    def __str__(self) -> str:
        return self.text(IN_CONFIG)


@dataclass(frozen=True, slots=True)
class Problem:
    """A mistake in values that are valid by themselves, before its location is known.

    `fields` are the dotted names of the values involved. The location is that of the first of them that the user wrote;
    the problem is dropped if one of them already has a diagnostic of its own.
    """

    fields: tuple[str, ...]
    actual: str
    expected: str
    hint: str = ""


class UserError(Exception):
    """A mistake in the user's input or in the machine's setup: shown as a message, never as a traceback."""

    exit_code: int = 2

    def message(self, wording: Wording) -> str:
        """The message to show, with settings named by `wording`."""
        return str(self)


class SettingError(UserError):
    """A setting that cannot be used: `key` is its config key, `problem` the reason."""

    key: str
    problem: str

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(key, problem)

    def message(self, wording: Wording) -> str:
        """The problem, after the setting's name; an argument of a command needs no name."""
        name = wording.field(self.key)
        return f"{name}: {self.problem}" if name else self.problem

    def __str__(self) -> str:
        return self.message(IN_CONFIG)


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work. The message is shown to the user; the exit code is the one for this signal."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DiagnosticsError(UserError):
    """Diagnostics reported together; the message lists at most `MOST_DIAGNOSTICS_SHOWN` and counts the rest."""

    diagnostics: tuple[Diagnostic, ...]

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        assert diagnostics, "at least one diagnostic is required"
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def message(self, wording: Wording) -> str:
        shown = [diagnostic.text(wording) for diagnostic in self.diagnostics[:MOST_DIAGNOSTICS_SHOWN]]
        left = len(self.diagnostics) - len(shown)
        return "\n".join([*shown, f"... and {left} more"] if left else shown)

    def __str__(self) -> str:
        return self.message(IN_CONFIG)


class ConfigError(DiagnosticsError):
    """Mistakes in a config file or in the overrides on the command line."""


class DataError(DiagnosticsError):
    """Mistakes in the user's data files."""


class MissingRequirement(UserError):
    """The machine lacks something: an extra is not installed, or a device is missing."""

    exit_code: int = 1
