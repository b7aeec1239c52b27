"""Weights of a mixture, fitted: numbers that are at least 0, sum to 1, and make a convex loss least.

Enters: what each member says of the truth, row by row. Leaves: the weights. Left out: where predictions come from.
Letters: M rows, K members.

Solved by a barrier method (Boyd and Vandenberghe 2004, sections 11.3 and 10.2): for growing t, Newton's method
minimises t·f(w) − Σ log w under Σ w = 1. The result is held against the gap ⟨∇f, w⟩ − min ∇f, which bounds how far f(w)
lies above the least value of a convex f (Jaggi 2013, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[numpy.float64]
Derivatives: TypeAlias = Callable[[Floats], tuple[float, Floats, Floats]]
"""w `[K]` → value, gradient `[K]` and Hessian `[K, K]` of a convex function."""

GAP = 1e-9
"""How far the loss may lie above its least value, in nats or in variances of the target."""

_SMALLEST_PROBABILITY = float(numpy.finfo(numpy.float64).eps)
_GROWTH = 20.0
_MOST_STEPS = 200
# Weights that the barrier alone keeps above 0.
_NOTHING = 1e-8


def log_loss_weights(truths: Floats) -> Floats:
    """Weights `[K]` that minimise −Σ log(Σ_k w_k p_k) / M. truths `[M, K]`: the probability that each member gives to
    what is true of a row.
    """
    given = numpy.maximum(truths, _SMALLEST_PROBABILITY)

    def derivatives(weights: Floats) -> tuple[float, Floats, Floats]:
        mixed = given @ weights
        ratios = given / mixed[:, None]
        return float(-numpy.log(mixed).mean()), -ratios.mean(0), ratios.T @ ratios / len(given)

    return least(derivatives, given.shape[1])


def squared_error_weights(values: Floats, targets: Floats) -> Floats:
    """Weights `[K]` that minimise Σ (Σ_k w_k v_k − y)² / M. values `[M, K]`, targets `[M]`."""
    # In units of the target's variance, so that the gap means the same for every unit.
    scale = float(targets.std()) or 1.0
    errors = (values - targets[:, None]) / scale
    products = errors.T @ errors / len(errors)

    def derivatives(weights: Floats) -> tuple[float, Floats, Floats]:
        # Since the weights sum to 1, the error of the mixture is the mixture of the errors.
        return float(weights @ products @ weights), 2.0 * products @ weights, 2.0 * products

    return least(derivatives, values.shape[1])


def least(derivatives: Derivatives, size: int) -> Floats:
    """The point of the simplex where a convex function is least, to within `GAP`."""
    weights = numpy.full(size, 1.0 / size)
    pressure = 1.0
    while size / pressure > GAP / 10:
        pressure *= _GROWTH
        weights = _centred(derivatives, weights, pressure)
    gap = _gap(derivatives, weights)
    assert gap <= GAP, f"the weights are {gap:.1e} above the least loss"
    weights = numpy.where(weights < _NOTHING, 0.0, weights)
    found: Floats = weights / weights.sum()
    return found


def _gap(derivatives: Derivatives, weights: Floats) -> float:
    gradient = derivatives(weights)[1]
    return float(gradient @ weights - gradient.min())


def _centred(derivatives: Derivatives, weights: Floats, pressure: float) -> Floats:
    """Where pressure·f(w) − Σ log w is least, by Newton's method from `weights`."""
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
            # At high pressure what is left to win falls below what a float64 of this size can show.
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
