"""The loss of a task's head, as named sums: classes, labels that may come together, or a value.

Enters: a batch with targets, and a model that gives outputs `[N, C]`. Leaves: the sum and the count of "loss". Left
out: the model, and dividing (`update.py`).
Letters: N sequences, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loopos.config.sections import ModelSection
from loopos.data.batches import Batch
from loopos.data.targets import Targets
from loopos.functional import losses
from loopos.functional.packing import PackedLayout


@dataclass(frozen=True)
class TaskObjective:
    """Cross-entropy, binary cross-entropy, or (on standardised targets) squared or Huber error. One name: "loss"."""

    model: Callable[[Tensor, PackedLayout, Tensor | None], Tensor]
    task: str
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    regression_loss: str = "mse"
    huber_delta: float = 1.0

    @property
    def weights(self) -> Mapping[str, float]:
        return {"loss": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, float]:
        assert batch.targets is not None
        return {"loss": self.count_of(batch.targets)}

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        assert batch.targets is not None
        return {"loss": self.sum_of(self.model(batch.ids, batch.layout, batch.token_types), batch.targets)}

    def idle(self, batch: Batch) -> Tensor:
        return self.model(batch.ids, batch.layout, batch.token_types).sum() * 0.0

    def sum_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over outputs `[N, C]`; targets `[N]` or, with several labels, `[N, C]`."""
        if self.task == "classification":
            weights = self.class_weights.to(outputs.device) if self.class_weights is not None else None
            return losses.cross_entropy_sum(
                outputs, targets, class_weights=weights, label_smoothing=self.label_smoothing
            )
        if self.task == "multi_label":
            return losses.binary_cross_entropy_sum(outputs, targets)
        if self.regression_loss == "huber":
            return losses.huber_sum(outputs[:, 0], targets, delta=self.huber_delta)
        return losses.squared_error_sum(outputs[:, 0], targets)

    def count_of(self, targets: Tensor) -> float:
        """What `sum_of` is divided by: the weight of the rows' classes, or the number of targets."""
        if self.task == "classification" and self.class_weights is not None:
            return losses.class_weight_sum(targets, self.class_weights.to(targets.device))
        return float(targets.numel())

    def mean_of(self, outputs: Tensor, targets: Tensor) -> float:
        """The loss of outputs that are there already, as training would report it."""
        return float(self.sum_of(outputs, targets)) / self.count_of(targets)


def task_objective(
    model: Callable[[Tensor, PackedLayout, Tensor | None], Tensor],
    section: ModelSection,
    task: str,
    targets: Targets,
    num_outputs: int,
) -> TaskObjective:
    """The objective that a config's `model` section asks for; "balanced" class weights come from the training rows."""
    weights = None
    if section.class_weights == "balanced":
        weights = balanced_weights(targets.train, num_outputs)
    elif section.class_weights is not None:
        weights = torch.tensor(section.class_weights)
    return TaskObjective(model, task, weights, section.label_smoothing, section.regression_loss, section.huber_delta)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weight N / (C·n_c) of each class c with n_c of the N rows, so that every class weighs alike (King and Zeng 2001).

    labels `[N]` → `[C]`. A class without a row gets N / C; no row asks for it.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * counts.clamp_min(1))).float()
