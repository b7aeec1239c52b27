"""Cross-entropy and log-probabilities of a language model without materializing the `[M, V]` logits.

Logits are computed for chunks of rows and dropped. Where the embedding trains, log-probabilities recompute them for the
backward pass; otherwise their gradient is kept as one of hidden states.
Letters: M trained positions, d hidden size, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from loopos.functional.reductions import gradient_sum

# Rows per product with the output embedding, and rows processed in fp32 at once: few enough that their logits stay in
# the CPU cache.
CHUNK = 512
_BLOCK = 32


@dataclass(frozen=True)
class LogitShape:
    """How a model computes logits from E·h: z = scale · E·h, then, with a soft cap c, c · tanh(z / c)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """E·h → logits in fp32; in place if the input is fp32."""
        logits = products.float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """d loss / d(E·h) from d loss / d logits, in place of `gradient`."""
        if self.softcap is not None:
            # d (c·tanh(z/c)) / dz = 1 − tanh²(z/c)
            gradient = gradient.mul_(1 - (logits / self.softcap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def blocks(products: Tensor) -> Iterator[slice]:
    """Slices of a chunk's products `[R, V]` to process at once: few rows on a CPU, all rows on other devices."""
    size = _BLOCK if products.device.type == "cpu" else max(1, len(products))
    for first in range(0, len(products), size):
        yield slice(first, min(first + size, len(products)))


def softmax_and_normalizer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(z) `[R, V]` and logsumexp(z) `[R, 1]`, computed as z_top − log p_top (the largest p is never small)."""
    probabilities = torch.softmax(logits, -1)
    top = logits.amax(-1, keepdim=True)
    return probabilities, top - probabilities.amax(-1, keepdim=True).log()


BlockLoss: TypeAlias = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(rows within the chunk, their logits `[R, V]` fp32, whether gradients are needed) → the sum of the rows' losses,
and d sum / d logits, in memory of its own, or None where no gradients are needed.
"""


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; the full `[M, V]` logits never exist.

    The gradient of the output embedding is summed in fp32, whatever its dtype, and added to the embedding's gradient
    sum if it has one.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embedding: Tensor, losses: Callable[[slice], BlockLoss], shape: LogitShape
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_hidden, wants_embedding = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_embedding = (
            torch.zeros(embedding.shape, dtype=torch.float32, device=hidden.device) if wants_embedding else None
        )
        for rows in _chunks(len(hidden)):
            states, loss = hidden[rows], losses(rows)
            products = states @ embedding.t()
            for part in blocks(products):
                logits = shape(products[part])
                found, d_logits = loss(part, logits, wants_hidden or wants_embedding)
                total += found
                if d_logits is not None:
                    products[part] = shape.backward(logits, d_logits)
            if d_hidden is not None:
                torch.mm(products, embedding, out=d_hidden[rows])
            if d_embedding is not None:
                d_embedding += products.t() @ states
        ctx.save_for_backward(*(gradient for gradient in (d_hidden, d_embedding) if gradient is not None))
        ctx.wants, ctx.embedding_dtype = (wants_hidden, wants_embedding), embedding.dtype
        ctx.buffer = gradient_sum(embedding) if wants_embedding else None
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_hidden = d_embedding = None
        if ctx.wants[0]:
            states = saved.pop(0)
            d_hidden = states * gradient.to(states.dtype)
        if ctx.buffer is not None:
            ctx.buffer().addcmul_(saved.pop(0), gradient)
        elif ctx.wants[1]:
            d_embedding = (saved.pop(0) * gradient).to(ctx.embedding_dtype)
        return d_hidden, d_embedding, None, None


def chunked_loss_sum(
    hidden: Tensor, embedding: Tensor, losses: Callable[[slice], BlockLoss], *, shape: LogitShape = LogitShape()
) -> Tensor:
    """The sum of losses of logits z_i = shape(E·h_i), for any loss of single rows, as a scalar in fp32.

    hidden `[M, d]`, embedding E `[V, d]`. losses: rows of a chunk → the loss of parts of it.
    """
    apply: Callable[..., Tensor] = _ChunkedLoss.apply
    return apply(hidden, embedding, losses, shape)


def next_token_loss_sum(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    shape: LogitShape = LogitShape(),
) -> Tensor:
    """Σ_i w_i·(logsumexp(z_i) − z_i,t_i) with z_i = shape(E·h_i): the weighted negative log-likelihood of the next
    tokens, in nats.

    hidden `[M, d]`, embedding E `[V, d]`, targets t `[M]` int64, weights w `[M]` (1 where None) → scalar in fp32.
    """
    if weights is None:
        weights = torch.ones(len(targets), dtype=torch.float32, device=hidden.device)
    factors = weights.float()

    def losses(rows: slice) -> BlockLoss:
        chosen, weight = targets[rows, None], factors[rows, None]

        def loss(part: slice, logits: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
            probabilities, log_normalizer = softmax_and_normalizer(logits)
            total = ((log_normalizer - logits.gather(1, chosen[part])) * weight[part]).sum()
            if not wants_gradient:
                return total, None
            # d loss / d logits = weight · (softmax − one at the target)
            return total, (probabilities * weight[part]).scatter_add_(1, chosen[part], -weight[part])

        return loss

    return chunked_loss_sum(hidden, embedding, losses, shape=shape)


def _chunks(num_rows: int) -> Iterator[slice]:
    for first in range(0, num_rows, CHUNK):
        yield slice(first, first + CHUNK)


class TokenLogprobs(NamedTuple):
    """Log-probabilities of tokens, and of their distributions p the entropies −Σ p·log p and, where asked for, the
    collision log-probabilities log Σ p² (two draws are the same token), `[M]` fp32, nats. The last has no gradient.
    """

    logprobs: Tensor
    entropies: Tensor
    collisions: Tensor | None = None


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        embedding: Tensor,
        targets: Tensor,
        shape: LogitShape,
        temperature: float,
        wants_collisions: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        collisions = torch.empty_like(logprobs) if wants_collisions else None
        wants_hidden, wants_embedding = ctx.needs_input_grad[:2]
        # d logprob / d hidden, one row each: all that backward needs for a frozen embedding.
        slopes = torch.empty_like(hidden) if wants_hidden and not wants_embedding else None
        for rows in _chunks(len(targets)):
            products, chosen = hidden[rows] @ embedding.t(), targets[rows, None]
            for part in blocks(products):
                logits = shape(products[part])
                scaled = logits / temperature if temperature != 1.0 else logits
                probabilities, log_normalizer = softmax_and_normalizer(scaled)
                span = slice(rows.start + part.start, rows.start + part.stop)
                logprobs[span] = (scaled.gather(1, chosen[part]) - log_normalizer)[:, 0]
                entropies[span] = log_normalizer[:, 0] - torch.linalg.vecdot(probabilities, scaled)
                if collisions is not None:
                    collisions[span] = torch.linalg.vecdot(probabilities, probabilities).log()
                if slopes is not None:
                    one = torch.ones_like(log_normalizer)
                    d_logits = _d_logits(probabilities, chosen[part], one, temperature)
                    products[part] = shape.backward(logits, d_logits)
            if slopes is not None:
                torch.mm(products, embedding, out=slopes[rows])
        ctx.save_for_backward(hidden, embedding, targets, entropies, slopes)
        ctx.shape, ctx.temperature = shape, temperature
        if collisions is not None:
            ctx.mark_non_differentiable(collisions)
        return logprobs, entropies, collisions

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, embedding, targets, entropies, slopes = ctx.saved_tensors
        with_entropy = bool(d_entropies.count_nonzero())
        if slopes is not None and not with_entropy:
            return slopes * d_logprobs[:, None].to(slopes.dtype), None, None, None, None, None
        wants_hidden, wants_embedding = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        buffer = gradient_sum(embedding) if wants_embedding else None
        d_embedding = None
        if buffer is not None:
            d_embedding = buffer()
        elif wants_embedding:
            d_embedding = torch.zeros(embedding.shape, dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(targets)):
            states, chosen, weight = hidden[rows], targets[rows, None], d_logprobs[rows, None]
            products = states @ embedding.t()
            for part in blocks(products):
                logits = ctx.shape(products[part])
                scaled = logits / ctx.temperature if ctx.temperature != 1.0 else logits
                probabilities, log_normalizer = softmax_and_normalizer(scaled)
                d_logits = _d_logits(probabilities, chosen[part], weight[part], ctx.temperature)
                if with_entropy:
                    # d H / d z_j = −p_j·(log p_j + H)
                    span = slice(rows.start + part.start, rows.start + part.stop)
                    surprise = scaled - log_normalizer + entropies[span, None]
                    d_logits -= probabilities * surprise * (d_entropies[span, None] / ctx.temperature)
                products[part] = ctx.shape.backward(logits, d_logits)
            if d_hidden is not None:
                torch.mm(products, embedding, out=d_hidden[rows])
            if d_embedding is not None:
                d_embedding += products.t() @ states
        returned = None if d_embedding is None or buffer is not None else d_embedding.to(embedding.dtype)
        return d_hidden, returned, None, None, None, None


def _d_logits(probabilities: Tensor, chosen: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """d (w·log p_y) / d z = w·(onehot(y) − p) / τ, `[R, V]`; `chosen` y and `weight` w `[R, 1]`."""
    weight = weight / temperature
    return (probabilities * -weight).scatter_add_(1, chosen, weight)


def token_logprobs(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    shape: LogitShape = LogitShape(),
    collisions: bool = False,
) -> TokenLogprobs:
    """log softmax(z_i / τ)_{t_i} and the entropy −Σ p·log p of softmax(z_i / τ), with z_i = shape(E·h_i), in nats.

    hidden `[M, d]`, embedding E `[V, d]`, targets t `[M]` int64, temperature τ → `[M]` each, in fp32. collisions: also
    log Σ p².
    """
    apply: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = _ChunkedLogprobs.apply
    return TokenLogprobs(*apply(hidden, embedding, targets, shape, temperature, collisions))
