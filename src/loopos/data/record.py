"""What every reader hands on: one record of a file, and the count of what was read.

Enters: nothing; these are the plain types between the readers (`delimited`, `json_records`, `tables`) and `rows`.
Leaves: `Record` for a whole row, a `Fault` for a bad one; `ReadReport`, which the readers and `RowReader` fill in.
Left out: what a column means (`formats`), and what a label means (`labels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loopos.config.faults import DataError, Fault, Remedy, Wording

MAXIMUM_FAULTS = 20
"""Faults shown in one error; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of one file: `line` is 1-based, the first physical line of the row; None where a file has no lines."""

    line: int | None
    values: dict[str, object]


Records: TypeAlias = Iterator[Record | Fault]
"""A reader's output in file order: a `Record` for a good row, a `Fault` for a bad one."""


@dataclass(slots=True)
class ReadReport:
    """What one pass over a source met. `rows_read` counts good and bad rows; blank lines are no rows.

    `faults` holds every fault under the skip policy, the first ones else; `num_faults` counts them all. `said` holds
    what the reader decided by itself (a sniffed format, a delimiter). `class_names` holds, by column, the names that a
    data set written by `datasets` keeps for its integer classes.
    """

    source: str
    files: list[str]
    rows_read: int = 0
    bad_rows: int = 0
    num_faults: int = 0
    blank_lines: int = 0
    faults: list[Fault] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def good_rows(self) -> int:
        """Rows that were handed on: `rows_read` less `bad_rows`."""
        return self.rows_read - self.bad_rows

    def say(self, sentence: str) -> None:
        """Notes a decision once, however many files it was taken for."""
        if sentence not in self.said:
            self.said.append(sentence)


def shown(value: Any, limit: int = 60) -> str:
    """`value` as an error shows it: `repr`, cut to about `limit` characters."""
    if isinstance(value, str) and len(value) > limit:
        return repr(value[:limit]) + "..."
    text = repr(value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def file_error(
    source: str,
    given: str,
    wanted: str,
    hint: str = "",
    *,
    line: int | None = None,
    column: int | None = None,
    field: str = "file",
    remedy: Remedy | None = None,
) -> DataError:
    """The error of a fault that makes a whole file unreadable, whatever the policy for bad rows."""
    return DataError([Fault(source, line, column, field, given, wanted, hint, remedy)])


SKIP_ROWS = Remedy("or leave them out", (("data.on_bad_row", "skip"),))
"""What a user can do about bad rows besides correcting them."""


class BadRows(DataError):
    """Rows that can't be used: `faults` are the first of them, `total` counts them all; `advice` and `remedy` end the
    message.
    """

    total: int
    advice: str
    remedy: Remedy | None

    def __init__(self, faults: Sequence[Fault], total: int, advice: str, remedy: Remedy | None = None) -> None:
        assert total >= len(faults)
        super().__init__(faults[:MAXIMUM_FAULTS])
        self.total, self.advice, self.remedy = total, advice, remedy

    def message(self, wording: Wording) -> str:
        more = self.total - len(self.faults)
        remedy = wording.remedy(self.remedy) if self.remedy is not None else ""
        advice = ", ".join(part for part in (self.advice, remedy) if part)
        return "\n".join([super().message(wording), *([f"... and {more} more faults"] if more else []), advice])
