"""The objectives of distillation as named sums: divergences of whole distributions, and the reverse KL of sampled
tokens. docs/metrics.md defines the names.

Letters: T tokens of a packed row, M trained tokens, d hidden size, V vocabulary, R rows of a block, K outcomes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.registry import loaded
from loopos.config.variants import LOSSES
from loopos.data.distillation_rows import DistillationBatch
from loopos.functional.distillation_loss import (
    DistillationLoss,
    DistillationSettings,
    Logits,
    TopLogprobs,
    sampled_reverse_kl,
)
from loopos.functional.language_loss import LogitShape, TokenLogprobs
from loopos.functional.packing import PackedLayout


class HiddenStates(Protocol):
    """(ids `[T]`, layout) → hidden states `[T, d]`."""

    def __call__(self, ids: Tensor, layout: PackedLayout) -> Tensor: ...


class Model(Protocol):
    """A language model as `models.language_model.LanguageModel`."""

    @property
    def backbone(self) -> HiddenStates: ...
    @property
    def output_embedding(self) -> Tensor: ...
    @property
    def shape(self) -> LogitShape: ...

    def logprobs(self, hidden: Tensor, targets: Tensor, *, temperature: float) -> TokenLogprobs: ...


REPORTED = ("forward_kl", "reverse_kl", "top_token_agreement", "student_entropy", "teacher_entropy", "nll")
OF_CANDIDATES = ("teacher_top_k_mass", "student_top_k_mass")


@dataclass(frozen=True)
class DistillationObjective:
    """A divergence from the teacher, the mean over the trained tokens of a step with their weights. One name: "loss";
    the others are reported. `teacher`: None where batches have its candidates.
    """

    student: Model
    teacher: Model | None
    loss_name: str
    beta: float = 0.5
    temperature: float = 1.0

    @cached_property
    def _loss(self) -> DistillationLoss:
        function, name = loaded(LOSSES[self.loss_name].function), self.loss_name

        def divergence(student: Tensor, teacher: Tensor, settings: DistillationSettings) -> Tensor:
            found = function(student, teacher, settings)
            if not isinstance(found, Tensor) or found.shape != student.shape[:1]:
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise UserError(
                    f'loss "{name}": its function returned {got}; expected {list(student.shape[:1])}, one number for '
                    "each token, not their sum or mean"
                )
            return found

        return DistillationLoss(divergence, DistillationSettings(self.beta), self.temperature)

    @property
    def weights(self) -> Mapping[str, float]:
        return {"loss": 1.0}

    def counts(self, batch: DistillationBatch) -> Mapping[str, float]:
        """The sum of the tokens' weights."""
        names = ("loss", *REPORTED, *(() if batch.top is None else OF_CANDIDATES))
        return dict.fromkeys(names, float(batch.weights.sum()))

    def loss(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        total, reported = self._loss(
            _logits(self.student, batch), self._teacher(batch), batch.ids[batch.targets], batch.weights
        )
        return {"loss": total, **reported}

    def idle(self, batch: DistillationBatch) -> Tensor:
        return self.loss(batch)["loss"] * 0.0

    @torch.no_grad()
    def _teacher(self, batch: DistillationBatch) -> Logits | TopLogprobs:
        if self.teacher is None:
            assert batch.top is not None, "without a teacher rows have its candidates"
            return batch.top
        return _logits(self.teacher, batch)


@dataclass(frozen=True)
class SampledObjective:
    """`sampled_reverse_kl`, the mean over the tokens of a step that the student wrote. One name: "loss"; the others are
    reported, "reverse_kl" as the mean of log p(y) − log q(y).
    """

    student: Model
    teacher: Model
    temperature: float = 1.0

    @property
    def weights(self) -> Mapping[str, float]:
        return {"loss": 1.0}

    def counts(self, batch: DistillationBatch) -> Mapping[str, float]:
        names = ("loss", "reverse_kl", "student_entropy", "teacher_entropy", "ratio")
        return dict.fromkeys(names, float(batch.weights.sum()))

    def loss(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        assert batch.sampled_logprobs is not None, "every row was sampled"
        student = self._logprobs(self.student, batch)
        with torch.no_grad():
            teacher = self._logprobs(self.teacher, batch)
        each = sampled_reverse_kl(student.logprobs, batch.sampled_logprobs, teacher.logprobs)
        logprobs = student.logprobs.detach()
        reported = {
            "reverse_kl": logprobs - teacher.logprobs,
            "student_entropy": student.entropies.detach(),
            "teacher_entropy": teacher.entropies,
            "ratio": (logprobs - batch.sampled_logprobs).exp(),
        }
        return {
            "loss": torch.dot(each, batch.weights),
            **{name: torch.dot(values, batch.weights) for name, values in reported.items()},
        }

    def idle(self, batch: DistillationBatch) -> Tensor:
        return self._logprobs(self.student, batch).logprobs.sum() * 0.0

    def _logprobs(self, model: Model, batch: DistillationBatch) -> TokenLogprobs:
        hidden = model.backbone(batch.ids, batch.layout)[batch.targets - 1]
        return model.logprobs(hidden, batch.ids[batch.targets], temperature=self.temperature)


def _logits(model: Model, batch: DistillationBatch) -> Logits:
    hidden = model.backbone(batch.ids, batch.layout)[batch.targets - 1]
    return Logits(hidden, model.output_embedding, model.shape)
