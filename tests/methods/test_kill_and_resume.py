"""Law 4: a run killed at any instant and resumed ends with the bits of the uninterrupted run."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_runs import NUM_KILLS, check_kills_leave_no_trace, digest
from pico_runs import slow_but

from loopos.config.diagnostics import UserError
from loopos.methods.fine_tuning import FineTuner
from loopos.storage.events import fingerprint, read
from loopos.training.progress import RunProgress

Build = Callable[..., Any]

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"schedule": "cosine", "warmup": 3},
    "lora": {"trainable": "lora", "lora": {"rank": 4, "dropout": 0.2}, "schedule": "plateau", "plateau_patience": 0},
}


def train(config: Any, *, resume: bool) -> Any:
    return FineTuner(config, progress=RunProgress(quiet=True)).train(resume=resume)


def bits_of(run: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint's tensors, of the exported model and of the metrics."""
    last = max((run / "checkpoints").glob("step-*"))
    files = [*sorted(last.glob("*.safetensors")), *sorted((run / "model").glob("*.safetensors"))]
    assert {"weights.safetensors", "optimizer.safetensors", "model.safetensors", "head.safetensors"} <= {
        f.name for f in files
    }
    return {**{f"{f.parent.name}/{f.name}": digest(f) for f in files}, "metrics": fingerprint(run / "events.jsonl")}


def build(fine_tuning_config: Build, run: Path, variant: str) -> Any:
    settings = {"num_epochs": 4, "validate_every": 5, "save_every": 3, "keep_last": 2, "seed": 11, **VARIANTS[variant]}
    return fine_tuning_config(rows=90, training=settings, data={"output_dir": str(run), "validation_share": 0.15})


@pytest.mark.parametrize("variant", slow_but("full", VARIANTS))
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(variant: str, fine_tuning_config: Build, tmp_path: Path) -> None:
    began = time.monotonic()
    whole = build(fine_tuning_config, tmp_path / "whole", variant)
    train(whole, resume=False)
    seconds = time.monotonic() - began
    expected = bits_of(tmp_path / "whole")
    assert sum(e["event"] == "step" for e in read(tmp_path / "whole" / "events.jsonl")) == 40

    config = build(fine_tuning_config, tmp_path / "killed", variant)
    check_kills_leave_no_trace(
        lambda: train(config, resume=True),
        tmp_path / "killed",
        bits_of,
        expected,
        kills=NUM_KILLS,
        seconds=seconds,
        latest=0.6,
        seed=f"{variant} moments",
    )


@pytest.mark.parametrize(
    "damage", slow_but("flipped bit", ["truncated", "flipped bit", "missing file", "half-written folder"])
)
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_used(
    damage: str, fine_tuning_config: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"num_epochs": 2, "save_every": 4, "keep_last": 5, "validate_every": "never", "seed": 3}
    data = {"validation_share": 0.0}
    whole = fine_tuning_config(rows=90, training=settings, data={**data, "output_dir": str(tmp_path / "whole")})
    train(whole, resume=False)
    config = fine_tuning_config(training=settings, data={**data, "output_dir": str(tmp_path / "damaged")})
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    folders = sorted((tmp_path / "damaged" / "checkpoints").iterdir())
    last, weights = folders[-1], folders[-1] / "weights.safetensors"
    assert len(folders) >= 3
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "missing file":
        weights.unlink()
    else:
        (last / "manifest.json").unlink()
    FineTuner(config, progress=RunProgress()).train(resume=True)
    summary = capsys.readouterr().err
    assert last.name in summary
    assert f"resumed from the checkpoint of step {int(folders[-2].name[5:])}" in summary
    assert bits_of(tmp_path / "damaged") == bits_of(tmp_path / "whole")


def test_a_finished_run_resumed_changes_nothing(fine_tuning_config: Build, tmp_path: Path) -> None:
    config = fine_tuning_config()
    train(config, resume=False)
    before = bits_of(tmp_path / "run")
    result = train(config, resume=True)
    assert result.stopped_by == "epochs"
    assert bits_of(tmp_path / "run") == before


def test_a_run_is_not_overwritten(fine_tuning_config: Build) -> None:
    config = fine_tuning_config()
    train(config, resume=False)
    with pytest.raises(UserError, match="--resume"):
        train(config, resume=False)


def test_a_checkpoint_of_other_data_is_refused(fine_tuning_config: Build) -> None:
    train(fine_tuning_config(training={"num_epochs": 2}), resume=False)
    with pytest.raises(UserError, match=r"training\.batch_size: was 8, is 4\n"):
        train(fine_tuning_config(training={"num_epochs": 2, "batch_size": 4}), resume=True)


def test_sigterm_saves_and_the_resumed_run_is_the_uninterrupted_one(fine_tuning_config: Build, tmp_path: Path) -> None:
    config = fine_tuning_config(rows=90, training={"num_epochs": 3, "save_every": "never"})
    train(config, resume=False)
    expected = bits_of(tmp_path / "run")

    other = fine_tuning_config(
        training={"num_epochs": 3, "save_every": "never"}, data={"output_dir": str(tmp_path / "other")}
    )
    tuner = FineTuner(other, progress=RunProgress(quiet=True))
    stepped = RunProgress.step

    def stop_at_seven(self: RunProgress, step: int, *arguments: Any) -> None:
        stepped(self, step, *arguments)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    tuner.progress.step = stop_at_seven.__get__(tuner.progress)  # type: ignore[method-assign]
    result = tuner.train()
    assert (result.stopped_by, result.step, result.interrupted) == ("SIGTERM", 7, True)
    assert not (tmp_path / "other" / "model").exists()
    train(other, resume=True)
    assert bits_of(tmp_path / "other") == expected
