"""The offline loop: when it validates, saves and stops, what it keeps, and what a full disk or a nan does."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, events_of, last_weights, prepared, train
from safetensors.torch import load_file

from loopos.data.batches import Cursor
from loopos.methods.fine_tuning import FineTuner
from loopos.training import checkpoint
from loopos.training.durable import DiskFull
from loopos.training.events import fingerprint
from loopos.training.fit import FitResult
from loopos.training.progress import RunProgress
from loopos.training.stopping import Best, StopSignals
from loopos.training.update import NonFiniteStep

Run = Callable[..., tuple[FitResult, Path]]


@pytest.fixture
def run(tmp_path: Path, pico_folder: Path) -> Run:
    """Trains on 40 rows, 8 a step: 5 steps an epoch, 2 epochs; 8 further rows validate."""

    def go(name: str = "run", *, resume: bool = False, model: Any = None, **training: Any) -> tuple[FitResult, Path]:
        settings = {"learning_rate": 0.003, **training}
        config = config_of(tmp_path / name, pico_folder, class_rows(48), training=settings, model=model, data={"validation_share": 1 / 6})
        return train(config, resume=resume), tmp_path / name

    return go


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float], metric: str = "accuracy") -> list[float]:
    """Lets validation report these values of a metric, one after another; the last one repeats."""
    left = list(values)

    def validate(self: FineTuner, world: object = None) -> dict[str, float]:
        return {metric: left.pop(0) if len(left) > 1 else left[0]}

    monkeypatch.setattr(FineTuner, "validate", validate)
    return left


def validated_steps(folder: Path) -> list[int]:
    return [event["step"] for event in events_of(folder, "validation")]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(entry.name[5:]) for entry in (folder / "checkpoints").glob("step-*"))


# When --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "expected"), [("epoch", [0, 5, 10]), (3, [0, 3, 6, 9, 10]), (100, [0, 10]), ("never", [])]
)
def test_validation_comes_when_it_was_asked_for(every: int | str, expected: list[int], run: Run) -> None:
    result, folder = run(validate_every=every)
    assert (result.step, result.stopped_by) == (10, "epochs")
    assert validated_steps(folder) == expected
    assert (result.best_step is None) == (every == "never")
    # The untrained model is measured, and never the best.
    assert not any(event["metrics"]["best"] for event in events_of(folder, "validation") if event["step"] == 0)


@pytest.mark.parametrize(
    ("every", "keep", "expected"),
    [(3, 9, [3, 6, 9, 10]), (3, 2, [9, 10]), ("epoch", 9, [5, 10]), ("never", 9, [10]), ("validation", 9, [5, 10])],
)
def test_checkpoints_come_when_they_were_asked_for_and_the_last_are_kept(
    every: int | str, keep: int, expected: list[int], run: Run
) -> None:
    _, folder = run(save_every=every, keep_last=keep, keep_best=False)
    assert saved_steps(folder) == expected


def test_the_log_has_every_nth_step_and_the_last(run: Run) -> None:
    _, folder = run(log_every=4, validate_every="never")
    assert [event["step"] for event in events_of(folder, "step")] == [4, 8, 10]


def test_max_steps_and_max_time_end_a_run(run: Run) -> None:
    result, folder = run("steps", max_steps=7)
    assert (result.step, result.stopped_by) == (7, "max_steps")
    assert validated_steps(folder)[-1] == 7
    assert (folder / "model").is_dir()
    result, folder = run("time", max_time=1e-6)
    assert (result.step, result.stopped_by) == (1, "max_time")
    assert validated_steps(folder) == [0, 1]
    assert events_of(folder, "end")[0]["metrics"] == {"stopped_by": "max_time"}


def test_a_run_that_had_ended_goes_on_when_its_limit_is_raised(run: Run, tmp_path: Path) -> None:
    whole, _ = run("whole")
    run("limited", max_steps=6)
    result, _ = run("limited", resume=True)
    assert (result.step, result.stopped_by) == (10, "epochs")
    # A constant learning rate does not know the end of the run, so the two runs are one.
    expected, found = last_weights(tmp_path / "whole"), last_weights(tmp_path / "limited")
    assert len(expected) == 21
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.tokens == result.tokens


# Best, early stopping, plateau -------------------------------------------------------------------------------------


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
    config = config_of(tmp_path / "last", pico_folder, class_rows(48), training={"save_every": "never", "max_steps": 4})
    monkeypatch.setattr("loopos.methods.fine_tuning.write_report", lambda folder: None)
    FineTuner(config, progress=RunProgress()).train()
    exported = load_file(tmp_path / "last" / "model" / "head.safetensors")["weight"]
    assert torch.equal(exported, last_weights(tmp_path / "last")["head.weight"])
    assert "exporting the best weights, of step 4" not in capsys.readouterr().err


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
    assert result.step == stopped_at
    assert result.stopped_by == "early stopping" if stopped_at < 10 else result.stopped_by in ("early stopping", "epochs")
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


# Schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1] * 10),
        ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0.2}, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "linear", "minimum_ratio": 0.5}, [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]),
        ({"schedule": "warmup_stable_decay", "decay_share": 0.4}, [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "inverse_sqrt", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, (4 / 5) ** 0.5, (4 / 6) ** 0.5, (4 / 7) ** 0.5, (4 / 8) ** 0.5, 2 / 3]),
    ],
)  # fmt: skip
def test_the_learning_rates_of_a_run_by_hand(settings: dict[str, Any], expected: list[float], run: Run) -> None:
    _, folder = run(validate_every="never", **settings)
    rates = [event["metrics"]["learning_rate"] / 0.003 for event in events_of(folder, "step")]
    assert rates == pytest.approx(expected)


# What goes wrong ---------------------------------------------------------------------------------------------------


def break_loss_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The loss of the `number`-th forward pass is nan."""
    from loopos.training.task_objective import TaskObjective

    whole, calls = TaskObjective.loss, [0]

    def loss(self: TaskObjective, batch: Any) -> Any:
        calls[0] += 1
        parts = whole(self, batch)
        return {"loss": parts["loss"] * math.nan} if calls[0] == number else parts

    monkeypatch.setattr(TaskObjective, "loss", loss)


