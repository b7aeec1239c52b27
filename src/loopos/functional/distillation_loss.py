"""Losses of distillation: how far a student's next-token distribution is from a teacher's.

A loss takes the log-probabilities of both over the same outcomes and returns one number per row;
`config.variants.LOSSES` names it, and the objective weighs, sums and `training.update` divides. Blocks of rows are
processed at once: neither model's `[M, V]` logits ever exist. Where only the teacher's k most likely tokens are known,
the outcomes are these tokens and the rest of the vocabulary as one, so a divergence is a lower bound of the whole one
(data processing).
Letters: M trained positions, d hidden size, V vocabulary, R rows of a block, K outcomes, p student, q teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from loopos.functional.language_loss import CHUNK, BlockLoss, LogitShape, blocks, chunked_loss_sum

# Stored log-probabilities are rounded, so that those of all likely tokens may add up to a little over 1.
_LEAST_REST = 1e-6


@dataclass(frozen=True, slots=True)
class DistillationSettings:
    """What the losses share. `beta`: the weight β of the teacher in the mixture of `jsd`."""

    beta: float = 0.5


def forward_kl(student: Tensor, teacher: Tensor, settings: DistillationSettings) -> Tensor:
    """KL(q ‖ p) = Σ q·(log q − log p): the student covers all that the teacher may say (Hinton et al. 2015).

    student log p, teacher log q `[R, K]` → `[R]`, nats.
    """
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor, settings: DistillationSettings) -> Tensor:
    """KL(p ‖ q) = Σ p·(log p − log q): the student says only what the teacher may say (Gu et al. 2023, MiniLLM).

    student log p, teacher log q `[R, K]` → `[R]`, nats.
    """
    return (student.exp() * (student - teacher)).sum(-1)


def jsd(student: Tensor, teacher: Tensor, settings: DistillationSettings) -> Tensor:
    """JSD(β) = β·KL(q ‖ m) + (1 − β)·KL(p ‖ m), m = β·q + (1 − β)·p (GKD: Agarwal et al. 2024, equation 1).

    student log p, teacher log q `[R, K]` → `[R]`, nats.
    """
    beta = student.new_tensor(settings.beta)
    mixture = torch.logaddexp(teacher + beta.log(), student + torch.log1p(-beta))
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    return settings.beta * of_teacher + (1.0 - settings.beta) * (student.exp() * (student - mixture)).sum(-1)


def sampled_reverse_kl(logprobs: Tensor, sampled_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Reverse KL on the student's own tokens y as a policy gradient: −A·ρ, the advantage A = log q(y) − log p_old(y) of
    each token and ρ = p(y) / p_old(y) (on-policy distillation: Thinking Machines 2025).

    logprobs log p(y) with gradient; sampled_logprobs log p_old(y), of the student that wrote them; teacher_logprobs
    log q(y). All `[M]` → `[M]`.
    """
    sampled = sampled_logprobs.float()
    advantages = (teacher_logprobs.float() - sampled).detach()
    # e^80 is close to the fp32 maximum.
    return -advantages * (logprobs.float() - sampled).clamp(max=80.0).exp()


Divergence: TypeAlias = Callable[[Tensor, Tensor, DistillationSettings], Tensor]


@dataclass(frozen=True)
class Logits:
    """What a model's logits are computed from: hidden states `[M, d]`, output embedding `[V, d]` and shape."""

    hidden: Tensor
    embedding: Tensor
    shape: LogitShape = LogitShape()


@dataclass(frozen=True)
class TopLogprobs:
    """The teacher's most likely tokens at each position: `ids` int64 and `logprobs` fp32, `[M, k]`, nats."""

    ids: Tensor
    logprobs: Tensor


@torch.no_grad()
def top_logprobs(states: Logits, k: int) -> TopLogprobs:
    """The k most likely tokens at each position, most likely first, with their log-probabilities: `[M, k]` each."""
    ids, logprobs = [], []
    for first in range(0, len(states.hidden), CHUNK):
        products = states.hidden[first : first + CHUNK] @ states.embedding.t()
        for part in blocks(products):
            top = torch.log_softmax(states.shape(products[part]), -1).topk(k)
            ids.append(top.indices)
            logprobs.append(top.values)
    return TopLogprobs(torch.cat(ids), torch.cat(logprobs))


