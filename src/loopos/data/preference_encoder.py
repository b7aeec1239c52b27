"""Comparisons and prompts → tokens, by the rules of the config.

Enters: the `data` section of a method that learns from preferences, and the tokenizer. Leaves: a `PreferenceEncoder`.
Left out: rows (`preference_data`), templates and tokens themselves (`templates`, `preference_tokens`), batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from loopos.config.preferences import PreferenceTextSection
from loopos.data.preference_tokens import EncodedComparison, PreferenceReport, encode_comparisons, encode_prompts
from loopos.data.preferences import Comparison
from loopos.data.prompts import Prompt, told
from loopos.data.templates import ChatTemplate


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
