"""Load the labeled data of a run: rows, columns, label space and validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loopos.config.diagnostics import ConfigError, DataError, Diagnostic
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.sections import DataSection, ModelSection
from loopos.data.formats import Labeled, read_labeled
from loopos.data.labels import LabelSpace, infer_task
from loopos.data.read_ahead import reusable
from loopos.data.reading import DataReport, opened, validation_source
from loopos.data.record import SKIP_ROWS, BadRows
from loopos.data.repeats import key_of_prompt, repeats_summary
from loopos.data.split import split_off

Target = int | float | list[int]


@dataclass(frozen=True)
class LabeledData:
    """Training and validation examples with their encoded labels. `summary`: notes on what was
    decided; `reports`: the counts of each source.
    """

    space: LabelSpace
    train: list[Labeled]
    train_targets: list[Target]
    validation: list[Labeled]
    validation_targets: list[Target]
    summary: list[str]
    reports: list[DataReport]


@reusable
def load_labeled(data: DataSection, model: ModelSection, *, seed: int) -> LabeledData:
    """Reads `data.training_data` and the validation rows: their own file, their own split of a hub id, or a seeded
    stratified fraction of the training rows.

    Raises `DataError` for unreadable files, bad rows (unless skipped), labels that contradict the config or each other.
    """
    examples, report = read_labeled(opened(data, data.training_data, data.training_split), data.columns)
    names = model.labels or (report.class_names if model.task in (None, "classification") else None) or None
    space = infer_task(
        examples,
        model.task,
        model.num_classes,
        names,
        column=report.columns.get("label", "label"),
        on_bad_row=data.on_bad_row,
    )
    examples, targets, report = encode_all(space, examples, report, on_bad_row=data.on_bad_row)
    summary, reports = [*report.notes, space.summary, report.summary()], [report]
    held_out: list[Labeled] = []
    held_out_targets: list[Target] = []
    own = validation_source(data, data.training_data)
    if own is not None:
        held_out, held_out_report = read_labeled(opened(data, *own), data.columns)
        held_out, held_out_targets, held_out_report = encode_all(
            space, held_out, held_out_report, on_bad_row=data.on_bad_row
        )
        summary.append(f"validation: {own[0]}, {held_out_report.summary()}")
        reports.append(held_out_report)
    elif data.validation_share > 0:
        split = split_off(
            [key_of_prompt(example) for example in examples],
            data.validation_share,
            seed,
            by=data.split_by,
            what="text",
            labels=targets,  # type: ignore[arg-type]
            source=data.training_data,
        )
        held_out, held_out_targets = [examples[i] for i in split.validation], [targets[i] for i in split.validation]
        examples, targets = [examples[i] for i in split.train], [targets[i] for i in split.train]
        summary.append(split.summary)
    summary += repeats_summary(examples, held_out, "text")
    return LabeledData(space, examples, targets, held_out, held_out_targets, summary, reports)


def check_for_task(config: FineTuningConfig, space: LabelSpace) -> None:
    """Raises `ConfigError` for keys that contradict what the labels turned out to be."""
    model = config.model.model_copy(update={"task": space.task, "num_classes": space.num_outputs})
    problems = f"the labels of {config.data.training_data} say task: {space.task}, {space.num_outputs} outputs"
    diagnostics = [
        Diagnostic("config", None, None, problem.fields[0], problem.actual, problem.expected, problems)
        for problem in config.model_copy(update={"model": model}).check()
    ]
    if diagnostics:
        raise ConfigError(diagnostics)


def encode_all(
    space: LabelSpace, examples: Sequence[Labeled], report: DataReport, *, on_bad_row: str
) -> tuple[list[Labeled], list[Target], DataReport]:
    """The label of every example in the space's numbers; the examples and the account with those dropped whose label
    the space does not hold.

    Raises `DataError` with diagnostics of all such labels, unless `on_bad_row` is "skip".
    """
    kept_rows: list[Labeled] = []
    targets: list[Target] = []
    diagnostics: list[Diagnostic] = []
    for example in examples:
        try:
            targets.append(space.encode(example.label, example.row, report.columns.get("label", "label")))
        except DataError as problem:
            diagnostics += problem.diagnostics
        else:
            kept_rows.append(example)
    if diagnostics and (on_bad_row == "error" or not kept_rows):
        raise BadRows(diagnostics, len(diagnostics), "correct these labels", SKIP_ROWS)
    if diagnostics:
        reason = "label is not a number" if space.task == "regression" else "label is not a known class"
        dropped = {**report.dropped, reason: len(diagnostics)}
        report = replace(report, used=len(kept_rows), dropped=dropped, diagnostics=[*report.diagnostics, *diagnostics])
    return kept_rows, targets, report
