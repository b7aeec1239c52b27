"""Load the examples of a language model's run: rows, columns and validation split.

Neither torch nor transformers is imported: rows are checked before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loopos.config.chain_of_thought import ReasoningDataSection
from loopos.config.sft import SftDataSection
from loopos.data.conversations import ASSISTANT, Conversation, Message
from loopos.data.demonstrations import Demonstration
from loopos.data.read_ahead import reusable
from loopos.data.reading import DataReport, opened, validation_source
from loopos.data.repeats import key_of_prompt, repeats_summary
from loopos.data.split import split_off
from loopos.data.step_format import NAMED_FORMATS, StepFormat, chosen_format
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
def load_supervised(data: SftDataSection, *, seed: int) -> SupervisedData:
    """Reads the training rows and the validation rows: their own file, their own split of a hub id, or a seeded
    fraction of the training rows. Under sft problems become conversations (`_conversations`).

    Raises `DataError` for unreadable files, columns of no known format and bad rows (unless skipped).
    """
    step_format = chosen_format(data.step_format) if isinstance(data, ReasoningDataSection) else NAMED_FORMATS["think"]
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
    if not isinstance(data, ReasoningDataSection):
        has_steps = any(isinstance(example, Demonstration) and example.steps for example in train)
        train, validation = (_conversations(each, step_format, has_steps=has_steps) for each in (train, validation))
    return SupervisedData(step_format, train, validation, summary, reports)


def _conversations(examples: Sequence[Example], step_format: StepFormat, *, has_steps: bool) -> list[Example]:
    """The examples with each problem and its solution as a conversation of two turns. Where no row has steps, the
    answer is the whole response: an empty chain of thought before it would be learned too.
    """

    def conversation_of(example: Demonstration) -> Conversation:
        response = step_format.render(example.steps, example.answer) if has_steps else example.answer
        system = [Message("system", example.system)] if example.system is not None else []
        return Conversation((*system, Message("user", example.problem), Message(ASSISTANT, response)), example.row)

    return [conversation_of(each) if isinstance(each, Demonstration) else each for each in examples]