def test_a_nan_stops_the_run_and_names_what_is_whole(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_loss_at(monkeypatch, 7)
    with pytest.raises(NonFiniteStep, match=r"step 7: not a finite number: loss nan.*checkpoint of step 5 is whole"):
        run()
    assert [event["step"] for event in events_of(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6]
    assert all(bool(tensor.isfinite().all()) for tensor in last_weights(tmp_path / "run").values())
    monkeypatch.undo()
    result, _ = run(resume=True)
    assert result.step == 10


def test_a_nan_is_skipped_and_counted_where_that_was_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    break_loss_at(monkeypatch, 3)
    _, folder = run(on_nonfinite="skip", save_every=1, keep_last=99, validate_every="never")
    steps = events_of(folder, "step")
    assert [event["metrics"]["skipped"] for event in steps] == [0, 0, *[1] * 8]
    assert steps[2]["metrics"]["loss"] == "nan"
    states = [load_file(entry / "weights.safetensors") for entry in sorted((folder / "checkpoints").iterdir())]
    name = "head.weight"
    assert torch.equal(states[1][name], states[2][name])
    assert not torch.equal(states[2][name], states[3][name])


def test_weights_that_overflow_are_never_saved(run: Run, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteStep, match=r"learning_rate"):
        run(optimizer="sgd", learning_rate=1e38, max_grad_norm=None, save_every=1, validate_every="never")
    for entry in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(entry / "weights.safetensors").values())
    assert not (tmp_path / "run" / "model").exists()


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected, whole = run("whole", save_every=3, keep_best=False)
    saves, written = [0], checkpoint.write_folder

    def fill_up(folder: Path, *arguments: Any) -> None:
        saves[0] += 1
        if saves[0] == 2:
            (folder / "weights.safetensors").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        written(folder, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_folder", fill_up)
        with pytest.raises(DiskFull, match=r"the disk is full: the checkpoint of step 6 needs [\d,]+ bytes") as caught:
            run(save_every=3, keep_best=False)
    assert caught.value.exit_code == 74
    assert len(str(caught.value).splitlines()) == 1
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    result, _ = run(resume=True, save_every=3, keep_best=False)
    assert result.step == expected.step
    assert fingerprint(tmp_path / "run" / "events.jsonl") == fingerprint(whole / "events.jsonl")


def test_a_full_disk_under_the_log_is_said_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.write

    def fill_up(descriptor: int, content: bytes) -> int:
        if b'"event":"step","step":4' in content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(descriptor, content)

    monkeypatch.setattr(os, "write", fill_up)
    with pytest.raises(DiskFull, match="an event"):
        run()


# Signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 5, 10])
def test_a_signal_at_a_step_that_validates_loses_nothing(
    step: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation that was due is made up for when the run is resumed, also after the very last step."""
    settings = {"schedule": "plateau", "plateau_patience": 0, "early_stopping": {"patience": 9}}
    expected, whole = run("whole", **settings)
    stepped = RunProgress.step

    def stop(self: RunProgress, number: int, *arguments: Any) -> None:
        stepped(self, number, *arguments)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunProgress, "step", stop)
        result, folder = run(**settings)
    assert (result.step, result.stopped_by, result.interrupted) == (step, "SIGTERM", True)
    assert validated_steps(folder)[-1] < step
    assert not (folder / "model").exists()
    result, _ = run(resume=True, **settings)
    assert (result.step, result.stopped_by, result.best_step) == (10, "epochs", expected.best_step)
    assert fingerprint(folder / "events.jsonl") == fingerprint(whole / "events.jsonl")
    for name in ("model.safetensors", "head.safetensors"):
        assert (folder / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    entered: list[str | None] = []

    def enter() -> None:
        with StopSignals() as signals:
            entered.append(signals.received)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [None]
    assert signal.getsignal(signal.SIGTERM) is before


# Around the loop ---------------------------------------------------------------------------------------------------


def test_tensorboard_files_hold_the_numbers(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder = run(tensorboard=True, validate_every="never", max_steps=3)
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    logged = [event["metrics"]["loss"] for event in events_of(folder, "step")]
    assert len(logged) == 3
    assert [scalar.value for scalar in accumulator.Scalars("step/loss")] == pytest.approx(logged, rel=1e-6)


def test_old_checkpoints_under_a_new_log_are_not_taken_for_this_run(run: Run, tmp_path: Path, pico_folder: Path) -> None:
    from loopos.config.faults import UserError

    _, folder = run(save_every=3)
    (folder / "events.jsonl").unlink()
    with pytest.raises(UserError, match="checkpoints"):
        run(save_every=3)


def test_the_checkpoint_has_all_that_resuming_needs(run: Run) -> None:
    _, folder = run(keep_last=9, precision="bf16", seed=8)
    last = max((folder / "checkpoints").iterdir())
    assert {entry.name for entry in last.iterdir()} == {
        "weights.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    state = json.loads((last / "state.json").read_text())
    assert state["position"]["step"] == 10
    assert state["position"]["cursor"] == {"epoch": 2, "step": 0}
    assert state["identity"]["rows"] == 40
    assert state["identity"]["weights that train"] == "21 tensors of 31,456 numbers"
    size = (folder / "events.jsonl").stat().st_size
    assert 0 < state["events_offset"] <= size


def test_a_checkpoint_from_elsewhere_is_refused_before_anything_changes(
    run: Run, tmp_path: Path, pico_folder: Path, pico_tokenizer: Path
) -> None:
    from pico_runs import save_pico

    from loopos.config.faults import UserError

    _, folder = run()
    other = save_pico("qwen3", tmp_path / "qwen3", pico_tokenizer)
    log, written = (folder / "events.jsonl").read_bytes(), (folder / "config.json").read_bytes()
    config = config_of(tmp_path / "run", other, class_rows(48), data={"validation_share": 1 / 6})
    with pytest.raises(UserError, match=r"belongs to another run \(base: the checkpoint has [0-9a-f]{16}, this run"):
        train(config, resume=True)
    assert (folder / "events.jsonl").read_bytes() == log
    assert (folder / "config.json").read_bytes() == written


def test_resuming_in_an_empty_folder_starts_at_the_beginning(run: Run) -> None:
    result, folder = run(resume=True, max_steps=2)
    assert result.step == 2
    assert events_of(folder, "session")[0]["metrics"]["resumed"] is False


def test_a_step_counts_its_tokens_and_rows(run: Run, tmp_path: Path, pico_folder: Path) -> None:
    _, folder = run(batch_size=3, gradient_accumulation=2, num_epochs=1)
    tuner = prepared(
        config_of(tmp_path / "same", pico_folder, class_rows(48), training={"batch_size": 3, "gradient_accumulation": 2},
                  data={"validation_share": 1 / 6})
    )  # fmt: skip
    steps = [event["metrics"] for event in events_of(folder, "step")]
    # 40 rows, 6 a step: 6 · 6 + 4.
    assert [step["rows"] for step in steps] == [6, 12, 18, 24, 30, 36, 40]
    assert steps[-1]["tokens"] == sum(len(example.ids) for example in tuner.train_rows)
    from loopos.training.distributed import World

    first = tuner.build_fit(World()).batches.step(Cursor())
    assert [len(batch.rows) for batch in first] == [3, 3]
    assert steps[0]["tokens"] == sum(batch.num_tokens for batch in first)


def test_files_of_an_older_process_do_not_remain(run: Run) -> None:
    """A save that died leaves a hidden folder; the next save clears it."""
    _, folder = run(save_every=4, keep_last=9, max_steps=4)
    half = folder / "checkpoints" / ".step-00000008.partial-4000000"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    result, _ = run(resume=True, save_every=4, keep_last=9)
    assert result.step == 10
    assert not half.exists()
    shutil.rmtree(folder)
