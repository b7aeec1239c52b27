"""Export of the best weights, early stopping and the plateau schedule, on scripted validations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, events_of, last_weights
from safetensors.torch import load_file

from loopos.config.sections import TrainingSection
from loopos.evaluation.run_folder import read_run
from loopos.functional.comparing import is_better
from loopos.methods.fine_tuning import FineTuner
from loopos.storage.events import fingerprint
from loopos.training.fit import Fit, FitResult
from loopos.training.progress import RunProgress
from loopos.training.stopping import Best
from loopos.training.validation import Validation, ValidationTracker

Run = Callable[..., tuple[FitResult, Path]]


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float], metric: str = "accuracy") -> list[float]:
    """Makes validations return these values of a metric in order; the last one repeats."""
    left = list(values)

    def validate(self: FineTuner, world: object = None) -> dict[str, float]:
        return {metric: left.pop(0) if len(left) > 1 else left[0]}

    monkeypatch.setattr(FineTuner, "validate", validate)
    return left


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(entry.name[5:]) for entry in (folder / "checkpoints").glob("step-*"))


def test_the_best_weights_are_saved_and_exported_not_the_last(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.9, 0.7, 0.6, 0.2])
    result, folder = run(validate_every=2, keep_last=1, save_every=2)
    # Validations at 0 (the start), 2, 4, 6, 8, 10: the best is that of step 4, and beats the start.
    assert (result.best_step, result.best_metric) == (4, 0.9)
    assert saved_steps(folder) == [4, 10]
    best = load_file(folder / "checkpoints" / "step-00000004" / "weights.safetensors")
    last = load_file(folder / "checkpoints" / "step-00000010" / "weights.safetensors")
    exported = load_file(folder / "model" / "head.safetensors")["weight"]
    assert torch.equal(exported, best["head.weight"])
    assert not torch.equal(exported, last["head.weight"])
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(
        load_file(folder / "model" / "model.safetensors")[f"model.{name}"], best[f"backbone.model.{name}"]
    )


def test_the_best_is_saved_also_where_no_step_to_save_falls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.9, 0.7])
    _, folder = run(validate_every=1, save_every=5)
    # The best validations are those of steps 1 and 2.
    assert saved_steps(folder) == [2, 10]


def test_without_a_saved_best_the_last_is_exported_and_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, [0.1, 0.9, 0.2])
    config = config_of(
        tmp_path / "last",
        pico_folder,
        class_rows(48),
        training={"save_every": "never", "max_steps": 4, "validate_every": 2},
    )
    monkeypatch.setattr("loopos.methods.base.write_report", lambda folder: None)
    FineTuner(config, progress=RunProgress()).train()
    exported = load_file(tmp_path / "last" / "model" / "head.safetensors")["weight"]
    assert torch.equal(exported, last_weights(tmp_path / "last")["head.weight"])
    summary = capsys.readouterr().err
    assert "exporting the last weights: no checkpoint of the best validation was saved" in summary
    assert "exporting the best weights" not in summary


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
    # Accuracy is the same at every validation: the lowest loss, 2.0 at step 4, tells them apart.
    assert result.best_step == 4


def test_the_plateau_schedule_halves_the_learning_rate(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.0, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6])
    _, folder = run(validate_every=1, schedule="plateau", plateau_factor=0.5, plateau_patience=1, max_steps=8)
    rates = [event["metrics"]["learning_rate"] / 0.003 for event in events_of(folder, "step")]
    # Steps 2 and 3 bring nothing new: halved from step 4 on. 0.6 at step 4 is new, 5 and 6 are not: halved from 7 on.
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25])


def test_an_undefined_metric_is_reported_and_decides_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FineTuner, "validate", lambda self, world=None: {"accuracy": 0.5})
    result, folder = run(metric="auroc", max_steps=2)
    assert result.best_step is None
    assert (folder / "model").is_dir()
    assert "validation at step 2: auroc is not defined on these rows" in capsys.readouterr().err


WORSE = [0.9, 0.5, 0.6, 0.7, 0.4, 0.3]
"""Accuracy before training, and after steps 2, 4, 6, 8 and 10."""


def test_a_run_that_does_not_beat_its_start_marks_nothing_as_best(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, WORSE)
    result, folder = run(validate_every=2)
    assert (result.best_step, result.best_metric, result.beat_start, result.start_metric) == (None, None, False, 0.9)
    assert (result.best_trained_step, result.best_trained_metric) == (6, 0.7)
    validations = events_of(folder, "validation")
    assert [event["step"] for event in validations] == [0, 2, 4, 6, 8, 10]
    assert not any(event["metrics"]["best"] for event in validations)
    # The message names what is exported: the best trained weights.
    exports = events_of(folder, "export")
    assert [(event["step"], event["metrics"]["weights"]) for event in exports] == [(6, "best trained")]
    exported = load_file(folder / "model" / "head.safetensors")["weight"]
    saved = load_file(folder / "checkpoints" / "step-00000006" / "weights.safetensors")
    assert torch.equal(exported, saved["head.weight"])
    outcome = read_run(folder).outcome
    assert (outcome.beat_start, outcome.best, outcome.weights) == (False, None, "best trained")
    assert outcome.verdict() == (
        "training did not beat the start: accuracy is 0.7 at best (step 6) and was 0.9 before training"
    )


def test_the_start_is_exported_if_configured_and_nothing_beats_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, WORSE)
    result, folder = run(validate_every=2, export_start=True)
    assert (result.step, result.beat_start) == (10, False)
    assert saved_steps(folder) == [0, 10]
    start = load_file(folder / "checkpoints" / "step-00000000" / "weights.safetensors")
    exported = load_file(folder / "model" / "head.safetensors")["weight"]
    assert torch.equal(exported, start["head.weight"])
    assert not torch.equal(exported, last_weights(folder)["head.weight"])
    assert [(e["step"], e["metrics"]["weights"]) for e in events_of(folder, "export")] == [(0, "start")]
    # One validation better than the start is enough to remove it.
    scripted(monkeypatch, [0.5, 0.4, 0.6, 0.3])
    _, folder = run("beaten", validate_every=2, export_start=True)
    assert saved_steps(folder) == [4, 10]
    assert [(e["step"], e["metrics"]["weights"]) for e in events_of(folder, "export")] == [(4, "best")]


def test_a_run_resumed_from_its_start_is_the_uninterrupted_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the checkpoint of step 0: the start is known, and not measured again."""
    scripted(monkeypatch, WORSE)
    _, whole = run("whole", validate_every=2, export_start=True)

    def dies(self: Fit[Any]) -> None:
        self._finish_save()
        raise KeyboardInterrupt

    scripted(monkeypatch, WORSE)
    with monkeypatch.context() as patched:
        patched.setattr(Fit, "_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run("killed", validate_every=2, export_start=True)
    scripted(monkeypatch, WORSE[1:])
    _, resumed = run("killed", resume=True, validate_every=2, export_start=True)
    assert fingerprint(resumed / "events.jsonl") == fingerprint(whole / "events.jsonl")
    assert len(events_of(resumed, "validation")) == 6
    assert events_of(resumed, "export")[-1]["step"] == 0


def test_without_a_validation_at_the_start_nothing_is_reported_about_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.5, 0.7, 0.6])
    result, folder = run(validate_every=5, validate_at_start=False)
    assert [event["step"] for event in events_of(folder, "validation")] == [5, 10]
    assert (result.beat_start, result.start_metric, result.best_step) == (None, None, 10)
    assert read_run(folder).outcome.verdict() == "best validation: accuracy 0.7 at step 10"


