"""The best weights are exported, early stopping stops, the plateau schedule slows: by hand on scripted validations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico_runs import class_rows, config_of, events_of, last_weights
from safetensors.torch import load_file

from loopos.methods.fine_tuning import FineTuner
from loopos.training.fit import FitResult
from loopos.training.progress import RunProgress
from loopos.training.stopping import Best

Run = Callable[..., tuple[FitResult, Path]]


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float], metric: str = "accuracy") -> list[float]:
    """Lets validation report these values of a metric, one after another; the last one repeats."""
    left = list(values)

    def validate(self: FineTuner, world: object = None) -> dict[str, float]:
        return {metric: left.pop(0) if len(left) > 1 else left[0]}

    monkeypatch.setattr(FineTuner, "validate", validate)
    return left


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(entry.name[5:]) for entry in (folder / "checkpoints").glob("step-*"))


def test_the_best_weights_are_kept_and_exported_not_the_last(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.9, 0.7, 0.6, 0.2])
    result, folder = run(validate_every=2, keep_last=1, save_every=2)
    # Validations at 0 (not judged), 2, 4, 6, 8, 10: the best is that of step 4.
    assert (result.best_step, result.best_metric) == (4, 0.9)
    assert saved_steps(folder) == [4, 10]
    best = load_file(folder / "checkpoints" / "step-00000004" / "weights.safetensors")
    last = load_file(folder / "checkpoints" / "step-00000010" / "weights.safetensors")
    exported = load_file(folder / "model" / "head.safetensors")["weight"]
    assert torch.equal(exported, best["head.weight"])
    assert not torch.equal(exported, last["head.weight"])
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(load_file(folder / "model" / "model.safetensors")[name], best[f"backbone.model.{name}"])


def test_the_best_is_saved_also_where_no_step_to_save_falls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.9, 0.7])
    _, folder = run(validate_every=1, save_every=5)
    # The best validations are those of steps 1 and 2.
    assert saved_steps(folder) == [2, 10]


def test_where_no_best_was_kept_the_last_is_exported_and_said(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, [0.1, 0.9, 0.2])
    config = config_of(
        tmp_path / "last",
        pico_folder,
        class_rows(48),
        training={"save_every": "never", "max_steps": 4, "validate_every": 2},
    )
    monkeypatch.setattr("loopos.methods.fine_tuning.write_report", lambda folder: None)
    FineTuner(config, progress=RunProgress()).train()
    exported = load_file(tmp_path / "last" / "model" / "head.safetensors")["weight"]
    assert torch.equal(exported, last_weights(tmp_path / "last")["head.weight"])
    said = capsys.readouterr().err
    assert "exporting the last weights: no checkpoint of the best validation was kept" in said
    assert "exporting the best weights" not in said


@pytest.mark.parametrize(
    ("patience", "min_delta", "values", "stopped_at"),
    [
        (2, 0.0, [0.0, 0.5, 0.6, 0.6, 0.6, 0.9], 8),
        (1, 0.0, [0.0, 0.5, 0.6, 0.7, 0.65, 0.9], 8),
        # 0.55 and 0.59 are no gain of more than 0.1 over 0.5; 0.61 is, but comes too late.
        (2, 0.1, [0.0, 0.5, 0.55, 0.59, 0.61], 6),
        (2, 0.1, [0.0, 0.5, 0.55, 0.61, 0.62, 0.63], 10),
    ],
)
def test_early_stopping_by_hand(
    patience: int, min_delta: float, values: list[float], stopped_at: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, values)
    result, folder = run(validate_every=2, early_stopping={"patience": patience, "min_delta": min_delta})
    assert (result.step, result.stopped_by) == (stopped_at, "early stopping" if stopped_at < 10 else "epochs")
    assert max(saved_steps(folder)) == stopped_at
    assert (folder / "model").is_dir()


def test_early_stopping_watches_its_own_metric(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([9.0, 3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(FineTuner, "validate", lambda self, world=None: {"accuracy": 0.5, "loss": next(losses)})
    result, _ = run(validate_every=2, early_stopping={"patience": 2, "metric": "loss"})
    assert (result.step, result.stopped_by) == (8, "early stopping")
    # Accuracy never got better than at its first validation.
    assert result.best_step == 2


def test_the_plateau_schedule_halves_the_learning_rate(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.0, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6])
    _, folder = run(validate_every=1, schedule="plateau", plateau_factor=0.5, plateau_patience=1, max_steps=8)
    rates = [event["metrics"]["learning_rate"] / 0.003 for event in events_of(folder, "step")]
    # Steps 2 and 3 bring nothing new: halved from step 4 on. 0.6 at step 4 is new, 5 and 6 are not: halved from 7 on.
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25])


def test_a_metric_that_is_not_defined_is_said_and_judges_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FineTuner, "validate", lambda self, world=None: {"accuracy": 0.5})
    result, folder = run(metric="auroc", max_steps=2)
    assert result.best_step is None
    assert (folder / "model").is_dir()
    assert "validation at step 2: auroc is not defined on these rows" in capsys.readouterr().err


def test_what_is_best_by_hand() -> None:
    least = Best("min", min_delta=0.1)
    seen = [least.observe(value, step) for step, value in enumerate([math.nan, 2.0, 1.95, 1.85, math.inf, 1.0])]
    assert seen == [False, True, False, True, False, True]
    assert (least.metric, least.step, least.stale) == (1.0, 5, 0)
