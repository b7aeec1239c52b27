"""Completions in OpenAI's JSON: whole, and as the chunks of a stream.

Enters: completions or their tokens. Leaves: dictionaries for JSON. Pure: no model, no HTTP.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from loopos.generation.completions import Completion, Piece
from loopos.generation.text import GrowingText, decoded


def finish(reason: str | None) -> str | None:
    """OpenAI's word for the end of a completion."""
    if reason is None:
        return None
    return "length" if reason == "length" else "stop"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Each prompt counts once, however many completions it has; the token that ends a completion counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class Form:
    """How one request is answered. `n`: completions of each prompt, which number the choices."""

    kind: Literal["chat", "text"]
    model: str
    n: int
    logprobs: bool
    includes_usage: bool
    tokenizer: PreTrainedTokenizerBase
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completions: Sequence[Completion], prompt_tokens: int) -> dict[str, Any]:
        """The answer to a request without a stream."""
        made = sum(len(completion.token_ids) for completion in completions)
        choices = [self._choice(completion) for completion in completions]
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._frame(kind, choices), "usage": usage(prompt_tokens, made)}

    def opening(self, number: int) -> list[dict[str, Any]]:
        """What stands before the first token of each of `number` choices: in a chat, who speaks."""
        if self.kind == "text":
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(place, {"delta": delta}, None, None) for place in range(number)]

    def chunks(self, piece: Piece, offset: int) -> list[dict[str, Any]]:
        """The chunks of one token: what it says, if anything, and behind the last one, without words, why it was the
        last. offset: characters of the choice's text before it.
        """
        index, found = self._index(piece), []
        is_told = self.logprobs and piece.finish_reason != "stop token"
        if piece.text or is_told:
            logprobs = self._logprobs([piece.token], [piece.logprob], [offset]) if is_told else None
            found.append(self._chunk(index, self._said(piece.text), logprobs, None))
        if piece.finish_reason is not None:
            found.append(self._chunk(index, self._said(""), None, finish(piece.finish_reason)))
        return found

    def _said(self, text: str) -> dict[str, Any]:
        """What a chunk says."""
        if self.kind == "text":
            return {"text": text}
        return {"delta": {"content": text} if text else {}}

    def last(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The chunk without choices that tells the usage."""
        return {**self._frame(self._chunk_kind, []), "usage": usage(prompt_tokens, completion_tokens)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _index(self, made: Piece | Completion) -> int:
        return made.prompt_index * self.n + made.sample_index

    def _choice(self, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            ended = completion.finish_reason == "stop token"
            tokens = completion.token_ids[: -1 if ended else None]
            text = GrowingText(self.tokenizer)
            for token in tokens:
                text.add(token)
            logprobs = self._logprobs(tokens, completion.logprobs[: len(tokens)], [0, *text.ends][: len(tokens)])
        said: dict[str, Any] = {"text": completion.text}
        if self.kind == "chat":
            said = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
        reason = finish(completion.finish_reason)
        return {"index": self._index(completion), **said, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(
        self, index: int, said: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        frame = self._frame(self._chunk_kind, [choice])
        return {**frame, "usage": None} if self.includes_usage else frame

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[float], offsets: Sequence[int]) -> dict[str, Any]:
        texts = [decoded(self.tokenizer, [token]) for token in tokens]
        if self.kind == "text":
            return {
                "tokens": texts,
                "token_logprobs": list(logprobs),
                "top_logprobs": None,
                "text_offset": list(offsets),
            }
        content = [
            # Bytes that are no whole character have no text, and so no bytes that could be told.
            {
                "token": text,
                "logprob": logprob,
                "bytes": None if "\ufffd" in text else list(text.encode("utf-8")),
                "top_logprobs": [],
            }
            for text, logprob in zip(texts, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}
