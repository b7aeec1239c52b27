"""Combines predictions of several models, measures their disagreement, and fits the weights of a mixture.

Weights are non-negative, sum to 1 and minimize a convex loss. They are found by a barrier method (Boyd and Vandenberghe
2004, sections 11.3 and 10.2): for growing t, Newton's method minimizes t·f(w) − Σ log w under Σ w = 1. The result is
checked by the gap ⟨∇f, w⟩ − min ∇f, which bounds how far f(w) is above the minimum of a convex f (Jaggi 2013, section
2). Letters: M or N rows, K members, C classes or labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopos.evaluation.outputs import Meaning, interpret
from loopos.models.resolve import HEAD_METHODS

Floats: TypeAlias = NDArray[numpy.float64]
Derivatives: TypeAlias = Callable[[Floats], tuple[float, Floats, Floats]]
"""w `[K]` → value, gradient `[K]` and Hessian `[K, K]` of a convex function."""

GAP = 1e-9
"""Maximum distance of the loss from its minimum, in nats or in variances of the target."""

_SMALLEST_PROBABILITY = float(numpy.finfo(numpy.float64).eps)
_GROWTH = 20.0
_MOST_STEPS = 200
# Weights that only the barrier keeps above 0.
_NOTHING = 1e-8


def log_loss_weights(truths: Floats) -> Floats:
    """Weights `[K]` that minimize −Σ log(Σ_k w_k p_k) / M. truths `[M, K]`: the probability that each member assigns to
    the true outcome of a row.
    """
    actual = numpy.maximum(truths, _SMALLEST_PROBABILITY)

    def derivatives(weights: Floats) -> tuple[float, Floats, Floats]:
        mixed = actual @ weights
        ratios = actual / mixed[:, None]
        return float(-numpy.log(mixed).mean()), -ratios.mean(0), ratios.T @ ratios / len(actual)

    return minimum(derivatives, actual.shape[1])


def squared_error_weights(values: Floats, targets: Floats) -> Floats:
    """Weights `[K]` that minimize Σ (Σ_k w_k v_k − y)² / M. values `[M, K]`, targets `[M]`."""
    # In units of the target's variance, so that the gap means the same for every unit.
    scale = float(targets.std()) or 1.0
    errors = (values - targets[:, None]) / scale
    products = errors.T @ errors / len(errors)

    def derivatives(weights: Floats) -> tuple[float, Floats, Floats]:
        # Because the weights sum to 1, the error of the mixture is the mixture of the errors.
        return float(weights @ products @ weights), 2.0 * products @ weights, 2.0 * products

    return minimum(derivatives, values.shape[1])


def minimum(derivatives: Derivatives, size: int) -> Floats:
    """The point of the simplex that minimizes a convex function, to within `GAP`."""
    weights = numpy.full(size, 1.0 / size)
    pressure = 1.0
    while size / pressure > GAP / 10:
        pressure *= _GROWTH
        weights = _centered(derivatives, weights, pressure)
    gap = _gap(derivatives, weights)
    assert gap <= GAP, f"the weights are {gap:.1e} above the least loss"
    weights = numpy.where(weights < _NOTHING, 0.0, weights)
    found: Floats = weights / weights.sum()
    return found


def _gap(derivatives: Derivatives, weights: Floats) -> float:
    gradient = derivatives(weights)[1]
    return float(gradient @ weights - gradient.min())


def _centered(derivatives: Derivatives, weights: Floats, pressure: float) -> Floats:
    """The minimum of pressure·f(w) − Σ log w, by Newton's method from `weights`."""
    for _ in range(_MOST_STEPS):
        value, gradient, curvature = derivatives(weights)
        # In units of the weights themselves, the barrier's curvature is the identity however small a weight is.
        slope = pressure * gradient * weights - 1.0
        matrix = pressure * curvature * numpy.outer(weights, weights) + numpy.eye(len(weights))
        step = _on_the_plane(matrix, slope, weights)
        decrement = float(-slope @ step)
        if decrement <= 1e-10:
            break
        length = min(1.0, 0.95 / max(1e-300, float(-step.min()))) if step.min() < 0 else 1.0
        before = pressure * value - float(numpy.log(weights).sum())
        while True:
            moved = weights * (1.0 + length * step)
            after = pressure * derivatives(moved)[0] - float(numpy.log(moved).sum())
            # At high pressure the remaining gain is below what a float64 of this size can represent.
            if after <= before - 0.25 * length * decrement + 1e-14 * abs(before) or length < 1e-10:
                break
            length *= 0.5
        weights = moved / moved.sum()
    return weights


def _on_the_plane(matrix: Floats, slope: Floats, weights: Floats) -> Floats:
    """The Newton step u with w·u = 0."""
    size = len(weights)
    system = numpy.zeros((size + 1, size + 1))
    system[:size, :size] = matrix
    system[:size, size] = system[size, :size] = weights
    found: Floats = numpy.linalg.solve(system, numpy.append(-slope, 0.0))[:size]
    return found


