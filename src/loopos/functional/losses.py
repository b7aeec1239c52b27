"""Losses as sums, never means: only `training.update` divides, by the count of the whole step.

Apart from `training.objectives`, which calls them by name: pure functions of tensors.
Letters: N sequences, C classes or outputs. All arithmetic in fp32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy_sum(
    logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of classes: Σ_i w_{y_i}·(−log softmax(logits_i)_{y_i}), with uniform label smoothing ε as in
    Szegedy et al. 2016 (section 7).

    logits `[N, C]`, labels `[N]` int64, class_weights `[C]` → scalar. Its count is `class_weight_sum`.
    """
    return F.cross_entropy(
        logits.float(), labels, weight=class_weights, label_smoothing=label_smoothing, reduction="sum"
    )


def class_weight_sum(labels: Tensor, class_weights: Tensor | None) -> float:
    """The count of `cross_entropy_sum`: Σ_i w_{y_i}, or N without weights. labels `[N]`."""
    return float(len(labels)) if class_weights is None else float(class_weights[labels].sum())


def binary_cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of labels: Σ −[y·log σ(x) + (1−y)·log(1−σ(x))] over all rows and labels. logits and targets
    `[N, C]` → scalar; its count is N·C.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum")


def squared_error_sum(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared error: Σ (prediction − target)². Both `[N, C]` → scalar; its count is N·C."""
    return F.mse_loss(predictions.float(), targets.float(), reduction="sum")


def huber_sum(predictions: Tensor, targets: Tensor, *, delta: float) -> Tensor:
    """Huber's loss: Σ of ½e² where |e| ≤ δ, else δ·(|e| − ½δ) (Huber 1964). Both `[N, C]` → scalar; its count is
    N·C.
    """
    return F.huber_loss(predictions.float(), targets.float(), delta=delta, reduction="sum")
