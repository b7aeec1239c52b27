"""Outputs of a task model over many examples, and their meaning: probabilities, values, metrics.

Letters: N examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.data.batches import PackedRows, in_step
from loopos.data.tokens import Encoded
from loopos.evaluation.metrics import classification_metrics, confusion_matrix, multi_label_metrics, regression_metrics
from loopos.models.heads import PooledModel

# Tokens of one forward pass without gradients: enough for efficient matrix products, few enough for small memory.
_TOKENS = 2048
Meaning: TypeAlias = NDArray[np.float64]
"""Probabilities `[N, C]`, or values `[N]` in the user's unit."""


class NonFiniteOutputs(UserError):
    """Outputs that are not finite numbers and so have no meaning."""

    exit_code = 1


def finite_scores(scores: Tensor, what: str = "responses") -> Tensor:
    """The raw scores `[N, k]` of a reward model. Raises `NonFiniteOutputs`, because a mean or rank of non-finite scores
    has no meaning. what: of which there are N.
    """
    if bad := int((~scores.isfinite().all(-1)).sum()):
        raise NonFiniteOutputs(
            f"the reward model's scores of {bad} of {len(scores)} {what} are not finite numbers; lower "
            "training.learning_rate if this is its training, use precision fp32 or other weights if it is trained"
        )
    return scores


@torch.no_grad()
def outputs_of(
    model: PooledModel, examples: Sequence[Encoded], device: torch.device, *, rank: int = 0, world: int = 1
) -> Tensor:
    """Logits or standardized predictions `[N, C]` in fp32 on CPU, in the order of `examples`. With several ranks each
    fills its part; the other rows are 0.
    """
    was_training = model.training
    model.eval()
    outputs = torch.zeros(len(examples), model.head.out_features)
    for batch, counts in in_step(PackedRows(examples, None, device), tokens=_TOKENS, rank=rank, world=world):
        found = model(batch.ids, batch.layout, batch.token_types).float().cpu()
        if counts:
            outputs[list(batch.rows)] = found
    model.train(was_training)
    return outputs


def interpret(task: str, outputs: Tensor, *, target_mean: float = 0.0, target_std: float = 1.0) -> Meaning:
    """The meaning of outputs `[N, C]`: probabilities `[N, C]` (softmax, or a sigmoid each), or values `[N]` in the
    user's unit: mean + std·output. Raises `NonFiniteOutputs`.
    """
    if bad := int((~outputs.isfinite().all(-1)).sum()):
        raise NonFiniteOutputs(
            f"the model's outputs for {bad} of {len(outputs)} rows are not finite: lower "
            "training.learning_rate if this is a run; use precision fp32 if it is a trained model"
        )
    if task == "classification":
        return torch.softmax(outputs.double(), -1).numpy()
    if task == "multi_label":
        return torch.sigmoid(outputs.double()).numpy()
    return (outputs[:, 0].double() * target_std + target_mean).numpy()


def measure(task: str, meaning: Meaning, targets: Sequence[Any], *, threshold: float = 0.5) -> dict[str, float]:
    """The task's metrics of `interpret`'s result and encoded targets."""
    if task == "classification":
        return classification_metrics(meaning, targets)
    if task == "multi_label":
        return multi_label_metrics(meaning, targets, threshold)
    return regression_metrics(meaning, targets)


def residual_points(meaning: Meaning, targets: Sequence[Any], most: int = 1000) -> dict[str, Any]:
    """`true` and `predicted` values of the first `most` rows, and `rows`, the number of all."""
    return {
        "rows": len(meaning),
        "true": [float(value) for value in targets[:most]],
        "predicted": meaning[:most].tolist(),
    }


def confusion(meaning: Meaning, targets: Sequence[int]) -> list[list[int]]:
    """Counts `[C, C]` of true class (row) and predicted class (column)."""
    matrix: list[list[int]] = confusion_matrix(targets, meaning.argmax(-1), meaning.shape[1]).tolist()
    return matrix