@dataclass(frozen=True)
class Combined:
    """meaning: probabilities `[N, C]` or values `[N]`. uncertainty: name → `[N]`. votes `[N, C]`: how many members
    chose each class; None except for a majority.
    """

    meaning: Meaning
    uncertainty: Mapping[str, Floats]
    votes: NDArray[numpy.int64] | None


class Tally:
    """Sums over the members of an ensemble; memory does not grow with their number.

    mean: Σ w p, with equal weights. weighted: the same with fitted weights. logits: the softmax or sigmoid of Σ w z.
    majority: each member votes for its class (or for or against each label), and one more vote is divided by mean
    probability, (votes + Σ w p) / (K + 1): it only breaks ties.

    Uncertainty, over the weighted members: for probabilities their variance, Σ w (p − p̄)² averaged over classes, the
    entropy H(p̄) and the mutual information H(p̄) − Σ w H(p) in nats, which measures disagreement (Smith and Gal 2018,
    section 2.2), summed over labels if there may be several; for values their standard deviation.
    """

    def __init__(self, task: str, method: str) -> None:
        assert method in HEAD_METHODS, method
        self.task, self.method = task, method
        self._members = 0
        self._first: Floats | None = None
        self._sum: Any = 0.0
        self._deviations: Any = 0.0
        self._squares: Any = 0.0
        self._entropies: Any = 0.0
        self._logits: Any = 0.0
        self._votes: Any = 0

    def add(self, outputs: Tensor, meaning: Meaning, *, weight: float, threshold: float = 0.5) -> None:
        """Adds one member's outputs `[N, C]` and their meaning. Weights must sum to 1 over the members. threshold: the
        probability from which the member predicts a label.
        """
        self._members += 1
        self._first = meaning if self._first is None else self._first
        # Relative to the first member's, so that the variance of values far from 0 keeps its precision.
        away = meaning - self._first
        self._sum = self._sum + weight * meaning
        self._deviations = self._deviations + weight * away
        self._squares = self._squares + weight * away**2
        if self.task == "regression":
            return
        self._entropies = self._entropies + weight * self._entropy(meaning)
        self._logits = self._logits + weight * outputs.double()
        if self.task == "classification":
            self._votes = self._votes + numpy.eye(meaning.shape[1], dtype=numpy.int64)[meaning.argmax(1)]
        else:
            self._votes = self._votes + (meaning >= threshold).astype(numpy.int64)

    def result(self) -> Combined:
        """The combined prediction of all added members."""
        variance = numpy.maximum(self._squares - self._deviations**2, 0.0)
        if self.task == "regression":
            return Combined(self._sum, {"std": numpy.sqrt(variance)}, None)
        mean: Floats = self._sum
        entropy = self._entropy(mean)
        uncertainty = {
            "variance": variance.mean(1),
            "entropy": entropy,
            # Rounding may leave it slightly below 0 where all agree.
            "mutual_information": numpy.maximum(entropy - self._entropies, 0.0),
        }
        if self.method == "logits":
            return Combined(interpret(self.task, self._logits), uncertainty, None)
        if self.method == "majority":
            return Combined((self._votes + mean) / (self._members + 1), uncertainty, self._votes)
        return Combined(mean, uncertainty, None)

    def _entropy(self, probabilities: Floats) -> Floats:
        """H in nats `[N]`: of one class among several, or of every label by itself, summed."""
        spread = _surprise(probabilities)
        if self.task == "multi_label":
            spread = spread + _surprise(1.0 - probabilities)
        found: Floats = spread.sum(1)
        return found


def _surprise(probabilities: Floats) -> Floats:
    """−p log p, 0 where p is 0."""
    logs = numpy.log(numpy.where(probabilities > 0, probabilities, 1.0))
    found: Floats = -probabilities * logs
    return found


def tied(votes: NDArray[numpy.int64], num_members: int, *, task: str) -> list[list[int]]:
    """The classes of each row that share the most votes, or the labels with votes of half of the members; none if the
    vote is clear. votes `[N, C]`.
    """
    if task == "multi_label":
        return [[int(index) for index in numpy.flatnonzero(2 * row == num_members)] for row in votes]
    indices = [numpy.flatnonzero(row == row.max()) for row in votes]
    return [[int(index) for index in row] if len(row) > 1 else [] for row in indices]


def in_order(outputs: Tensor, order: Sequence[int]) -> Tensor:
    """Outputs `[N, C]` with columns in the order `order`, so that members with the same classes in another order
    match.
    """
    return outputs[:, torch.tensor(order)] if list(order) != list(range(outputs.shape[1])) else outputs
