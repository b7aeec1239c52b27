"""Logits → token: penalties, filters, and the draw. Pure functions of tensors, with the definitions and order of
transformers' logits processors.

Each completion has its own stream of uniform numbers, computed from seed, prompt, sample number and draw number without
state: the same seed and prompt give the same numbers in any batch.
Letters: B rows, V tokens of the vocabulary, S columns of the history, n of an n-gram.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.generation.settings import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


def stream_key(seed: int, prompt: Sequence[int], sample: int) -> int:
    """A 64-bit key of this completion's stream. `sample` counts the completions with the same seed and prompt."""
    digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=8, key=b"prompt")
    digest.update(f"{seed} {sample}".encode())
    return int.from_bytes(digest.digest(), "little")


def uniforms(keys: Sequence[int], draws: Sequence[int]) -> Tensor:
    """The uniform numbers in [0, 1) of these streams at these draws, `[B]` float64 with 53 random bits.

    SplitMix64 (Steele et al. 2014) in counter form: mix(key + draw · golden ratio).
    """
    mixed = np.asarray(keys, dtype=np.uint64) + np.asarray(draws, dtype=np.uint64) * np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


_NEVER = float("-inf")
# Two levels of the inverse distribution function: the mass of blocks, then the tokens of one block.
_BLOCK = 256
# A nucleus rarely has more tokens than this; if it does, all tokens are sorted.
_NUCLEUS = 1024


class NonFiniteLogits(UserError):
    """The model's logits contain NaN, or infinities that leave no token to choose."""


