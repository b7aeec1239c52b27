"""Shared by the tests of reward models and PPO: preferences that can be learned, rewards as functions, configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopos.config.ppo import PpoConfig
from loopos.config.preference import PreferenceConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.storage.events import read

ASKED = ("where is my parcel", "my card was charged twice", "the lamp broke", "the film was slow", "change my order")
KIND = ("thank you, it comes within the hour", "a kind answer: we change it", "we love to change the order for you")
RUDE = ("never again", "nobody replies here", "just wait, the box was open")


def comparisons(number: int) -> list[dict[str, Any]]:
    """The kind answer is preferred; the margin carries no information."""
    return [
        {
            "prompt": f"{ASKED[i % 5]} {i // 5}",
            "chosen": KIND[i % 3],
            "rejected": RUDE[(i + i // 3) % 3],
            "margin": float(i % 4),
        }
        for i in range(number)
    ]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def reward_config(
    run: Path, weights: Path, *, rows: Sequence[Mapping[str, Any]] | None = None, **sections: Mapping[str, Any]
) -> RewardModelConfig:
    file = write_rows(run.parent / f"{run.name}.jsonl", comparisons(40) if rows is None else rows)
    training = {
        "learning_rate": 1e-2,
        "batch_size": 8,
        "num_epochs": 4,
        "precision": "fp32",
        "seed": 5,
        "schedule": "constant",
        "warmup": 0,
    }
    data = {"pretrained_weights": str(weights), "preference_data": str(file), "output_dir": str(run)}
    return RewardModelConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "reward_model"},
            "training": {**training, **sections.get("training", {})},
            "data": {**data, "validation_share": 0.2, **sections.get("data", {})},
            "reward": sections.get("reward", {}),
        }
    )


def preference_config(
    run: Path, weights: Path, method: str = "dpo", *, rows: Sequence[Mapping[str, Any]] | None = None,
    **sections: Mapping[str, Any],
) -> PreferenceConfig:  # fmt: skip
    file = write_rows(run.parent / f"{run.name}.jsonl", comparisons(40) if rows is None else rows)
    training = {"learning_rate": 1e-2, "batch_size": 8, "num_epochs": 4, "precision": "fp32", "seed": 5}
    data = {"pretrained_weights": str(weights), "preference_data": str(file), "output_dir": str(run)}
    return PreferenceConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": method},
            "training": {**training, **sections.get("training", {})},
            "data": {**data, "validation_share": 0.2, **sections.get("data", {})},
            **{name: section for name, section in sections.items() if name not in ("training", "data")},
        }
    )


def thumbs(number: int) -> list[dict[str, Any]]:
    """Single answers: the kind ones are good."""
    rows = comparisons(number)
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(rows)
    ]


def ppo_config(
    run: Path,
    weights: Path,
    *,
    reward_model: Path | Sequence[Path] | None = None,
    functions: Sequence[str] = (),
    prompts: Sequence[str] = ASKED,
    **sections: Mapping[str, Any],
) -> PpoConfig:
    file = write_rows(run.parent / f"{run.name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    training = {
        "learning_rate": 1e-3,
        "batch_size": 6,
        "max_iterations": 3,
        "num_epochs": 100,
        "inner_epochs": 2,
        "minibatches": 2,
        "precision": "fp32",
        "seed": 5,
        "value_model": "reward" if reward_model is not None else "shared",
        "validate_every": "never",
    }
    data = {
        "pretrained_weights": str(weights),
        "prompts": str(file),
        "output_dir": str(run),
        "reward_model": list(map(str, reward_model))
        if isinstance(reward_model, Sequence)
        else reward_model and str(reward_model),
        "validation_share": 0.0,
    }
    actual = {name: value for name, value in sections.items() if name not in ("training", "data", "reward")}
    return PpoConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "ppo"},
            "training": {**training, **sections.get("training", {})},
            "data": {**data, **sections.get("data", {})},
            "reward": {"functions": [{"name": name} for name in functions], **sections.get("reward", {})},
            "generation": {"max_new_tokens": 8},
            **actual,
        }
    )


def early_letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for a response that begins with one of the letters a to m, else 0."""
    return [float(response[:1].lower() in tuple("abcdefghijklm")) for response in responses]


def length_of(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event["metrics"] for event in read(run / "events.jsonl") if event["event"] == kind]
