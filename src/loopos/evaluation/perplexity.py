"""Perplexity and bits per byte of a language model on running text, over a sliding window.

Every token except the first counts once, whatever the stride. Rows of examples: `training.language_objective`.
Letters: T tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.functional.packing import PackedLayout
from loopos.models.language_ensemble import LanguageEnsemble, next_token_loss, positions_of

WINDOW = 1024


@dataclass(frozen=True, slots=True)
class TextLoss:
    """`nats`: Σ −log p over the `tokens` predicted; `num_bytes`: those of their text in UTF-8. `context`: the minimum
    number of tokens before a token in its window, except at the beginning of the text.
    """

    nats: float
    tokens: int
    num_bytes: int
    window: int
    stride: int

    @property
    def loss(self) -> float:
        """Mean over the tokens, nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Σ −log₂ p over bytes: comparable between tokenizers (Gao et al. 2020, The Pile, section 3.1)."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def context(self) -> int:
        return self.window - self.stride

    def to_dict(self) -> dict[str, float | int]:
        """All values by name."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "window": self.window,
            "stride": self.stride,
        }


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, counted from) of each window over T tokens: ids[first:last] are the input, and the tokens from
    `counted from` on are new in this window. Token 0 is only context.
    """
    counted = 1
    for first in range(0, tokens, stride):
        last = min(first + window, tokens)
        if counted < last:
            yield first, last, counted
        counted = last
        if last == tokens:
            return


@torch.no_grad()
def text_loss(
    model: PreTrainedModel | LanguageEnsemble,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    note: Callable[[int, int], None] = lambda completed, total: None,
) -> TextLoss:
    """−log p of every token of a text, with up to `window` tokens of context, in steps of `stride`.

    A begin token that the tokenizer adds is context; without one the first token of the text has no context, and
    neither it nor its bytes count. window: default 1024, or the model's positions if fewer; stride: default half of it.
    note: takes the numbers of finished tokens and of all. Raises `UserError` for a window over the positions, a stride
    over the window, or a text of fewer than two tokens.
    """
    window, stride = _checked(model, window, stride)
    begin: list[int] = _leading(tokenizer)
    batch = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    own: list[int] = batch["input_ids"]
    ids = torch.tensor([*begin, *own], device=model.device)
    if len(ids) < 2:
        raise UserError(f"got a text of {len(own)} tokens; expected 2 or more: one to predict another")
    num_bytes = len(text.encode()) if begin else len(text.encode()) - _bytes_of_first(tokenizer, text, own)
    language_model = next_token_loss(model)
    nats, counted = 0.0, 0
    for first, last, start in windows(len(ids), window, stride):
        part = ids[first:last]
        weights = torch.zeros(len(part), device=model.device)
        weights[start - first :] = 1.0
        nats += float(language_model(part, PackedLayout((len(part),), model.device), weights))
        counted += last - start
        note(last, len(ids))
    return TextLoss(nats, counted, num_bytes, window, stride)


def _checked(model: PreTrainedModel | LanguageEnsemble, window: int | None, stride: int | None) -> tuple[int, int]:
    positions = positions_of(model)
    chosen = window if window is not None else min(WINDOW, positions or WINDOW)
    step = stride if stride is not None else max(1, chosen // 2)
    if chosen < 2 or (positions is not None and chosen > positions):
        expected = f"2 to {positions}, the model's positions" if positions is not None else "2 or more"
        raise UserError(f"window: got {chosen} tokens; expected {expected}")
    # A stride as wide as the window would leave the first token of each window without context.
    if not 1 <= step < chosen:
        raise UserError(f"stride: got {step} tokens; expected 1 to {chosen - 1}, below the window")
    return chosen, step


def _leading(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token, if the tokenizer adds it to a text."""
    begun: list[int] = tokenizer("a")["input_ids"][:1]
    return begun if tokenizer.bos_token_id is not None and begun == [tokenizer.bos_token_id] else []


def _bytes_of_first(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> int:
    """Bytes of the text before its second token. A slow tokenizer has no offsets: there the first token is decoded."""
    if not tokenizer.is_fast:
        return len(str(tokenizer.decode(ids[:1])).encode())
    # Only the beginning, so that the offsets of a long text are not stored.
    offsets = tokenizer(text[:4096], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return len(text[: offsets[1][0]].encode()) if len(offsets) > 1 else 0
