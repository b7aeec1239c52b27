"""The training loop: when it validates, saves and stops, and what it writes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, events_of, last_weights, prepared, save_pico, train

from loopos.config.diagnostics import UserError
from loopos.data.batches import Cursor
from loopos.training.fit import FitResult

Run = Callable[..., tuple[FitResult, Path]]


def validated_steps(folder: Path) -> list[int]:
    return [event["step"] for event in events_of(folder, "validation")]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(entry.name[5:]) for entry in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("every", "expected"), [("epoch", [0, 5, 10]), (3, [0, 3, 6, 9, 10]), (100, [0, 10]), ("never", [])]
)
def test_validation_runs_when_configured(every: int | str, expected: list[int], run: Run) -> None:
    result, folder = run(validate_every=every)
    assert (result.step, result.stopped_by) == (10, "epochs")
    assert validated_steps(folder) == expected
    assert (result.best_step is None) == (every == "never")
    # The start is validated, but never marked as the best.
    assert not any(event["metrics"]["best"] for event in events_of(folder, "validation") if event["step"] == 0)


@pytest.mark.parametrize(
    ("every", "keep", "expected"),
    [(3, 9, [3, 6, 9, 10]), (3, 2, [9, 10]), ("epoch", 9, [5, 10]), ("never", 9, [10]), ("validation", 9, [5, 10])],
)
def test_checkpoints_are_saved_when_configured_and_the_last_stay(
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


def test_a_finished_run_continues_when_its_limit_is_raised(run: Run, tmp_path: Path) -> None:
    whole, _ = run("whole")
    run("limited", max_steps=6)
    result, _ = run("limited", resume=True)
    assert (result.step, result.stopped_by) == (10, "epochs")
    # A constant learning rate does not depend on the end of the run, so the two runs are equal.
    expected, found = last_weights(tmp_path / "whole"), last_weights(tmp_path / "limited")
    assert len(expected) == 21
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.tokens == result.tokens


# Schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1] * 10),
        ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0.2}, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "linear", "minimum_ratio": 0.5}, [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]),
        ({"schedule": "warmup_stable_decay", "decay_share": 0.4}, [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        (
            {"schedule": "inverse_sqrt", "warmup": 4},
            [0.25, 0.5, 0.75, 1, 1, *(math.sqrt(4 / step) for step in range(5, 10))],
        ),
    ],
)  # fmt: skip
def test_the_learning_rates_of_a_run_by_hand(settings: dict[str, Any], expected: list[float], run: Run) -> None:
    _, folder = run(validate_every="never", **settings)
    rates = [event["metrics"]["learning_rate"] / 0.003 for event in events_of(folder, "step")]
    assert rates == pytest.approx(expected)


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


def test_old_checkpoints_are_not_taken_for_a_new_runs(run: Run) -> None:
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
    # Embeddings 400·32; a layer's attention 2·32·32 + 2·16·32, feed-forward 3·64·32 and norms 2·32; norm; head 3·32.
    numbers = 400 * 32 + 2 * (3 * 32 * 32 + 3 * 64 * 32 + 2 * 32) + 32 + 3 * 32
    assert state["identity"]["weights that train"] == f"21 tensors of {numbers:,} numbers"
    size = (folder / "events.jsonl").stat().st_size
    assert 0 < state["events_offset"] <= size


def test_a_checkpoint_from_elsewhere_is_refused_before_anything_changes(
    run: Run, tmp_path: Path, pico_folder: Path, pico_tokenizer: Path
) -> None:
    _, folder = run()
    other = save_pico("qwen3", tmp_path / "qwen3", pico_tokenizer)
    log, written = (folder / "events.jsonl").read_bytes(), (folder / "config.json").read_bytes()
    config = config_of(tmp_path / "run", other, class_rows(48), data={"validation_share": 1 / 6})
    with pytest.raises(UserError, match=rf"data\.pretrained_weights: was {pico_folder}, is {other}\n"):
        train(config, resume=True)
    assert (folder / "events.jsonl").read_bytes() == log
    assert (folder / "config.json").read_bytes() == written


def test_resuming_in_an_empty_folder_starts_at_step_0(run: Run) -> None:
    result, folder = run(resume=True, max_steps=2)
    assert result.step == 2
    assert events_of(folder, "session")[0]["metrics"]["resumed"] is False


def test_a_step_counts_its_tokens_and_rows(run: Run, tmp_path: Path, pico_folder: Path) -> None:
    _, folder = run(batch_size=3, gradient_accumulation=2, num_epochs=1)
    settings = {"batch_size": 3, "gradient_accumulation": 2}
    fraction = {"validation_share": 1 / 6}
    tuner = prepared(config_of(tmp_path / "same", pico_folder, class_rows(48), training=settings, data=fraction))
    steps = [event["metrics"] for event in events_of(folder, "step")]
    # 40 rows, 6 a step: 6 · 6 + 4.
    assert [step["rows"] for step in steps] == [6, 12, 18, 24, 30, 36, 40]
    assert steps[-1]["tokens"] == sum(len(example.ids) for example in tuner.train_rows)
    first = tuner.build_fit().batches.step(Cursor())
    assert [len(batch.rows) for batch in first] == [3, 3]
    assert steps[0]["tokens"] == sum(batch.num_tokens for batch in first)


def test_files_of_an_older_process_do_not_remain(run: Run) -> None:
    """A killed save leaves a hidden folder; the next save removes it."""
    _, folder = run(save_every=4, keep_last=9, max_steps=4)
    half = folder / "checkpoints" / ".step-00000008.partial-4000000"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    result, _ = run(resume=True, save_every=4, keep_last=9)
    assert result.step == 10
    assert not half.exists()
    shutil.rmtree(folder)
