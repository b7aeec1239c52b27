"""The comparisons and prompts of a run: rows read, columns found, validation rows split off.

Imports neither torch nor transformers, so that rows are checked before these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.preferences import PreferenceTextSection
from loopos.data.columns import Overrides
from loopos.data.preferences import Comparison, read_comparisons
from loopos.data.prompts import Prompt, read_prompts, read_tasks
from loopos.data.read_ahead import reusable
from loopos.data.reading import DataReport, opened, validation_source
from loopos.data.repeats import key_of_prompt, repeats_summary
from loopos.data.rows import RowReader
from loopos.data.split import split_off
from loopos.data.stepwise import Judgments, Stepwise, read_judgments
from loopos.data.thumbs import Thumbs, read_thumbs

ExampleT = TypeVar("ExampleT", Comparison, Prompt, Thumbs, Judgments)
_Read = Callable[..., tuple[list[ExampleT], DataReport]]


@dataclass(frozen=True)
class PreferenceData(Generic[ExampleT]):
    """Training and validation examples. `summary`: notes on what was decided; `reports`: the counts of each source."""

    train: list[ExampleT]
    validation: list[ExampleT]
    summary: list[str]
    reports: list[DataReport]


@reusable
def load_comparisons(data: PreferenceTextSection, source: str, *, seed: int) -> PreferenceData[Comparison]:
    """Reads the comparisons to train on and to validate on: their own file, their own split of a hub id, or a seeded
    fraction of the training rows. Raises `DataError`.
    """
    return _load(data, source, read_comparisons, seed=seed)


@reusable
def load_judgments(data: PreferenceTextSection, source: str, *, seed: int) -> PreferenceData[Judgments]:
    """`load_comparisons` for what a reward model learns from: comparisons, or answers with step labels. Raises
    `DataError` also where training and validation rows are not of one kind.
    """
    found = _load(data, source, read_judgments, seed=seed)
    kinds = {type(example): example.row for example in (*found.train, *found.validation)}
    if len(kinds) > 1:
        other, actual = found.validation[0].row, "comparisons beside answers with step labels"
        expected = "training and validation rows of one kind"
        raise DataError([Diagnostic(other.source_label, None, None, "data.validation_data", actual, expected)])
    return found


def has_step_labels(data: PreferenceData[Judgments]) -> bool:
    """Whether the rows are answers with step labels; else they are comparisons."""
    return isinstance(data.train[0], Stepwise)


@reusable
def load_thumbs(data: PreferenceTextSection, source: str, *, seed: int) -> PreferenceData[Thumbs]:
    """`load_comparisons` for single answers with a thumb."""
    return _load(data, source, read_thumbs, seed=seed)


@reusable
def load_prompts(data: PreferenceTextSection, source: str, *, seed: int) -> PreferenceData[Prompt]:
    """`load_comparisons` for the prompts that a policy answers; reward functions may read all columns."""

    def read(reader: RowReader, columns: Overrides, *, as_text: bool) -> tuple[list[Prompt], DataReport]:
        prompts, report = read_prompts(reader, columns, as_text=as_text)
        return prompts, replace(report, unread_note="for reward functions only")

    return _load(data, source, read, seed=seed)


@reusable
def load_tasks(data: PreferenceTextSection, source: str, *, seed: int) -> PreferenceData[Prompt]:
    """`load_comparisons` for the rows that an environment plays: of any columns, each with itself as JSON for its
    prompt, which the environment's `reset` replaces.
    """

    def read(reader: RowReader, columns: Overrides, *, as_text: bool) -> tuple[list[Prompt], DataReport]:
        tasks, report = read_tasks(reader)
        return tasks, replace(report, unread_note="for the environment")

    return _load(data, source, read, seed=seed)


@reusable
def load_prompts_to_compare(data: PreferenceTextSection, source: str, *, seed: int) -> PreferenceData[Any]:
    """`load_prompts` for a policy whose own answers are compared: without a split. Validation examples are the
    comparisons of `validation_data`, if there are any.
    """
    unsplit = data.model_copy(update={"validation_data": None, "validation_split": None, "validation_share": 0.0})
    prompts = load_prompts(unsplit, source, seed=seed)
    if data.validation_data is None:
        return prompts
    compared = load_comparisons(unsplit, data.validation_data, seed=seed)
    summary = [*prompts.summary, *(f"validation: {data.validation_data}, {line}" for line in compared.summary)]
    return PreferenceData(prompts.train, compared.train, summary, [*prompts.reports, *compared.reports])


def _load(data: PreferenceTextSection, source: str, read: _Read[ExampleT], *, seed: int) -> PreferenceData[ExampleT]:
    columns: Overrides = {str(role): column for role, column in data.columns.items()}

    def examples(reader: RowReader) -> tuple[list[ExampleT], DataReport]:
        return read(reader, columns, as_text=data.chat_template == "none")

    train: list[ExampleT]
    report: DataReport
    train, report = examples(opened(data, source, data.training_split))
    summary, reports = [*report.notes, report.summary()], [report]
    validation: list[ExampleT] = []
    own = validation_source(data, source)
    if own is not None:
        validation, validation_report = examples(opened(data, *own))
        summary.append(f"validation: {own[0]}, {validation_report.summary()}")
        reports.append(validation_report)
    elif data.validation_share > 0:
        keys = [key_of_prompt(example) for example in train]
        split = split_off(keys, data.validation_share, seed, by=data.split_by, source=source)
        train, validation = [train[row] for row in split.train], [train[row] for row in split.validation]
        summary.append(split.summary)
    summary += repeats_summary(train, validation)
    return PreferenceData(train, validation, summary, reports)