@dataclass
class TokenSums:
    """Σ over the positions, each times its weight; nats. `values`: name → scalar, as docs/metrics.md defines them."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, weights: Tensor, **of_rows: Tensor) -> None:
        """Adds numbers of rows, `[R]` each."""
        for name, numbers in of_rows.items():
            found = torch.dot(numbers.float(), weights)
            self.values[name] = self.values[name] + found if name in self.values else found


@dataclass(frozen=True)
class DistillationLoss:
    """Σ_i w_i·D(p_i, q_i) over M positions, and what is reported beside it. `temperature` τ divides both models'
    logits; the loss is not multiplied by τ².
    """

    divergence: Divergence
    settings: DistillationSettings = DistillationSettings()
    temperature: float = 1.0

    def __call__(
        self, student: Logits, teacher: Logits | TopLogprobs, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, with gradient, and the sums of `TokenSums` without. targets: the tokens that follow, int64 `[M]`;
        weights `[M]` fp32. The teacher gets no gradient. Where the two vocabularies are padded to different sizes, the
        probabilities are those of the smaller one.
        """
        sums = TokenSums()
        size = len(student.embedding)
        if isinstance(teacher, Logits):
            size = min(size, len(teacher.embedding))

        def losses(rows: slice) -> BlockLoss:
            known = self._teacher(teacher, rows, size)
            chosen, weight = targets[rows], weights[rows]

            def loss(part: slice, logits: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
                leaf = logits[:, :size].detach().requires_grad_(wants_gradient)
                with torch.set_grad_enabled(wants_gradient):
                    whole = torch.log_softmax(leaf / self.temperature if self.temperature != 1.0 else leaf, -1)
                    log_q, ids = known(part)
                    log_p = whole if ids is None else _with_rest(whole, ids)
                    each = self.divergence(log_p, log_q, self.settings)
                    total = torch.dot(each, weight[part])
                self._report(sums, whole, log_p, log_q, ids, chosen[part], weight[part], logits[:, :size])
                if not wants_gradient:
                    return total.detach(), None
                (slope,) = torch.autograd.grad(total, leaf)
                if size < logits.shape[1]:
                    slope = torch.cat([slope, slope.new_zeros(len(slope), logits.shape[1] - size)], 1)
                return total.detach(), slope

            return loss

        total = chunked_loss_sum(student.hidden, student.embedding, losses, shape=student.shape)
        return total, sums.values

    @torch.no_grad()
    def _teacher(
        self, teacher: Logits | TopLogprobs, rows: slice, size: int
    ) -> Callable[[slice], tuple[Tensor, Tensor | None]]:
        """For parts of a chunk's rows, log q `[R, K]` and the ids of its first outcomes, None for the vocabulary."""
        if isinstance(teacher, TopLogprobs):
            ids, logprobs = teacher.ids[rows], teacher.logprobs[rows]
            if ids.shape[1] < size:
                rest = (1.0 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(_LEAST_REST).log()
                logprobs = torch.cat([logprobs, rest], -1)
            return lambda part: (logprobs[part], ids[part])
        products = teacher.hidden[rows] @ teacher.embedding.t()

        def known(part: slice) -> tuple[Tensor, None]:
            logits = teacher.shape(products[part])[:, :size]
            return torch.log_softmax(logits / self.temperature if self.temperature != 1.0 else logits, -1), None

        return known

    @torch.no_grad()
    def _report(
        self,
        sums: TokenSums,
        whole: Tensor,
        log_p: Tensor,
        log_q: Tensor,
        ids: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        logits: Tensor,
    ) -> None:
        """Adds what is reported of a block. whole: log p over the vocabulary; log_p, log_q: over the outcomes."""
        whole, log_p = whole.detach(), log_p.detach()
        p, q, every = log_p.exp(), log_q.exp(), whole.exp()
        student_entropy, teacher_entropy = -torch.linalg.vecdot(p, log_p), -torch.linalg.vecdot(q, log_q)
        unscaled = whole if self.temperature == 1.0 else torch.log_softmax(logits, -1)
        top = (
            log_q.argmax(-1) if ids is None else ids.gather(1, log_q[:, : ids.shape[1]].argmax(-1, keepdim=True))[:, 0]
        )
        sums.add(
            weights,
            forward_kl=-teacher_entropy - torch.linalg.vecdot(q, log_p),
            reverse_kl=-student_entropy - torch.linalg.vecdot(p, log_q),
            top_token_agreement=(whole.argmax(-1) == top).float(),
            student_entropy=student_entropy if ids is None else -torch.linalg.vecdot(every, whole),
            teacher_entropy=teacher_entropy,
            nll=-unscaled.gather(1, targets[:, None])[:, 0],
        )
        if ids is not None:
            k = ids.shape[1]
            sums.add(weights, teacher_top_k_mass=q[:, :k].sum(-1), student_top_k_mass=p[:, :k].sum(-1))


def _with_rest(logprobs: Tensor, ids: Tensor) -> Tensor:
    """log p of the tokens `ids` `[R, k]`, and of all others together: `[R, V]` → `[R, k + 1]`, or `[R, k]` where there
    are no others.
    """
    chosen = logprobs.gather(1, ids)
    if ids.shape[1] == logprobs.shape[1]:
        return chosen
    others = logprobs.scatter(1, ids, float("-inf"))
    return torch.cat([chosen, others.logsumexp(-1, keepdim=True)], -1)
