"""Tokenize segments of text, each by itself.

A segment that begins a text gets the special tokens that the tokenizer adds there, one that closes a text gets the end
token, unless they are already there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.record import shown
from loopos.data.templates import Segment, end_token
from loopos.data.tokens import TextBound, spans

# Texts put before an inner segment, for tokenizers that add a blank at every beginning.
_ANCHORS = ("\n", "a", ".")
_PROBE = "b"


class SegmentTokenizer:
    """Tokenizes pieces in few calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `UserError` where the tokenizer has no end token."""
        self.tokenizer, self.end = tokenizer, end_token(tokenizer)
        self.leading = _leading(tokenizer)
        self._bound = TextBound(tokenizer)
        spelled = "".join(tokenizer.convert_ids_to_tokens(self._ids([_PROBE])[0]))
        self._marks_beginnings = spelled != _PROBE and spelled.endswith(_PROBE)

    def bounded(self, row: Sequence[Segment], num_tokens: int | None) -> Sequence[Segment]:
        """The row itself, or one whose far too long pieces are their beginnings, each of more than `num_tokens` tokens:
        those first in it are the same.
        """
        texts = [self._bound.beginning(segment.text, num_tokens) for segment in row]
        if all(len(text) == len(segment.text) for text, segment in zip(texts, row, strict=True)):
            return row
        return [replace(segment, text=text) for text, segment in zip(texts, row, strict=True)]

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """The ids of each piece of each row."""
        flat = [(segment, index > 0) for row in rows for index, segment in enumerate(row)]
        ids = iter(self._plain_ids([(segment.text, inside) for segment, inside in flat]))
        return [[self._finished(segment, next(ids)) for segment in row] for row in rows]

    def _finished(self, segment: Segment, ids: list[int]) -> list[int]:
        if segment.begins and ids[: len(self.leading)] != self.leading:
            ids = [*self.leading, *ids]
        if segment.closes and ids[-1:] != [self.end]:
            ids = [*ids, self.end]
        return ids

    def _plain_ids(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of (text, whether it is inside a longer text)."""
        plain = self._ids([text for text, _ in texts])
        if self._marks_beginnings:
            for index, (text, inside) in enumerate(texts):
                if inside and text:
                    plain[index] = self._inner_ids(text)
        return plain

    def _inner_ids(self, text: str) -> list[int]:
        """The ids of a text that does not begin anything: what it adds to those of an anchor before it."""
        for anchor in _ANCHORS:
            before, both = self._ids([anchor, anchor + text])
            if both[: len(before)] == before:
                return both[len(before) :]
        raise UserError(
            f"the tokenizer merges the text {shown(text)} with the text before it, so that prompt and answer "
            "have no clear boundary; choose another tokenizer in data.tokenizer"
        )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for first, last in spans([len(text) for text in texts], len(texts)):
            chunk = list(texts[first:last])
            batch = self.tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids += batch["input_ids"]
        return ids


def _leading(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself."""
    whole: list[int] = tokenizer(_PROBE)["input_ids"]
    bare: list[int] = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    assert starts, "a tokenizer that changes a text when it adds special tokens"
    return whole[: starts[0]]
