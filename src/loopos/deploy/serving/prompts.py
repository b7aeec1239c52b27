"""Messages and texts → tokens, beside the event loop.

Enters: what requests ask. Leaves: the ids that generation starts from, made by the code that training makes them with.
Left out: whether they fit (`language.py`).
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from loopos.data.conversations import Message
from loopos.data.rows import Row
from loopos.data.supervised_rows import Completion as RawText
from loopos.data.supervised_tokens import prompt_tokens
from loopos.data.templates import ChatTemplate, TemplateRefusal
from loopos.deploy.serving.errors import ApiError

Result = TypeVar("Result")


class Prompts:
    """A chat template and a tokenizer with a thread of their own: tokenizers are not made for two threads, and the
    model's thread uses the engine's.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = copy.deepcopy(template)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._template.tokenizer

    async def of_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the next turn starts from. Raises `ApiError` for what the template refuses."""
        return await self.run(self._of_chat, messages)

    async def of_texts(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        """The ids of texts that go on, as `loopos generate --raw` makes them; lists of ids stay as they are."""
        return await self.run(self._of_texts, inputs)

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """What a function that uses the tokenizer returns or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _of_chat(self, messages: Sequence[Message]) -> list[int]:
        try:
            return prompt_tokens(self.tokenizer, messages, template=self._template)
        except TemplateRefusal as refusal:
            raise ApiError(400, f"messages: {refusal}", param="messages", code="invalid_value") from refusal

    def _of_texts(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        return [
            prompt_tokens(self.tokenizer, RawText(each, "", Row({}, "request", None, 0)), template=self._template)
            if isinstance(each, str)
            else each
            for each in inputs
        ]