def test_ties_of_the_metric_are_broken_by_loss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([(0.5, 2.0), (0.5, 1.5), (0.8, 1.0), (0.8, 0.9), (0.8, 0.95), (0.7, 0.1)])
    monkeypatch.setattr(
        FineTuner, "validate", lambda self, world=None: dict(zip(("accuracy", "loss"), next(seen), strict=True))
    )
    result, folder = run(validate_every=2)
    assert (result.best_step, result.best_metric, result.beat_start) == (6, 0.8, True)
    best = [event["metrics"]["best"] for event in events_of(folder, "validation")]
    # Step 2 is as accurate as the start, with a lower loss.
    assert best == [False, True, True, True, False, False]
    assert saved_steps(folder) == [6, 10]


@pytest.mark.parametrize(
    ("metric", "than", "mode", "loss", "than_loss", "expected"),
    [
        (0.6, 0.5, "max", None, None, True),
        (0.6, 0.5, "min", None, None, False),
        (0.5, 0.5, "max", 1.0, 2.0, True),
        (0.5, 0.5, "max", 2.0, 1.0, False),
        (0.5, 0.5, "min", None, 1.0, False),
        (0.5, 0.5, "min", math.nan, 1.0, False),
        (math.nan, None, "max", None, None, False),
        (math.inf, 0.5, "max", None, None, False),
        (-9.0, None, "max", None, None, True),
        (-9.0, math.nan, "max", None, None, True),
    ],
)
def test_which_of_two_validations_is_better(
    metric: float, than: float | None, mode: str, loss: float | None, than_loss: float | None, expected: bool
) -> None:
    assert is_better(metric, than, mode, loss=loss, than_loss=than_loss) is expected


def test_validation_state_of_an_older_checkpoint_has_no_start() -> None:
    """As 4ff8e20 wrote it: a metric, a step and a count."""
    validation = Validation(dict, "accuracy", "max", "accuracy", "max")
    settings = TrainingSection.model_validate({"learning_rate": 0.1})
    tracker = ValidationTracker(validation, settings)
    tracker.load({"best": {"metric": 0.5, "step": 4, "stale": 1}, "watched": None, "plateau": None})
    assert (tracker.beat_start, tracker.knows_start, tracker.best.step) == (None, False, 4)
    # Without a known loss the tie stays with the earlier one.
    assert not tracker.observe({"accuracy": 0.5, "loss": 0.1}, 6)
    assert tracker.observe({"accuracy": 0.6, "loss": 0.1}, 8)


def test_what_is_best_by_hand() -> None:
    least = Best("min", min_delta=0.1)
    seen = [least.observe(value, step) for step, value in enumerate([math.nan, 2.0, 1.95, 1.85, math.inf, 1.0])]
    assert seen == [False, True, False, True, False, True]
    assert (least.metric, least.step, least.stale) == (1.0, 5, 0)
