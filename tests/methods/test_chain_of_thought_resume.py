"""Law 4 for chain-of-thought: killed at any instant, in training, in generated validation or while chains are sampled, and
resumed, a run ends with the bits of the uninterrupted run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from killed_runs import NUM_KILLS, check_kills_leave_no_trace, digest

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.methods.chain_of_thought import ChainOfThought
from loopos.storage.events import fingerprint, read
from loopos.training.progress import RunProgress

ROWS = [
    {"problem": f"add {a} and {b}", "reasoning": [f"{a} + {b} = {a + b}"] * (a % 3), "answer": str(a + b)}
    for a in range(1, 6)
    for b in range(1, 5)
]
VARIANTS: dict[str, dict[str, Any]] = {
    "packed rows, generated validation": {
        "training": {"num_epochs": 8, "validate_every": 6, "save_every": 4, "schedule": "cosine", "keep_last": 2},
        "data": {"validation_share": 0.2, "streaming": True, "max_rows": 100},
        "generation": {"max_new_tokens": 16, "temperature": 0.7},
        "evaluation": {"problems": 4},
    },
    "a round of self-improvement": {
        "training": {"num_epochs": 40, "save_every": 15, "validate_every": "never"},
        "data": {"validation_share": 0.0},
        "generation": {"max_new_tokens": 48},
        "self_improvement": {"rounds": 1, "samples_per_problem": 4, "temperature": 0.6},
    },
}


def config_of(run: Path, weights: Path, variant: str) -> ChainOfThoughtConfig:
    sections = VARIANTS[variant]
    training = {"learning_rate": 1e-2, "batch_size": 6, "precision": "fp32", "seed": 7, **sections["training"]}
    data = {"pretrained_weights": str(weights), "reasoning_examples": str(run.parent / "rows.jsonl")}
    written = {
        **sections,
        "computation": {"mode": "posttraining", "method": "chain_of_thought"},
        "training": training,
        "data": {**data, "output_dir": str(run), **sections["data"]},
    }
    return ChainOfThoughtConfig.model_validate(written)


def train(config: ChainOfThoughtConfig, *, resume: bool) -> None:
    ChainOfThought(config, progress=RunProgress(quiet=True)).train(resume=resume)


def bits_of(run: Path) -> dict[str, str]:
    """SHA-256 of all outputs of a run: last checkpoints, exported model, metrics, samples, chains found."""
    found = {"model": digest(run / "model" / "model.safetensors")}
    for log in sorted(run.rglob("events.jsonl")):
        folder, name = log.parent, str(log.parent.relative_to(run))
        last = max((folder / "checkpoints").glob("step-*"))
        found |= {f"{name}/{file.name}": digest(file) for file in sorted(last.glob("*.safetensors"))}
        found[f"{name}/metrics"] = fingerprint(log)
    summary = [*run.rglob("samples.jsonl"), *run.rglob("chains-*.jsonl")]
    return found | {str(file.relative_to(run)): digest(file) for file in summary}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(variant: str, tmp_path: Path, pico_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    began = time.monotonic()
    train(config_of(tmp_path / "whole", pico_folder, variant), resume=False)
    seconds = time.monotonic() - began
    expected = bits_of(tmp_path / "whole")
    assert any(event["event"] == "step" for event in read(tmp_path / "whole" / "events.jsonl"))
    assert ("samples.jsonl" in expected) == ("evaluation" in VARIANTS[variant])
    assert any("chains-" in name for name in expected) == ("self_improvement" in VARIANTS[variant])

    config = config_of(tmp_path / "killed", pico_folder, variant)
    # These runs are longer than fine-tuning's: LOOPOS_TEST_KILLS=200 makes it twenty.
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
