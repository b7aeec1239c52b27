"""The comparisons and prompts of a run: rows read, columns found, validation rows set apart, tokens made.

Enters: the `data` section of a method that learns from preferences. Leaves: training and validation examples, and a
`PreferenceEncoder` that makes tokens by the section's rules. Left out: templates and tokens themselves (`templates`,
`preference_tokens`), batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from loopos.config.preferences import PreferenceTextSection
from loopos.data.format_detection import Overrides
from loopos.data.preference_tokens import EncodedComparison, PreferenceReport, encode_comparisons, encode_prompts
from loopos.data.preferences import Comparison, read_comparisons
from loopos.data.prompts import Prompt, read_prompts, told
from loopos.data.reading import FormatReport, account, opened, validation_source
from loopos.data.repeats import key_of_prompt, told_repeats
from loopos.data.rows import RowReader
from loopos.data.split import split_off
from loopos.data.templates import ChatTemplate

ExampleT = TypeVar("ExampleT", Comparison, Prompt)
_Read = Callable[..., tuple[list[ExampleT], FormatReport]]


@dataclass(frozen=True)
class PreferenceData(Generic[ExampleT]):
    """Training and validation examples. `said`: what was decided, a sentence each; `reports`: the account of each
    source.
    """

    train: list[ExampleT]
    validation: list[ExampleT]
    said: list[str]
    reports: list[FormatReport]


def load_comparisons(data: PreferenceTextSection, source: str, *, seed: int) -> PreferenceData[Comparison]:
    """Reads the comparisons to train on and to validate on: their own file, their own split of a hub id, or a seeded
    share of the training rows. Raises `DataError`.
    """
    return _load(data, source, read_comparisons, seed=seed)


def load_prompts(data: PreferenceTextSection, source: str, *, seed: int) -> PreferenceData[Prompt]:
    """`load_comparisons` for the prompts that a policy answers."""
    return _load(data, source, read_prompts, seed=seed)


def _load(data: PreferenceTextSection, source: str, read: _Read[ExampleT], *, seed: int) -> PreferenceData[ExampleT]:
    columns: Overrides = {str(role): column for role, column in data.columns.items()}

    def examples(reader: RowReader) -> tuple[list[ExampleT], FormatReport]:
        return read(reader, columns, as_text=data.chat_template == "none")

    train: list[ExampleT]
    report: FormatReport
    train, report = examples(opened(data, source, data.training_split))
    said, reports = [*report.said, account(report)], [report]
    validation: list[ExampleT] = []
    own = validation_source(data, source)
    if own is not None:
        validation, validation_report = examples(opened(data, *own))
        said.append(f"validation: {own[0]}, {account(validation_report)}")
        reports.append(validation_report)
    elif data.validation_share > 0:
        keys = [key_of_prompt(example) for example in train]
        split = split_off(keys, data.validation_share, seed, by=data.split_by, source=source)
        train, validation = [train[place] for place in split.train], [train[place] for place in split.validation]
        said.append(split.said)
    said += told_repeats(train, validation)
    return PreferenceData(train, validation, said, reports)


class Origin(NamedTuple):
    """What a prompt was made from: its `text` as the file has it, and the file and line."""

    text: str
    place: str


class PreferenceEncoder:
    """Makes the tokens of comparisons and prompts as a config says: by which template, how long."""

    def __init__(
        self, data: PreferenceTextSection, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
    ) -> None:
        """Raises `UserError` for a tokenizer without an end token, and a template that cannot render a question."""
        self.data, self.tokenizer, self.max_length = data, tokenizer, max_length
        # "none" leaves strings as they stand; messages still need a template, the tokenizer's own.
        chosen = "auto" if data.chat_template == "none" else data.chat_template
        self.template = ChatTemplate(tokenizer, chosen)
        self.words: dict[tuple[int, ...], Origin] = {}
        """What was asked, by the ids of each prompt that was tokenised."""

    def comparisons(self, examples: Sequence[Comparison]) -> tuple[list[EncodedComparison], PreferenceReport]:
        """Raises `DataError` as `encode_comparisons`."""
        data = self.data
        return encode_comparisons(
            self.tokenizer,
            examples,
            template=self.template,
            max_length=self.max_length,
            over_length=data.over_length,
            max_dropped_share=data.max_dropped_share,
            on_bad_row=data.on_bad_row,
        )

    def prompts(self, examples: Sequence[Prompt]) -> tuple[list[list[int]], PreferenceReport]:
        """Raises `DataError` as `encode_prompts`."""
        data = self.data
        ids, report = encode_prompts(
            self.tokenizer,
            examples,
            template=self.template,
            max_length=self.max_length,
            over_length=data.over_length,
            max_dropped_share=data.max_dropped_share,
            on_bad_row=data.on_bad_row,
        )
        for tokens, place in zip(ids, report.places, strict=True):
            self.words[tuple(tokens)] = Origin(told(examples[place].prompt), examples[place].row.where)
        return ids, report
