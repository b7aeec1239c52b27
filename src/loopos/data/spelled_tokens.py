"""Encode prompts whose messages spell control tokens, such as `<|im_end|>`: as text, never as the control token.

Otherwise a user, or a page that a tool found, could end its own turn and write one of another role. The assistant's
messages are the model's own, and their step markers may be control tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import replace

from loopos.data.conversations import ASSISTANT, Message
from loopos.data.piece_tokens import SegmentTokenizer
from loopos.data.record import shown
from loopos.data.template_checks import TemplateRefusal
from loopos.data.templates import ChatTemplate, Segment
from loopos.data.tool_schemas import Tool


class SpelledTokens:
    """A template and its tokenizer, with control tokens in texts set apart."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._encoder = SegmentTokenizer(template.tokenizer)
        tokens = template.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in tokens if token.special} | set(template.tokenizer.all_special_tokens)
        spelled = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
        self._control = re.compile(f"({spelled})" if spelled else r"(?!)()")
        # Nobody can forge the placeholders, because the mark is random.
        self._mark = secrets.token_hex(8)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The ids that the next turn starts from. Raises `TemplateRefusal`."""
        others = [number for number, message in enumerate(messages) if message.role != ASSISTANT]
        texts, spelled = self.hidden([messages[number].content for number in others])
        hidden = list(messages)
        for number, text in zip(others, texts, strict=True):
            hidden[number] = replace(messages[number], content=text)
        try:
            return self.encode(self._template.prompt(hidden, tools), spelled)
        except TemplateRefusal as refusal:
            if spelled and self._mark in str(refusal):
                raise _changed(spelled) from refusal
            raise

    def hidden(self, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        """The texts with a placeholder for each control token that they spell, and these tokens in order."""
        spelled: list[str] = []

        def stand_in(found: re.Match[str]) -> str:
            spelled.append(found[0])
            return f"\ue000{self._mark}-{len(spelled) - 1}\ue001"

        return [self._control.sub(stand_in, text) for text in texts], spelled

    def encode(self, segments: Sequence[Segment], spelled: Sequence[str]) -> list[int]:
        """The ids of rendered segments, with the text of `spelled` for the placeholders. Raises `TemplateRefusal` where
        the template left one out.
        """
        # Every second part of a segment is the number of a spelled token.
        parts = [(segment, re.split(f"\ue000{self._mark}-([0-9]+)\ue001", segment.text)) for segment in segments]
        numbers = {int(number) for _, texts in parts for number in texts[1::2]}
        if len(numbers) < len(spelled):
            raise _changed(spelled)
        row = [
            Segment(
                "" if index % 2 else text,
                begins=segment.begins and index == 0,
                closes=segment.closes and index == len(texts) - 1,
            )
            for segment, texts in parts
            for index, text in enumerate(texts)
        ]
        (encoded,) = self._encoder.encode([row])
        flat = [(index, text) for _, texts in parts for index, text in enumerate(texts)]
        ids: list[int] = []
        for (index, text), tokens in zip(flat, encoded, strict=True):
            ids += self._as_text(spelled[int(text)]) if index % 2 else tokens
        return ids

    def _as_text(self, spelled: str) -> list[int]:
        """The ids of a control token's spelling, none of which is a control token. Raises `TemplateRefusal`."""
        tokenizer = self._template.tokenizer
        ids: list[int] = tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if set(ids) & set(tokenizer.all_special_ids):
            raise TemplateRefusal(f"the tokenizer cannot read {shown(spelled)}, a control token, as text")
        return ids


def _changed(spelled: Sequence[str]) -> TemplateRefusal:
    return TemplateRefusal(f"the chat template changes {shown(spelled[0])}, which a message holds as text")
