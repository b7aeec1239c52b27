"""Log-probabilities of chosen tokens, with their gradient, without the logits of a whole row.

Enters: hidden states at the positions that predict the tokens, the output embedding, the tokens. Leaves: a
log-probability for each, and the entropy of its distribution. The logits of a chunk of rows are made twice, forward and
backward, and never kept.
Letters: M positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loopos.functional.gradient_sum import gradient_sum
from loopos.functional.language_loss import CHUNK, LogitShape


def _chunks(num_rows: int) -> Iterator[slice]:
    for first in range(0, num_rows, CHUNK):
        yield slice(first, first + CHUNK)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor, shape: LogitShape, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        for rows in _chunks(len(targets)):
            logits = shape(hidden[rows] @ embedding.t()).div_(temperature)
            logits -= logits.logsumexp(-1, keepdim=True)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0]
            entropies[rows] = -(logits.exp() * logits).sum(-1)
        ctx.save_for_backward(hidden, embedding, targets, entropies)
        ctx.shape, ctx.temperature = shape, temperature
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, embedding, targets, entropies = ctx.saved_tensors
        wants_hidden, wants_embedding = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        buffer = gradient_sum(embedding) if wants_embedding else None
        d_embedding = None
        if buffer is not None:
            d_embedding = buffer()
        elif wants_embedding:
            d_embedding = torch.zeros(embedding.shape, dtype=torch.float32, device=hidden.device)
        with_entropy = bool(d_entropies.count_nonzero())
        for rows in _chunks(len(targets)):
            states, share = hidden[rows], d_logprobs[rows, None]
            logits = ctx.shape(states @ embedding.t())
            scaled = logits / ctx.temperature
            scaled -= scaled.logsumexp(-1, keepdim=True)
            probabilities = scaled.exp()
            # d log p_y / d z = (one at y) − p;   d H / d z_j = −p_j·(log p_j + H)
            d_logits = probabilities * -share
            d_logits.scatter_add_(1, targets[rows, None], share)
            if with_entropy:
                d_logits -= probabilities * (scaled + entropies[rows, None]) * d_entropies[rows, None]
            d_products = ctx.shape.backward(logits, d_logits.div_(ctx.temperature)).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_products, embedding, out=d_hidden[rows])
            if d_embedding is not None:
                d_embedding += d_products.t() @ states
        returned = None if d_embedding is None or buffer is not None else d_embedding.to(embedding.dtype)
        return d_hidden, returned, None, None, None


def token_logprobs(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    shape: LogitShape = LogitShape(),
) -> tuple[Tensor, Tensor]:
    """log softmax(z_i / τ)_{t_i} and the entropy −Σ p·log p of softmax(z_i / τ), with z_i = shape(E·h_i), in nats.

    hidden `[M, d]`, embedding E `[V, d]`, targets t `[M]` int64, temperature τ → two of `[M]` in fp32.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLogprobs.apply
    return apply(hidden, embedding, targets, shape, temperature)
