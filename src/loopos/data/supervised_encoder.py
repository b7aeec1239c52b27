"""Examples of a language model's run → tokens, by the rules of the config.

Enters: the `data` section of chain-of-thought training, its step format and the tokenizer. Leaves: a
`SupervisedEncoder`. Left out: rows (`supervised`), templates and tokens themselves (`templates`, `supervised_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from loopos.config.chain_of_thought import ReasoningDataSection
from loopos.data.step_format import StepFormat
from loopos.data.supervised_rows import Example
from loopos.data.supervised_tokens import Supervised, SupervisedReport, encode_supervised
from loopos.data.templates import ChatTemplate


class SupervisedEncoder:
    """Makes the tokens of examples as a config says: by which template and step format, what is learned, how long."""

    def __init__(
        self,
        data: ReasoningDataSection,
        step_format: StepFormat,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None,
    ) -> None:
        """Raises `UserError` for a tokenizer without an end token, and a template that cannot render a question."""
        self.data, self.step_format, self.tokenizer, self.max_length = data, step_format, tokenizer, max_length
        self.template = ChatTemplate(tokenizer, data.chat_template)

    def __call__(self, examples: Sequence[Example]) -> tuple[list[Supervised], SupervisedReport]:
        """Raises `DataError` as `encode_supervised`."""
        return encode_supervised(
            self.tokenizer,
            examples,
            step_format=self.step_format,
            train_on=self.data.train_on,
            max_length=self.max_length,
            over_length=self.data.over_length,
            max_dropped_share=self.data.max_dropped_share,
            on_bad_row=self.data.on_bad_row,
            template=self.template,
        )
