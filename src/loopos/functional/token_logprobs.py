"""Log-probabilities of chosen tokens, with their gradient, without the logits of a whole row.

Enters: hidden states at the positions that predict the tokens, the output embedding, the tokens. Leaves: a
log-probability for each, and the entropy of its distribution. The logits of a chunk of rows are made and dropped; where
the embedding trains, they are made once more for the backward pass, else their gradient is kept as one of states.
Letters: M positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loopos.functional.gradient_sum import gradient_sum
from loopos.functional.language_loss import CHUNK, LogitShape, blocks, normalised


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
        wants_hidden, wants_embedding = ctx.needs_input_grad[:2]
        # d logprob / d hidden, a row each: all that the backward pass of a frozen embedding needs.
        slopes = torch.empty_like(hidden) if wants_hidden and not wants_embedding else None
        for rows in _chunks(len(targets)):
            products, chosen = hidden[rows] @ embedding.t(), targets[rows, None]
            for part in blocks(products):
                logits = shape(products[part])
                scaled = logits / temperature if temperature != 1.0 else logits
                probabilities, log_normaliser = normalised(scaled)
                at = slice(rows.start + part.start, rows.start + part.stop)
                logprobs[at] = (scaled.gather(1, chosen[part]) - log_normaliser)[:, 0]
                entropies[at] = log_normaliser[:, 0] - torch.linalg.vecdot(probabilities, scaled)
                if slopes is not None:
                    one = torch.ones_like(log_normaliser)
                    d_logits = _d_logits(probabilities, chosen[part], one, temperature)
                    products[part] = shape.backward(logits, d_logits)
            if slopes is not None:
                torch.mm(products, embedding, out=slopes[rows])
        ctx.save_for_backward(hidden, embedding, targets, entropies, slopes)
        ctx.shape, ctx.temperature = shape, temperature
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, embedding, targets, entropies, slopes = ctx.saved_tensors
        with_entropy = bool(d_entropies.count_nonzero())
        if slopes is not None and not with_entropy:
            return slopes * d_logprobs[:, None].to(slopes.dtype), None, None, None, None
        wants_hidden, wants_embedding = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        buffer = gradient_sum(embedding) if wants_embedding else None
        d_embedding = None
        if buffer is not None:
            d_embedding = buffer()
        elif wants_embedding:
            d_embedding = torch.zeros(embedding.shape, dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(targets)):
            states, chosen, share = hidden[rows], targets[rows, None], d_logprobs[rows, None]
            products = states @ embedding.t()
            for part in blocks(products):
                logits = ctx.shape(products[part])
                scaled = logits / ctx.temperature if ctx.temperature != 1.0 else logits
                probabilities, log_normaliser = normalised(scaled)
                d_logits = _d_logits(probabilities, chosen[part], share[part], ctx.temperature)
                if with_entropy:
                    # d H / d z_j = −p_j·(log p_j + H)
                    at = slice(rows.start + part.start, rows.start + part.stop)
                    surprise = scaled - log_normaliser + entropies[at, None]
                    d_logits -= probabilities * surprise * (d_entropies[at, None] / ctx.temperature)
                products[part] = ctx.shape.backward(logits, d_logits)
            if d_hidden is not None:
                torch.mm(products, embedding, out=d_hidden[rows])
            if d_embedding is not None:
                d_embedding += products.t() @ states
        returned = None if d_embedding is None or buffer is not None else d_embedding.to(embedding.dtype)
        return d_hidden, returned, None, None, None


def _d_logits(probabilities: Tensor, chosen: Tensor, share: Tensor, temperature: float) -> Tensor:
    """d (share·log p_y) / d z = share·((one at y) − p) / τ, `[R, V]`; `chosen` y and `share` `[R, 1]`."""
    share = share / temperature
    return (probabilities * -share).scatter_add_(1, chosen, share)


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
