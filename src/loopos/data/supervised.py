"""Load the examples of a language model's run: rows, columns and validation split.

Neither torch nor transformers is imported: rows are checked before them.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopos.config.chain_of_thought import ReasoningDataSection
from loopos.data.read_ahead import reusable
from loopos.data.reading import DataReport, opened, validation_source
from loopos.data.repeats import key_of_prompt, repeats_summary
from loopos.data.split import split_off
from loopos.data.step_format import StepFormat, chosen_format
from loopos.data.supervised_rows import Example, read_supervised


@dataclass(frozen=True)
class SupervisedData:
    """Training and validation examples, and the format that their chains are written in. `summary`: notes on what
    was decided; `reports`: the counts of each source.
    """

    step_format: StepFormat
    train: list[Example]
    validation: list[Example]
    summary: list[str]
    reports: list[DataReport]


@reusable
def load_supervised(data: ReasoningDataSection, *, seed: int) -> SupervisedData:
    """Reads the training rows and the validation rows: their own file, their own split of a hub id, or a seeded
    fraction of the training rows.

    Raises `DataError` for unreadable files, columns of no known format and bad rows (unless skipped).
    """
    step_format = chosen_format(data.step_format)
    columns = {str(role): column for role, column in data.columns.items()}
    reader = opened(data, data.source, data.training_split)
    train, report = read_supervised(reader, columns, step_format=step_format)
    summary, reports = [*report.notes, report.summary()], [report]
    validation: list[Example] = []
    own = validation_source(data, data.source)
    if own is not None:
        validation, validation_report = read_supervised(opened(data, *own), columns, step_format=step_format)
        summary.append(f"validation: {own[0]}, {validation_report.summary()}")
        reports.append(validation_report)
    elif data.validation_share > 0:
        keys = [key_of_prompt(example) for example in train]
        split = split_off(keys, data.validation_share, seed, by=data.split_by, source=data.source)
        train, validation = [train[row] for row in split.train], [train[row] for row in split.validation]
        summary.append(split.summary)
    summary += repeats_summary(train, validation)
    return SupervisedData(step_format, train, validation, summary, reports)
