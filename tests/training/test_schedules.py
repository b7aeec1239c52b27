"""Schedules: hand-computed factors, and those of torch and transformers where they agree with ours."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import transformers

from loopos.training.schedules import Plateau, Schedule, factor, warmup_steps

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def factors(schedule: Schedule, total: int, warmup: int = 0, **more: Any) -> list[float]:
    return [factor(schedule, step, total, warmup, **more) for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "expected", "settings"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0], {}),
        ("plateau", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0], {}),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25], {}),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4], {"minimum_ratio": 0.2}),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2], {}),
        (
            "cosine",
            [0.5, 1.0, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)],
            {"minimum_ratio": 0.2},
        ),
        ("cosine_restarts", [0.5, 1.0, 1.0, 0.5, 1.0, 0.5], {"num_cycles": 2}),
        ("warmup_stable_decay", [0.5, 1.0, 1.0, 1.0, 1.0, 0.5], {"decay_share": 1 / 3}),
        ("warmup_stable_decay", [0.5, 1.0, 1.0, 1.0, 1.0, 0.6], {"decay_share": 1 / 3, "minimum_ratio": 0.2}),
        ("inverse_sqrt", [0.5, 1.0, 1.0, math.sqrt(2 / 3), math.sqrt(0.5), math.sqrt(0.4)], {}),
        ("inverse_sqrt", [0.5, 1.0, 1.0, math.sqrt(2 / 3), 0.8, 0.8], {"minimum_ratio": 0.8}),
    ],
)
def test_hand_worked_factors_of_six_steps_with_two_of_warmup(
    schedule: Schedule, expected: list[float], settings: dict[str, Any]
) -> None:
    assert factors(schedule, 6, 2, **settings) == pytest.approx(expected, abs=1e-15)


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert len(SCHEDULES) == 7
    for schedule in SCHEDULES:
        assert factor(schedule, 0, 10) == 1.0, schedule
    assert factors("inverse_sqrt", 4) == pytest.approx([1.0, 0.7071067811865476, 0.5773502691896258, 0.5])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_restarts", "warmup_stable_decay"])
def test_the_floor_is_reached_after_the_last_step_and_stays(schedule: Schedule) -> None:
    for step in (20, 21, 1000):
        assert factor(schedule, step, 20, 5, minimum_ratio=0.1, num_cycles=3) == pytest.approx(0.1)
    assert factor(schedule, 19, 20, 5, minimum_ratio=0.1, num_cycles=3, decay_share=0.3) > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (7, 3), (7, 7), (7, 12), (100, 1)])
def test_every_factor_lies_in_the_unit_interval(schedule: Schedule, total: int, warmup: int) -> None:
    values = [factor(schedule, step, total, warmup, 0.05, 4, 1.0) for step in range(2 * total + warmup)]
    assert len(values) >= 2
    assert all(0.0 < value <= 1.0 for value in values)


def test_restarts_fall_on_their_steps_exactly() -> None:
    values = factors("cosine_restarts", 49, num_cycles=7)
    assert [step for step, value in enumerate(values) if value == 1.0] == [0, 7, 14, 21, 28, 35, 42]


def peers_factors(scheduler: torch.optim.lr_scheduler.LambdaLR, num_steps: int) -> list[float]:
    function = scheduler.lr_lambdas[0]
    return [function(step) for step in range(num_steps)]


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


TOTAL, WARMUP = 60, 12


@pytest.mark.parametrize(
    ("schedule", "settings", "expected_factors"),
    [
        ("constant", {}, transformers.get_constant_schedule_with_warmup(optimizer(), WARMUP)),
        ("linear", {}, transformers.get_linear_schedule_with_warmup(optimizer(), WARMUP, TOTAL)),
        ("cosine", {}, transformers.get_cosine_schedule_with_warmup(optimizer(), WARMUP, TOTAL)),
        (
            "cosine",
            {"minimum_ratio": 0.3},
            transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer(), WARMUP, TOTAL, min_lr_rate=0.3),
        ),
        (
            "cosine_restarts",
            {"num_cycles": 3},
            transformers.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer(), WARMUP, TOTAL, 3),
        ),
        (
            "warmup_stable_decay",
            {"decay_share": 0.25, "minimum_ratio": 0.1},
            transformers.get_wsd_schedule(
                optimizer(), WARMUP, 15, num_training_steps=TOTAL, decay_type="linear", min_lr_ratio=0.1
            ),
        ),
        ("inverse_sqrt", {}, transformers.get_inverse_sqrt_schedule(optimizer(), WARMUP)),
    ],
    ids=["constant", "linear", "cosine", "cosine floor", "restarts", "wsd", "inverse_sqrt"],
)
def test_equal_to_transformers_after_the_warmup_and_one_step_ahead_in_it(
    schedule: Schedule, settings: dict[str, Any], expected_factors: torch.optim.lr_scheduler.LambdaLR
) -> None:
    actual_factors = factors(schedule, TOTAL, WARMUP, **settings)
    peers = peers_factors(expected_factors, TOTAL)
    assert actual_factors[WARMUP:] == pytest.approx(peers[WARMUP:], abs=1e-12)
    # Theirs trains its first step at a rate of zero (or of the floor); in ours every step of the warm-up counts.
    if "minimum_ratio" not in settings:
        assert actual_factors[: WARMUP - 1] == pytest.approx(peers[1:WARMUP], abs=1e-12)


def test_cosine_equals_torchs_annealing() -> None:
    step_by_step = optimizer()
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(step_by_step, T_max=20, eta_min=0.05)
    rates = []
    for _ in range(20):
        rates.append(step_by_step.param_groups[0]["lr"])
        step_by_step.step()
        annealing.step()
    assert factors("cosine", 20, minimum_ratio=0.05) == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize(
    ("warmup", "total", "expected"),
    [
        (0, 100, 0),
        (0.0, 100, 0),
        (1, 100, 1),
        (250, 100, 250),
        (0.1, 30, 3),
        (0.06, 1000, 60),
        (0.001, 10, 1),
        (0.5, 3, 2),
    ],
)
def test_warmup_as_a_count_or_a_fraction(warmup: int | float, total: int, expected: int) -> None:
    assert warmup_steps(warmup, total) == expected


@pytest.mark.parametrize("warmup", [-1, -0.1, 1.0, 1.5, 20.0])
def test_warmup_of_neither_kind_is_a_programming_error(warmup: int | float) -> None:
    with pytest.raises(AssertionError):
        warmup_steps(warmup, 100)


def test_plateau_by_hand() -> None:
    plateau = Plateau(factor=0.5, patience=1, minimum_ratio=0.2, mode="min")
    observed = [(5.0, 1.0), (4.0, 1.0), (4.0, 1.0), (4.5, 0.5), (4.2, 0.5), (3.0, 0.5), (3.0, 0.5), (3.0, 0.25)]
    observed += [(3.0, 0.25), (3.0, 0.2), (3.0, 0.2), (3.0, 0.2)]
    fell = []
    for metric, expected in observed:
        if plateau.observe(metric):
            fell.append(metric)
        assert plateau.scale == expected
    assert fell == [4.5, 3.0, 3.0]


def test_plateau_takes_nan_for_no_improvement() -> None:
    plateau = Plateau(factor=0.1, patience=0, minimum_ratio=0.0, mode="max")
    assert [plateau.observe(value) for value in (float("nan"), 0.5, float("inf"), float("nan"), 0.6)] == [
        True,
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_equals_torchs(mode: Any, patience: int) -> None:
    generator = torch.Generator().manual_seed(patience)
    metrics = torch.randint(0, 12, (80,), generator=generator).tolist()
    peer = optimizer()
    expected_factors = torch.optim.lr_scheduler.ReduceLROnPlateau(
        peer, mode=mode, factor=0.7, patience=patience, threshold=0.0, min_lr=0.01, eps=0.0
    )
    actual_factors = Plateau(factor=0.7, patience=patience, minimum_ratio=0.01, mode=mode)
    for metric in metrics:
        expected_factors.step(metric)
        actual_factors.observe(float(metric))
        assert actual_factors.scale == pytest.approx(peer.param_groups[0]["lr"], rel=1e-12)
    assert actual_factors.scale < 0.5


def test_plateau_resumes_from_its_state() -> None:
    metrics = [3.0, 2.0, 2.5, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5, 1.5]
    for cut in range(len(metrics)):
        whole = Plateau(0.5, 2, 0.0, "min")
        first, second = Plateau(0.5, 2, 0.0, "min"), Plateau(0.5, 2, 0.0, "min")
        for metric in metrics:
            whole.observe(metric)
        for metric in metrics[:cut]:
            first.observe(metric)
        second.load_state_dict(first.state_dict())
        for metric in metrics[cut:]:
            second.observe(metric)
        assert second.state_dict() == whole.state_dict() == {"scale": 0.25, "best": 1.0, "num_without_improvement": 1}
