"""Weights of a mixture, against SciPy, by hand, and by what marks the least point of a convex loss."""

from __future__ import annotations

import numpy
import pytest
from scipy.optimize import minimize

from loopos.evaluation.combining import Floats, log_loss_weights, squared_error_weights


def log_loss(weights: Floats, truths: Floats) -> float:
    return float(-numpy.log(truths @ weights).mean())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("members", [2, 3, 6])
def test_log_loss_is_as_small_as_scipy_finds(members: int, seed: int) -> None:
    draw = numpy.random.default_rng([seed, members])
    truths = draw.beta(1 + draw.uniform(0, 3, members), 1.0, (80, members))
    found = log_loss_weights(truths)
    reference = minimize(
        log_loss, numpy.full(members, 1 / members), args=(truths,), method="SLSQP", bounds=[(0, 1)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert log_loss(found, truths) <= reference.fun + 1e-8
    assert not any(log_loss(corner, truths) < log_loss(found, truths) - 1e-9 for corner in numpy.eye(members))


def test_log_loss_by_hand() -> None:
    # Member 0 is sure of 3 rows and gives the fourth nothing, member 1 the other way: w is the share of rows.
    truths = numpy.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert log_loss_weights(truths) == pytest.approx([0.75, 0.25], abs=1e-6)


def test_a_member_that_is_better_everywhere_takes_all() -> None:
    truths = numpy.array([[0.9, 0.5, 0.1], [0.8, 0.7, 0.2], [0.7, 0.3, 0.6]])
    assert log_loss_weights(truths) == pytest.approx([1, 0, 0], abs=1e-6)


def test_squared_error_by_hand() -> None:
    # y lies a quarter of the way from member 0 to member 1 in every row.
    values = numpy.array([[0.0, 4.0], [10.0, 2.0], [1.0, -7.0]])
    targets = values @ [0.75, 0.25]
    assert squared_error_weights(values, targets) == pytest.approx([0.75, 0.25], abs=1e-5)
    # Outside of what a mixture can reach, the nearest corner.
    assert squared_error_weights(values, values @ [1.5, -0.5]) == pytest.approx([1, 0], abs=1e-5)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_squared_error_is_that_of_scipy_in_any_unit(unit: float) -> None:
    draw = numpy.random.default_rng(4)
    targets = draw.normal(3, 1, 60)
    values = targets[:, None] + draw.normal(0, [0.3, 0.5, 0.4], (60, 3)) + [0.2, -0.3, 0.0]
    reference = minimize(
        lambda w: float(((values @ w - targets) ** 2).mean()), numpy.full(3, 1 / 3), method="SLSQP",
        bounds=[(0, 1)] * 3, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-14},
    )  # fmt: skip
    assert squared_error_weights(values * unit, targets * unit) == pytest.approx(reference.x, abs=1e-4)


def test_equal_members_get_equal_weights() -> None:
    same = numpy.tile(numpy.array([[0.6], [0.9], [0.2]]), (1, 4))
    assert log_loss_weights(same) == pytest.approx([0.25] * 4, abs=1e-6)
