"""Read a source into examples: how it is opened, and the counts of every row (read = used + dropped)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeVar

from loopos.config.diagnostics import DataError, Diagnostic, UserError
from loopos.config.own_function import OwnFunction
from loopos.config.registry import loaded
from loopos.config.variants import FORMATS
from loopos.data import rows
from loopos.data.annotation_exports import flat_rows
from loopos.data.columns import named, unread
from loopos.data.decoding import TextRules
from loopos.data.preference_formats import NAMES
from loopos.data.record import shown
from loopos.data.rows import Convert, Lines, Row, RowReader

UNREADABLE = "unreadable row"
_KNOWN_NAMES = frozenset().union(*(names for tiers in NAMES.values() for names in tiers))
"""Column names of prompts or preferences: a table without any of them is a text with commas."""


class SourceKeys(Protocol):
    """The keys of `data` that say which rows are read, and how."""

    @property
    def validation_data(self) -> str | None: ...
    @property
    def training_split(self) -> str: ...
    @property
    def validation_split(self) -> str | None: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def max_rows(self) -> int | None: ...
    @property
    def on_bad_row(self) -> Literal["error", "skip"]: ...

    plain_lines: ClassVar[str | None]

    @property
    def format(self) -> str | None: ...
    @property
    def encoding(self) -> str | None: ...
    @property
    def max_line_bytes(self) -> int: ...
    @property
    def max_expansion(self) -> int: ...
    @property
    def split_by(self) -> Literal["prompt", "row"]: ...


class ColumnsFound(Protocol):
    """A format: role → column, and a summary for the user."""

    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def summary(self) -> str: ...


Form = TypeVar("Form", bound=ColumnsFound)
Example = TypeVar("Example")


@dataclass(frozen=True, slots=True)
class Unusable:
    """A row without an example: the reason to count it under, and its diagnostics."""

    reason: str
    diagnostics: list[Diagnostic]


@dataclass(kw_only=True)
class DataReport:
    """What was used of data, by reading a file or by tokenizing examples: `read` = `used` + the sum of `dropped`, which
    counts rows by reason. `summary()` is its text.

    Of reading: `notes`: the reader's decisions. `class_names`: names that the data set itself keeps for the whole
    numbers of its label column, if any. `columns`: role → column; `unread`: the columns that no role reads, and
    `unread_note` what becomes of them.

    Of tokenizing: `lengths` of the used rows (of preferences, of each prompt with its longest response), None before;
    `indices` of the used rows among the read ones. `tokens` counts each prompt once. `trained_tokens`, `responses`,
    `pairs`, `steps` and `labeled_steps` are None where the data has none. `cut`: truncated rows or responses;
    `tokens_cut`: the tokens that they lost, a lower bound if `shortened` texts were not tokenized to their end;
    `cut_unit`: what was truncated.
    """

    read: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    unread_note: str = "not read"
    responses: int | None = None
    pairs: int | None = None
    steps: int | None = None
    labeled_steps: int | None = None
    tokens: int = 0
    trained_tokens: int | None = None
    cut: int = 0
    tokens_cut: int = 0
    cut_unit: str = ""
    max_length: int | None = None
    shortened: int = 0
    lengths: list[int] | None = field(default=None, repr=False)
    indices: list[int] = field(default_factory=list, repr=False)

    def counts(self) -> dict[str, object]:
        """The counts of rows and tokens as values for logs, without those that the data has not."""
        values = {name: getattr(self, name) for name in _COUNTS}
        return {name: value for name, value in values.items() if value is not None or name == "max_length"}

    def summary(self) -> str:
        """The report as text: rows, tokens where rows were tokenized, and unread columns."""
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in sorted(self.dropped.items()))
        rows = f"{self.read} rows read, {self.used} used{dropped}"
        return "; ".join([rows, *self._of_tokens(), *left_out(self)])

    def _of_tokens(self) -> list[str]:
        if self.lengths is None:
            return []
        counts = [f"{self.responses} responses, {self.pairs} pairs"] if self.responses else []
        counts += [f"{self.steps:,} steps, {self.labeled_steps:,} labeled"] if self.steps else []
        counts.append(f"{self.tokens:,} tokens")
        if self.trained_tokens is not None:
            fraction = f" ({self.trained_tokens / self.tokens:.0%})" if self.tokens else ""
            counts.append(f"{self.trained_tokens:,} trained{fraction}")
        counts.append(length_spread(self.lengths) or "no rows")
        at_least = "at least " if self.shortened else ""
        lost = f"{self.cut} {self.cut_unit}cut at {self.max_length} ({at_least}{self.tokens_cut} tokens lost)"
        return [", ".join(counts), *([lost] if self.cut else [])]


_COUNTS = (
    "read",
    "used",
    "dropped",
    "responses",
    "pairs",
    "steps",
    "labeled_steps",
    "tokens",
    "trained_tokens",
    "cut",
    "tokens_cut",
    "max_length",
)


def length_spread(lengths: Sequence[int]) -> str:
    """Shortest, longest and median length as text; empty without lengths."""
    if not lengths:
        return ""
    ordered = sorted(lengths)
    return f"length {ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"


def left_out(report: DataReport) -> list[str]:
    """A note on the columns that no role reads; empty if all are read."""
    return [f"{report.unread_note}: {named(report.unread)}"] if report.unread else []


def opened(data: SourceKeys, source: str, split: str) -> RowReader:
    """Open a source with the settings of the config. Raises like `rows.read`."""
    reader = rows.read(
        source,
        split=split,
        subset=data.subset,
        streaming=data.streaming,
        max_rows=data.max_rows,
        on_bad_row=data.on_bad_row,
        rules=text_rules(data),
        lines=Lines(data.plain_lines, _KNOWN_NAMES) if data.plain_lines is not None else None,
    )
    reader.convert = converter_of(data.format)
    return reader


def converter_of(name: str | None) -> Convert | None:
    """The function of a format, by name or "module:name"; None without a name. Raises `UserError` for a format that is
    found by its columns.
    """
    if name is None:
        return None
    function = FORMATS[name].function
    if function is None:
        raise UserError(f'data.format: got "{name}", which is found by its columns; leave the key out')
    own = OwnFunction(f"format {name}", loaded(function))

    def convert(values: Mapping[str, object], location: str) -> Mapping[str, object]:
        try:
            found = own(dict(values), about=location)
        except UserError as problem:
            if isinstance(problem.__cause__, ValueError):
                raise problem.__cause__ from None
            raise
        if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
            raise own.error(f"returned {shown(found)}; expected a dict of columns\n    for {location}")
        return found

    return convert


def text_rules(data: SourceKeys) -> TextRules:
    """The encoding and the bounds that the config sets for text files."""
    return TextRules(data.encoding, data.max_line_bytes, data.max_expansion)


def validation_source(data: SourceKeys, training_source: str) -> tuple[str, str] | None:
    """Source and split of the validation rows; None if they are split off the training rows."""
    if data.validation_data is None and data.validation_split is None:
        return None
    return data.validation_data or training_source, data.validation_split or data.training_split


def read_examples(
    reader: RowReader,
    detect: Callable[[Sequence[str], str], Form],
    example_of: Callable[[Row, Form], Example | Unusable],
) -> tuple[list[Example], Form, DataReport]:
    """Read a source into examples of one format.

    Args:
        detect: finds the format from the columns and the name of their source.
        example_of: makes an example from a row, or returns the reason why there is none.
    Raises:
        DataError: as `rows.read` and `detect`; no row that can be used; bad rows by the reader's policy, the file's
            and the format's together.
    """
    pass_rows = flat_rows(list(reader.rows()))
    report, examples = reader.report, list[Example]()
    dropped = Counter({UNREADABLE: report.bad_rows} if report.bad_rows else {})
    form: Form | None = None
    columns: list[str] = []
    if pass_rows:
        columns = list(dict.fromkeys(name for row in pass_rows for name in row.values))
        try:
            form = detect(columns, pass_rows[0].source)
        except DataError as error:
            raise DataError(
                [*error.diagnostics, *(report.diagnostics if reader.on_bad_row == "error" else [])]
            ) from error
        for row in pass_rows:
            example = example_of(row, form)
            if isinstance(example, Unusable):
                dropped[example.reason] += 1
                reader.reject(example.diagnostics)
            else:
                examples.append(example)
    reader.finish()
    if form is None or not examples:
        actual = f"{report.rows_read} rows, none of which can be used"
        first = f"first problem: {report.diagnostics[0]}" if report.diagnostics else ""
        raise DataError([Diagnostic(report.source, None, None, "rows", actual, "at least one good row", first)])
    notes = (*report.summary, form.summary)
    counted = DataReport(
        read=report.rows_read,
        used=len(examples),
        dropped=dict(dropped),
        notes=notes,
        diagnostics=list(report.diagnostics),
        columns=form.columns,
        unread=unread(columns, form.columns.values()),
    )
    assert counted.read == counted.used + sum(counted.dropped.values()), counted
    return examples, form, counted
