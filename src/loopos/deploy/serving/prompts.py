"""Messages and texts → tokens, beside the event loop.

Enters: what requests ask. Leaves: the ids that generation starts from, made by the code that training makes them with,
but for control tokens in the words of users and of the system: text that spells one is text. Left out: whether the ids
fit (`language.py`).
"""

from __future__ import annotations

import asyncio
import copy
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from loopos.data.conversations import ASSISTANT, Message
from loopos.data.piece_tokens import PieceTokenizer
from loopos.data.record import shown
from loopos.data.rows import Row
from loopos.data.supervised_rows import Completion as RawText
from loopos.data.supervised_tokens import prompt_tokens
from loopos.data.templates import ChatTemplate, Piece, TemplateRefusal
from loopos.deploy.serving.errors import ApiError

Result = TypeVar("Result")


class Prompts:
    """A chat template and a tokenizer with a thread of their own: tokenizers are not made for two threads, and the
    model's thread uses the engine's.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = copy.deepcopy(template)
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in tokens if token.special} | set(self.tokenizer.all_special_tokens)
        spelled = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
        self._control = re.compile(f"({spelled})" if spelled else r"(?!)()")
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
            if any(message.role != ASSISTANT and self._control.search(message.content) for message in messages):
                return self._with_spelled_tokens(messages)
            return prompt_tokens(self.tokenizer, messages, template=self._template)
        except TemplateRefusal as refusal:
            raise ApiError(400, f"messages: {refusal}", param="messages", code="invalid_value") from refusal

    def _with_spelled_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The ids where users or the system spell control tokens: what they spell is tokenised apart, as text. The
        assistant's earlier words are the model's own, whose step markers may be control tokens.
        """
        # Nobody can write the stand-ins of a request whose mark he does not know.
        mark = secrets.token_hex(8)
        spelled: list[str] = []

        def stand_in(found: re.Match[str]) -> str:
            spelled.append(found[0])
            return f"\ue000{mark}-{len(spelled) - 1}\ue001"

        with_stand_ins = [
            each if each.role == ASSISTANT else replace(each, content=self._control.sub(stand_in, each.content))
            for each in messages
        ]
        changed = f"the chat template changes {shown(spelled[0])}, which a message holds as text"
        try:
            rendered = self._template.prompt(with_stand_ins)
        except TemplateRefusal as refusal:
            if mark in str(refusal):
                raise TemplateRefusal(changed) from refusal
            raise
        # Every second part of a piece is the number of a token.
        parts = [(piece, re.split(f"\ue000{mark}-([0-9]+)\ue001", piece.text)) for piece in rendered]
        numbers = {int(number) for _, texts in parts for number in texts[1::2]}
        if len(numbers) < len(spelled):
            raise TemplateRefusal(changed)
        row = [
            Piece(
                "" if place % 2 else text,
                begins=piece.begins and place == 0,
                closes=piece.closes and place == len(texts) - 1,
            )
            for piece, texts in parts
            for place, text in enumerate(texts)
        ]
        (encoded,) = PieceTokenizer(self.tokenizer).encode([row])
        flat = [(place, text) for _, texts in parts for place, text in enumerate(texts)]
        ids: list[int] = []
        for (place, text), tokens in zip(flat, encoded, strict=True):
            ids += self._as_text(spelled[int(text)]) if place % 2 else tokens
        return ids

    def _as_text(self, spelled: str) -> list[int]:
        """The ids of a control token's spelling that are no control tokens. Raises `TemplateRefusal`."""
        ids: list[int] = self.tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if set(ids) & set(self.tokenizer.all_special_ids):
            raise TemplateRefusal(f"the tokenizer cannot read {shown(spelled)}, a control token, as text")
        return ids

    def _of_texts(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        return [
            prompt_tokens(self.tokenizer, RawText(each, "", Row({}, "request", None, 0)), template=self._template)
            if isinstance(each, str)
            else each
            for each in inputs
        ]
