"""A nan, a full disk or a signal ends a run cleanly; the resumed run equals the uninterrupted one."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import events_of, last_weights, slow_but
from safetensors.torch import load_file

from loopos.config.diagnostics import Interrupted
from loopos.methods.fine_tuning import FineTuner
from loopos.storage.durable import DiskFull
from loopos.storage.events import fingerprint
from loopos.training import checkpoint_files
from loopos.training.fit import FitResult
from loopos.training.progress import RunProgress
from loopos.training.stopping import StopSignals, steps_end_in_order
from loopos.training.update import NonFiniteStep

Run = Callable[..., tuple[FitResult, Path]]


def validated_steps(folder: Path) -> list[int]:
    return [event["step"] for event in events_of(folder, "validation")]


def break_loss_at(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    """The loss of the `number`-th forward pass is nan; None: of every one."""
    from loopos.training.objectives import TaskObjective

    whole, calls = TaskObjective.loss, [0]

    def loss(self: TaskObjective, batch: Any) -> Any:
        calls[0] += 1
        parts = whole(self, batch)
        return {"loss": parts["loss"] * math.nan} if number in (None, calls[0]) else parts

    monkeypatch.setattr(TaskObjective, "loss", loss)


def test_a_nan_stops_the_run_and_names_what_is_whole(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_loss_at(monkeypatch, 7)
    with pytest.raises(
        NonFiniteStep, match=r"step 7: not a finite number: loss nan.*last complete checkpoint is step 5"
    ):
        run()
    assert [event["step"] for event in events_of(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6]
    assert all(bool(tensor.isfinite().all()) for tensor in last_weights(tmp_path / "run").values())
    monkeypatch.undo()
    result, _ = run(resume=True)
    assert result.step == 10


def test_a_nan_is_skipped_and_counted_if_configured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    break_loss_at(monkeypatch, 3)
    _, folder = run(on_nonfinite="skip", save_every=1, keep_last=99, validate_every="never")
    steps = events_of(folder, "step")
    assert [event["metrics"]["skipped"] for event in steps] == [0, 0, *[1] * 8]
    assert steps[2]["metrics"]["loss"] == "nan"
    states = [load_file(entry / "weights.safetensors") for entry in sorted((folder / "checkpoints").iterdir())]
    name = "head.weight"
    assert torch.equal(states[1][name], states[2][name])
    assert not torch.equal(states[2][name], states[3][name])


def test_a_run_that_took_no_step_is_no_success(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_loss_at(monkeypatch, None)
    summary = r"^all 10 steps were skipped because loss or gradient was not finite; the weights are unchanged and"
    with pytest.raises(NonFiniteStep, match=summary) as output:
        run(on_nonfinite="skip", validate_every="never")
    assert output.value.exit_code == 1
    assert len(events_of(tmp_path / "run", "step")) == 10
    assert not events_of(tmp_path / "run", "end")
    assert not (tmp_path / "run" / "model").exists()
    # A resumed run has the same result, unless more steps follow.
    with pytest.raises(NonFiniteStep, match=summary):
        run(on_nonfinite="skip", validate_every="never", resume=True)
    monkeypatch.undo()
    result, _ = run(on_nonfinite="skip", validate_every="never", num_epochs=3, resume=True)
    assert result.step == 15


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
    saves, written = [0], checkpoint_files.write_group

    def fill_up(folder: Path, group: str, *arguments: Any) -> Any:
        saves[0] += group == "weights"
        if saves[0] == 2:
            (folder / "weights.safetensors").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return written(folder, group, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files, "write_group", fill_up)
        with pytest.raises(DiskFull, match=r"the disk is full: the checkpoint of step 6 needs [\d,]+ bytes") as caught:
            run(save_every=3, keep_best=False)
    assert caught.value.exit_code == 74
    assert len(str(caught.value).splitlines()) == 1
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    result, _ = run(resume=True, save_every=3, keep_best=False)
    assert result.step == expected.step
    assert fingerprint(tmp_path / "run" / "events.jsonl") == fingerprint(whole / "events.jsonl")


def test_a_full_disk_while_the_log_is_written_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.write

    def fill_up(descriptor: int, content: bytes) -> int:
        if b'"event":"step","step":4' in content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(descriptor, content)

    monkeypatch.setattr(os, "write", fill_up)
    with pytest.raises(DiskFull, match="an event"):
        run()


# Signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step"),
    slow_but(
        [("SIGTERM", 10), ("SIGHUP", 5)],
        [("SIGTERM", 3), ("SIGTERM", 5), ("SIGTERM", 10), ("SIGHUP", 5), ("SIGUSR1", 4)],
    ),
)
def test_a_signal_at_a_step_that_validates_loses_nothing(
    name: str, step: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run catches up on a validation that was due, also after the last step."""
    settings = {"schedule": "plateau", "plateau_patience": 0, "early_stopping": {"patience": 9}}
    expected, whole = run("whole", **settings)
    stepped = RunProgress.step

    def stop(self: RunProgress, number: int, *arguments: Any) -> None:
        stepped(self, number, *arguments)
        if number == step:
            os.kill(os.getpid(), signal.Signals[name])

    with monkeypatch.context() as patched:
        patched.setattr(RunProgress, "step", stop)
        result, folder = run(**settings)
    assert (result.step, result.stopped_by, result.interrupted) == (step, name, True)
    assert validated_steps(folder)[-1] < step
    assert not (folder / "model").exists()
    result, _ = run(resume=True, **settings)
    assert (result.step, result.stopped_by, result.best_step) == (10, "epochs", expected.best_step)
    assert fingerprint(folder / "events.jsonl") == fingerprint(whole / "events.jsonl")
    for name in ("model.safetensors", "head.safetensors"):
        assert (folder / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_ctrl_c_answers_at_once_and_a_second_one_names_the_last_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both come within step 4, before it has ended."""
    from loopos.training.objectives import TaskObjective

    whole, output = TaskObjective.loss, list[str]()

    def loss(self: TaskObjective, batch: Any) -> Any:
        if len(output) == 3:
            capfd.readouterr()
            os.kill(os.getpid(), signal.SIGINT)
            output.append(capfd.readouterr().err)
            os.kill(os.getpid(), signal.SIGINT)
        output.append("")
        return whole(self, batch)

    monkeypatch.setattr(TaskObjective, "loss", loss)
    with pytest.raises(
        Interrupted, match=r"after step 3; the last complete checkpoint is step 2; .*--resume"
    ) as caught:
        run(save_every=2, validate_every="never")
    assert caught.value.exit_code == 130
    assert output[3] == "\nSIGINT: stopping after this step; Ctrl-C again to stop now\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("moment", ["load_data", "export"])
def test_a_signal_before_the_first_step_or_in_the_export_has_a_message_and_a_code(
    moment: str, name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}

    def work(self: FineTuner) -> None:
        os.kill(os.getpid(), signal.Signals[name])

    with monkeypatch.context() as patched:
        patched.setattr(FineTuner, moment, work)
        with pytest.raises(Interrupted, match=f"ended by {name} outside of a step: .*--resume continues") as caught:
            run(max_steps=1, validate_every="never")
    assert caught.value.exit_code == (130 if name == "SIGINT" else 0)
    assert {number: signal.getsignal(number) for number in before} == before
    if moment == "load_data":
        # Nothing was begun, and nothing stays.
        assert not (tmp_path / "run").exists()
    else:
        assert run(max_steps=1, validate_every="never", resume=True)[0].step == 1
        assert (tmp_path / "run" / "model").is_dir()


def test_a_process_that_ignores_hangups_keeps_ignoring_them() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with steps_end_in_order() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_not_handled_outside_the_main_thread() -> None:
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


# A full disk under the other files of a run ------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but("events.jsonl", ["config.json", "events.jsonl"]))
def test_a_full_disk_at_the_start_of_a_resumed_run_leaves_its_files_whole(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = run(max_steps=4, save_every=2, keep_last=9)
    before = {file: file.read_bytes() for file in (folder / "config.json", folder / "events.jsonl")}

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace" if name == "config.json" else "ftruncate", full)
        with pytest.raises(DiskFull, match=r"the disk is full.*--resume"):
            run(max_steps=6, save_every=2, keep_last=9, resume=True)
    assert (folder / "events.jsonl").read_bytes() == before[folder / "events.jsonl"]
    if name == "config.json":
        assert (folder / "config.json").read_bytes() == before[folder / "config.json"]
    assert not [entry for entry in folder.iterdir() if "partial" in entry.name]
    assert run(max_steps=6, save_every=2, keep_last=9, resume=True)[0].step == 6
