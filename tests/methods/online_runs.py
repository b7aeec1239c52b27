"""Shared by the tests of online methods: configs of runs on the pico model, and what such runs leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from killed_runs import digest
from preference_runs import ASKED, write_rows

from loopos.config.ppo import PpoConfig
from loopos.methods.ppo import PpoTrainer
from loopos.storage.events import fingerprint
from loopos.training.progress import RunProgress


def online_config(
    run: Path,
    weights: Path,
    method: str,
    *,
    reward: str = "preference_runs:early_letters",
    prompts: Sequence[str] = ASKED,
    **sections: Mapping[str, Any],
) -> PpoConfig:
    """Prompts and a reward function; nothing is validated unless a section says so."""
    file = write_rows(run.parent / f"{run.name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    training = {
        "learning_rate": 1e-3, "batch_size": 12, "gradient_accumulation": 1, "max_iterations": 3, "num_epochs": 1000,
        "precision": "fp32", "seed": 5, "validate_every": "never", "schedule": "constant", "optimizer": "adamw",
        "device": "cpu",
    }  # fmt: skip
    data = {
        "pretrained_weights": str(weights), "prompts": str(file), "output_dir": str(run), "validation_share": 0.0
    }  # fmt: skip
    return PpoConfig.model_validate(
        {
            **sections,
            "computation": {"mode": "posttraining", "method": method},
            "training": {**training, **sections.get("training", {})},
            "reward": {"functions": [{"name": reward}], **sections.get("reward", {})},
            "generation": {"max_new_tokens": 6, "responses_per_prompt": 4, **sections.get("generation", {})},
            "data": {**data, **sections.get("data", {})},
        }
    )


def trained(config: PpoConfig) -> PpoTrainer:
    method = PpoTrainer(config, progress=RunProgress(quiet=True))
    method.train()
    return method


def bits_of(run: Path) -> dict[str, str]:
    last = max((run / "checkpoints").glob("step-*"))
    files = [run / "model" / "model.safetensors", *sorted(last.glob("*.safetensors")), run / "rollouts.jsonl"]
    return {file.name: digest(file) for file in files} | {"metrics": fingerprint(run / "events.jsonl")}


def resumed(config: PpoConfig) -> None:
    PpoTrainer(config, progress=RunProgress(quiet=True)).train(resume=True)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