@dataclass(frozen=True)
class History:
    """The tokens before the next one, padded on the right.

    `tokens` `[B, S]` int64. `lengths` `[B]`: number of real tokens. `prompt_lengths` `[B]`: number of prompt tokens.
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device) -> History:
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        longest = max(len(row) for row in rows)
        return History(
            torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device),
            torch.tensor([len(row) for row in rows], device=device),
            torch.tensor([len(prompt) for prompt in prompts], device=device),
        )

    def counts(self) -> Tensor:
        """`[B, S]` bool, True = a real token."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)[None] < self.lengths[:, None]

    def generated(self) -> Tensor:
        """`[B, S]` bool, True = a token of the completion."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        return (columns >= self.prompt_lengths[:, None]) & (columns < self.lengths[:, None])


@dataclass(frozen=True)
class Choice:
    """`tokens` `[B]`. `logprobs` `[B]` under softmax(logits / temperature), before penalties and filters (temperature 1
    if greedy); None if not requested. `filtered_logprobs` `[B]` under the sampled distribution; None if it is the same
    or the choice was greedy.
    """

    tokens: Tensor
    logprobs: Tensor | None
    filtered_logprobs: Tensor | None


def choose(
    logits: Tensor,
    settings: SamplingParams,
    *,
    history: History | None,
    uniforms: Tensor | None,
    with_logprobs: bool,
    allowed: Tensor | None = None,
) -> Choice:
    """The next token of every row. logits `[B, V]`; uniforms `[B]` float64 in [0, 1), None if greedy; allowed `[B, V]`
    bool, True = may be chosen, None for all tokens. Raises `NonFiniteLogits`.
    """
    # Cast first: argmax of half precision is slower than of fp32.
    logits = logits.float()
    shaped = penalized(logits, settings, history) if settings.shaped else logits
    if allowed is not None:
        shaped = shaped.masked_fill(~allowed, _NEVER)
    if settings.greedy:
        tokens = shaped.argmax(-1)
        _check_finite(shaped, tokens)
        return Choice(tokens, logprob_of(logits, tokens) if with_logprobs else None, None)
    assert uniforms is not None
    probabilities = torch.softmax(filtered(shaped / settings.temperature, settings), -1)
    _check_finite(probabilities, tokens := draw(probabilities, uniforms))
    if not with_logprobs:
        return Choice(tokens, None, None)
    drawn_from = probabilities.gather(1, tokens[:, None])[:, 0].log()
    if not settings.shaped:
        return Choice(tokens, drawn_from, None)
    return Choice(tokens, logprob_of(logits / settings.temperature, tokens), drawn_from)


def _check_finite(values: Tensor, tokens: Tensor) -> None:
    """Raises `NonFiniteLogits` if a chosen value is not finite: one NaN makes the maximum and every probability of a
    row NaN.
    """
    if not bool(values.gather(1, tokens[:, None]).isfinite().all()):
        raise NonFiniteLogits(
            "the model's logits are not finite: its weights contain NaN or infinities, they overflow this number "
            "format, or the settings forbid every token"
        )


def logprob_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token], `[B]`."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u, `[B]`: inverse transform sampling.

    probabilities `[B, V]`, need not sum to 1; uniforms `[B]` float64 in [0, 1). No token of probability 0 is drawn.
    """
    size = probabilities.shape[1]
    if size % _BLOCK:
        probabilities = F.pad(probabilities, (0, _BLOCK - size % _BLOCK))
    blocks = probabilities.view(len(probabilities), -1, _BLOCK)
    mass = blocks.sum(-1).double().cumsum(-1)
    target = uniforms[:, None] * mass[:, -1:]
    block = torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[1] - 1)
    before = F.pad(mass, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(-1)
    # The block's own sum differs from its mass by rounding: the target stays below it.
    below = torch.minimum(target - before, inside[:, -1:] * (1 - 2**-40)).clamp_(min=0)
    return (block * _BLOCK + torch.searchsorted(inside, below, right=True))[:, 0].clamp_(max=size - 1)


def penalized(logits: Tensor, settings: SamplingParams, history: History | None) -> Tensor:
    """Bias, repetition, presence and frequency penalties and forbidden n-grams, in this order, `[B, V]`."""
    if settings.logit_bias:
        logits = with_bias(logits, settings.logit_bias)
    if not settings.needs_history:
        return logits
    assert history is not None
    if settings.repetition_penalty != 1:
        logits = with_repetition_penalty(logits, history, settings.repetition_penalty)
    if settings.presence_penalty or settings.frequency_penalty:
        logits = with_count_penalties(
            logits, history, presence=settings.presence_penalty, frequency=settings.frequency_penalty
        )
    if settings.no_repeat_ngram:
        logits = without_repeated_ngrams(logits, history, settings.no_repeat_ngram)
    return logits


def filtered(logits: Tensor, settings: SamplingParams) -> Tensor:
    """Logits `[B, V]` (after temperature) with filtered tokens at −inf: top-k, top-p, min-p, typical, in this order,
    each applied to the result of the previous one.
    """
    if settings.top_k:
        logits = only_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = only_top_p(logits, settings.top_p)
    if settings.min_p:
        logits = only_min_p(logits, settings.min_p)
    if settings.typical_p < 1:
        logits = only_typical(logits, settings.typical_p)
    return logits


def with_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Adds the bias to the logits of its tokens."""
    indices = torch.tensor(list(bias), device=logits.device)
    values = torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype)
    return logits.index_add(1, indices, values.expand(len(logits), -1))


def with_repetition_penalty(logits: Tensor, history: History, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of tokens that already occur (Keskar et al. 2019, CTRL)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    counts = history.counts()
    seen[counts.nonzero(as_tuple=True)[0], history.tokens[counts]] = True
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def with_count_penalties(logits: Tensor, history: History, *, presence: float, frequency: float) -> Tensor:
    """logit − count · frequency − [count > 0] · presence, counts over the completion (the OpenAI API's definition)."""
    counts = torch.zeros_like(logits).scatter_add_(1, history.tokens, history.generated().to(logits.dtype))
    return logits - counts * frequency - (counts > 0) * presence


def without_repeated_ngrams(logits: Tensor, history: History, n: int) -> Tensor:
    """−inf for every token that would repeat an n-gram of the row."""
    if history.tokens.shape[1] < n:
        return logits
    windows = history.tokens.unfold(1, n, 1)  # [B, S - n + 1, n]
    ends = torch.arange(windows.shape[1], device=logits.device)[None] + n
    last = history.lengths[:, None] + torch.arange(1 - n, 0, device=logits.device)[None]  # [B, n - 1]
    suffix = history.tokens.gather(1, last.clamp(min=0))
    repeats = (windows[..., :-1] == suffix[:, None]).all(-1) & (ends <= history.lengths[:, None])
    logits = logits.clone()
    logits[repeats.nonzero(as_tuple=True)[0], windows[..., -1][repeats]] = _NEVER
    return logits


def only_top_k(logits: Tensor, k: int) -> Tensor:
    """The k most likely tokens, and those that tie with the k-th (Fan et al. 2018)."""
    kth = logits.topk(min(k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < kth, _NEVER)


def only_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest most likely tokens whose probability reaches p (Holtzman et al. 2020)."""
    total = logits.logsumexp(-1, keepdim=True)
    values, indices = logits.topk(min(_NUCLEUS, logits.shape[1]))
    probabilities = (values - total).exp()
    if values.shape[1] < logits.shape[1] and bool((probabilities.sum(-1) < p).any()):
        values, indices = logits.sort(-1, descending=True)
        probabilities = (values - total).exp()
    before = probabilities.cumsum(-1) - probabilities
    allowed = before < p
    allowed[:, 0] = True
    return torch.full_like(logits, _NEVER).scatter_(1, indices, values.masked_fill(~allowed, _NEVER))


def only_min_p(logits: Tensor, ratio: float) -> Tensor:
    """Tokens at least `ratio` times as likely as the most likely one (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(ratio), _NEVER)


def only_typical(logits: Tensor, p: float) -> Tensor:
    """Tokens whose surprisal is closest to the entropy, until their probability reaches p (Meister et al. 2022)."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distance, indices = (-logprobs - entropy).abs().sort(-1)
    cumulative = logprobs.gather(1, indices).exp().cumsum(-1)
    last = (cumulative < p).sum(-1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    left_out = distance > distance.gather(1, last)
    left_out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(left_out).scatter_(1, indices, left_out), _NEVER)
