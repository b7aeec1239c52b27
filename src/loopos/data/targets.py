"""Encoded labels as tensors for the loss.

Letters: N examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopos.config.keys import TargetScaling
from loopos.data.labeled import LabeledData, Target


@dataclass(frozen=True)
class Targets:
    """Class numbers `[N]`, multi-hot `[N, C]`, or values `[N]` scaled by the training rows: a value in the user's unit
    is mean + std·output.
    """

    train: Tensor
    validation: Tensor
    mean: float = 0.0
    std: float = 1.0


def targets_of(data: LabeledData, *, scaling: TargetScaling = "auto") -> Targets:
    """The targets of training and validation rows, by `data.space.task`. scaling: what values are scaled to, as
    `model.target_scaling` says.
    """
    train, validation = data.train_targets, data.validation_targets
    if data.space.task == "classification":
        return Targets(torch.tensor(train, dtype=torch.int64), torch.tensor(validation, dtype=torch.int64))
    if data.space.task == "multi_label":
        return Targets(torch.tensor(train, dtype=torch.float32), torch.tensor(validation, dtype=torch.float32))
    values = torch.tensor(train, dtype=torch.float64)
    mean, std = float(values.mean()), float(values.std(unbiased=False))
    if scaling == "auto":
        # A head without bias, which transformers' own classifiers have, learns values around 0 as well as others.
        scaling = "scale" if abs(mean) <= std else "standardize"
    mean = mean if scaling == "standardize" else 0.0
    # Training rows may all have one value where validation rows differ.
    std = std if std > 0 and scaling != "none" else 1.0
    return Targets(_scaled(train, mean, std), _scaled(validation, mean, std), mean, std)


def _scaled(values: Sequence[Target], mean: float, std: float) -> Tensor:
    """In fp64 until the end: large values with small differences keep them."""
    return ((torch.tensor(values, dtype=torch.float64) - mean) / std).float()
