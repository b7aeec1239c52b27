"""Law 4 for human preferences: killed at any instant, in reward training, rollouts, inner epochs or saves, and resumed, a
run ends with the bits of the uninterrupted run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_runs import NUM_KILLS, check_kills_leave_no_trace, digest
from pico_runs import slow_but
from preference_runs import comparisons, write_rows
from safetensors import safe_open

from loopos.config.rlhf import RlhfConfig
from loopos.methods.rlhf import ReinforcementTrainer
from loopos.storage.events import fingerprint, read
from loopos.training.progress import RunProgress

TRAINING = {
    "learning_rate": 1e-3, "batch_size": 4, "inner_epochs": 3, "minibatches": 2, "save_every": 1,
    "validate_every": 3, "precision": "fp32", "seed": 7, "kl_target": 1.0, "kl_horizon": 50, "optimizer": "adamw",
    "keep_last": 2,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "four models": {},
    "one trunk": {"trainable": "lora"},
}
# Rows and rollouts of a run: one that is killed often enough need not be long.
SIZES = {"four models": (24, 10), "one trunk": (16, 4)}


def config_of(run: Path, weights: Path, variant: str) -> RlhfConfig:
    settings = VARIANTS[variant]
    return RlhfConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "rlhf"},
            "training": {**TRAINING, "num_epochs": 2 if variant == "four models" else 1, **settings},
            "reward_training": {
                "learning_rate": 1e-2, "batch_size": 8, "num_epochs": 2, "save_every": 2, "precision": "fp32", **settings
            },
            "data": {
                "pretrained_weights": str(weights),
                "preference_data": str(run.parent / "rows.jsonl"),
                "validation_share": 0.2,
                "output_dir": str(run),
            },
            "generation": {"max_new_tokens": 8},
            "guards": {"kl": 0.5, "repetition": 0.5},
            "evaluation": {"prompts": 4, "judge": "preference_runs:length_of"},
        }
    )  # fmt: skip


def train(config: RlhfConfig, *, resume: bool) -> None:
    ReinforcementTrainer(config, progress=RunProgress(quiet=True)).train(resume=resume)


def bits_of(run: Path) -> dict[str, str]:
    """SHA-256 of all outputs of a run: last checkpoints of both phases, models, metrics, samples."""
    found = {str(file.relative_to(run)): digest(file) for file in sorted(run.rglob("model/*.safetensors"))}
    for log in sorted(run.rglob("events.jsonl")):
        folder, name = log.parent, str(log.parent.relative_to(run))
        last = max((folder / "checkpoints").glob("step-*"))
        found |= {f"{name}/{file.name}": digest(file) for file in sorted(last.glob("*.safetensors"))}
        found[f"{name}/metrics"] = fingerprint(log)
    return found | {"samples": digest(run / "samples.jsonl")}


@pytest.mark.parametrize("variant", slow_but("one trunk", VARIANTS))
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(variant: str, tmp_path: Path, pico_folder: Path) -> None:
    rows, rollouts = SIZES[variant]
    write_rows(tmp_path / "rows.jsonl", comparisons(rows))
    began = time.monotonic()
    train(config_of(tmp_path / "whole", pico_folder, variant), resume=False)
    seconds = time.monotonic() - began
    expected = bits_of(tmp_path / "whole")
    assert {"./metrics", "reward_model/metrics", "./weights.safetensors", "model/model.safetensors"} <= set(expected)
    kinds = [event["event"] for event in read(tmp_path / "whole" / "events.jsonl")]
    assert kinds.count("rollout") == rollouts
    assert kinds.count("step") == 6 * rollouts

    config = config_of(tmp_path / "killed", pico_folder, variant)
    # These runs are longer than fine-tuning's: LOOPOS_TEST_KILLS=150 makes it thirty for both variants together.
    check_kills_leave_no_trace(
        lambda: train(config, resume=True),
        tmp_path / "killed",
        bits_of,
        expected,
        kills=max(2, NUM_KILLS // 10),
        seconds=seconds,
        latest=0.7,
        seed=f"{variant} moments",
    )


def test_a_checkpoint_inside_an_iteration_holds_its_rollouts(tmp_path: Path, pico_folder: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", comparisons(24))
    config = config_of(tmp_path / "run", pico_folder, "four models")
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"max_steps": 9, "keep_last": 9, "save_every": 1})}
    )
    train(config, resume=False)
    held: dict[int, Callable[..., Any] | set[str]] = {}
    for folder in sorted((tmp_path / "run" / "checkpoints").glob("step-*")):
        file = folder / "carried.safetensors"
        with safe_open(file, "pt") as opened:
            held[int(folder.name.removeprefix("step-"))] = set(opened.keys())
    inside = {"old_logprobs", "advantages", "returns", "values", "prompts", "responses", "reference_logprobs"}
    assert all(inside <= names for step, names in held.items() if step % 6)
    assert [step for step, names in held.items() if not names] == [6]
