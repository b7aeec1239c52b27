"""Law 1: a step does not depend on how its rows are split over micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import run_world

from loopos.config.rl import PpoTrainingSection
from loopos.data.batches import Cursor, PackedRows, StepBatches, deal, shuffled
from loopos.data.tokens import Encoded
from loopos.methods.fine_tuning import FineTuner
from loopos.rl.rollouts import RolloutPlan
from loopos.storage.events import read
from loopos.training.progress import RunProgress
from loopos.training.update import NonFiniteStep, _read

Build = Callable[..., Any]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [event["metrics"] for event in read(run / "events.jsonl") if event["event"] == "step"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    last = max((run / "checkpoints").iterdir())
    return load_file(last / "weights.safetensors")


def layouts(fine_tuning_config: Build, tmp_path: Path, **training: Any) -> dict[str, Any]:
    """The same run as 1 × 1, as accumulate 4, and for 2 processes × accumulate 2: 16 rows a step in each."""
    shapes = {"one": (16, 1), "accumulate": (4, 4), "two": (4, 2)}
    return {
        name: fine_tuning_config(
            rows=70,
            training={"batch_size": size, "gradient_accumulation": times, "num_epochs": 2, "seed": 7, **training},
            data={"output_dir": str(tmp_path / name), "validation_share": 0.2},
        )
        for name, (size, times) in shapes.items()
    }


# SGD: Adam divides by the gradient's own size and would hide a gradient that is too large by a factor.
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_one_process_accumulation_and_two_processes_are_one_run(
    optimizer: str, fine_tuning_config: Build, tmp_path: Path
) -> None:
    rate = {"sgd": 0.5, "adamw": 0.003}[optimizer]
    configs = layouts(fine_tuning_config, tmp_path, optimizer=optimizer, learning_rate=rate, max_grad_norm=1.0)
    FineTuner(configs["one"], progress=RunProgress(quiet=True)).train()
    FineTuner(configs["accumulate"], progress=RunProgress(quiet=True)).train()
    run_world(2, [(configs["two"], False)])
    one = steps_of(tmp_path / "one")
    assert len(one) == 8  # 56 rows, 16 a step, the last step of an epoch has 8
    assert [step["rows"] for step in one[:4]] == [16, 32, 48, 56]
    for other in ("accumulate", "two"):
        steps = steps_of(tmp_path / other)
        assert len(steps) == len(one)
        for actual_loss, expected_loss in zip(one, steps, strict=True):
            assert expected_loss["loss"] == pytest.approx(actual_loss["loss"], abs=1e-6)
            assert expected_loss["gradient_norm"] == pytest.approx(actual_loss["gradient_norm"], abs=2e-6, rel=2e-6)
            assert expected_loss["tokens"] == actual_loss["tokens"]
        expected = weights_of(tmp_path / "one")
        found = weights_of(tmp_path / other)
        assert set(found) == set(expected)
        # Adam's first steps divide nearly equal tiny gradients by themselves, so that rounding in the last bit is a full step.
        tolerance = 1e-6 if optimizer == "sgd" else 1e-5
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0)


def test_every_row_comes_once_an_epoch_whatever_the_layout() -> None:
    examples = [Encoded([1] * (1 + (i * 7) % 40), None, i) for i in range(45)]
    for world, accumulation, size in ((1, 1, 16), (1, 4, 4), (2, 2, 4), (4, 1, 4)):
        ranks = [StepBatches(PackedRows(examples), size, accumulation, rank, world, seed=3) for rank in range(world)]
        for epoch in (0, 1):
            steps = []
            for number in range(ranks[0].steps_an_epoch):
                rows = [row for r in ranks for slot in r.rows_of(Cursor(epoch, number)) for row in slot]
                assert all(len(slot) <= size for r in ranks for slot in r.rows_of(Cursor(epoch, number)))
                steps.append(set(rows))
                assert len(rows) == len(set(rows))
            assert sorted(row for step in steps for row in step) == list(range(45))
            if world == 1 and accumulation == 1:
                continue
            single = StepBatches(PackedRows(examples), 16, seed=3)
            assert steps == [set(single.rows_of(Cursor(epoch, n))[0]) for n in range(single.steps_an_epoch)]


def test_epochs_have_different_orders() -> None:
    batches = StepBatches(PackedRows([Encoded([1], None, i) for i in range(30)]), 8)
    assert batches.order(0).tolist() != batches.order(1).tolist()
    assert batches.order(1).tolist() == batches.order(1).tolist()


def test_deal_by_hand() -> None:
    # 9 → slot 0; 7 → slot 1; 4 → slot 1 (7 < 9); 2 → slot 0 (9 < 11); 1 → slot 0 (11 = 11, the first).
    assert deal([4, 9, 1, 7, 2], slots=2, capacity=3) == [[1, 4, 2], [3, 0]]


def test_gradients_are_clipped_to_the_norm(fine_tuning_config: Build, tmp_path: Path) -> None:
    """One SGD step moves the weights by learning rate × clipped norm exactly, whatever the gradient was."""
    tuner = FineTuner(
        fine_tuning_config(training={"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.25}),
        progress=RunProgress(quiet=True),
    )
    tuner.device = torch.device("cpu")
    tuner.load_data()
    tuner.build_model()
    fit = tuner.build_fit()
    before = {name: p.detach().clone() for name, p in tuner.trained.master_weights.parameters.items()}
    result = fit.update(fit.batches.step(Cursor()), fit.objective, 1.0)
    moved = math.sqrt(
        sum(float((p.detach() - before[n]).square().sum()) for n, p in tuner.trained.master_weights.parameters.items())
    )
    assert result.gradient_norm > 0.25
    assert moved == pytest.approx(0.1 * 0.25, rel=1e-4)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_no_step_is_taken_on_a_loss_that_is_not_finite(policy: str, fine_tuning_config: Build) -> None:
    tuner = FineTuner(fine_tuning_config(training={"on_nonfinite": policy}), progress=RunProgress(quiet=True))
    tuner.device = torch.device("cpu")
    tuner.load_data()
    tuner.build_model()
    fit = tuner.build_fit()
    with torch.no_grad():
        tuner.model.head.weight[0, 0] = float("inf")
    before = {name: p.detach().clone() for name, p in tuner.trained.master_weights.parameters.items()}
    if policy == "stop":
        with pytest.raises(NonFiniteStep, match="not a finite number"):
            fit.update(fit.batches.step(Cursor()), fit.objective, 1.0)
    else:
        assert fit.update(fit.batches.step(Cursor()), fit.objective, 1.0).skipped
    for name, parameter in tuner.trained.master_weights.parameters.items():
        assert torch.equal(parameter, before[name]), name


def test_a_million_rows_are_shuffled_once_a_pass() -> None:
    shuffled.cache_clear()
    plan = RolloutPlan(
        num_prompts=1_000_000, batch_size=64, inner_epochs=1, minibatches=1, accumulation=1, iterations=10,
        planned_end="epochs", seed=3, shuffle=True, rank=0, world=1, approximate_kl_limit=None,
    )  # fmt: skip
    found = plan.prompts_of(0) + plan.prompts_of(1)
    order = np.random.Generator(np.random.PCG64([3, 0])).permutation(1_000_000)
    assert found == order[:128].tolist()
    assert shuffled.cache_info().misses == 1


def test_an_iteration_has_several_responses_to_each_prompt() -> None:
    settings = PpoTrainingSection(learning_rate=0.1, batch_size=6, num_epochs=2, seed=3)
    single = RolloutPlan.of(settings, num_prompts=5, rank=0, world=2)
    plan = RolloutPlan.of(settings, num_prompts=5, rank=0, world=2, responses_per_prompt=3)
    # 2 passes over 5 prompts: 10 responses in iterations of 12, and 30 responses.
    assert (single.iterations, plan.iterations) == (1, 3)
    prompts = [prompt for iteration in range(3) for prompt in plan.prompts_of(iteration)]
    assert len(prompts) == 36
    groups = prompts[::3]
    assert prompts == [prompt for prompt in groups for _ in range(3)]
    # The same order of the prompts as with one response to each.
    assert groups == single.prompts_of(0)
    assert sorted(groups[:5]) == sorted(groups[5:10]) == list(range(5))


def test_a_step_reads_the_losses_of_its_micro_batches_together() -> None:
    totals = {"loss": torch.tensor(0.1, dtype=torch.float64), "kl": torch.tensor(2.0, dtype=torch.float64)}
    assert _read(totals) == {"loss": 0.1, "kl": 2.0}
    assert _read({}) == {}
