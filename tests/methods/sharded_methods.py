"""A small run of every method, whose global batch is the same in any number of processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pico_runs import WORDS, class_rows, config_of, text_of
from preference_runs import ppo_config, preference_config, reward_config, thumbs

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.pretraining import PretrainingConfig
from loopos.storage.events import read

PROBLEMS = [
    {"problem": f"add {a} and {b}", "reasoning": [f"{a} + {b} = {a + b}"] * (1 + a % 2), "answer": str(a + b)}
    for a in range(1, 7)
    for b in range(1, 6)
]
SIZES = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 48, "vocab_size": 300}
# Adam divides by the gradient's own size, and would hide one that is too large by a factor.
PLAIN = {"optimizer": "sgd", "precision": "fp32", "device": "cpu", "seed": 5, "schedule": "constant", "warmup": 0}


def small_run(
    method: str, run: Path, weights: Path, world: int, distributed: Mapping[str, Any], **training: Any
) -> Any:
    """The config of a run of this method in `world` processes, 8 rows a step over all of them."""
    settings = {**PLAIN, "batch_size": 8 // world, **training}
    made = _MADE[method](run, weights, settings)
    # A busy machine may let a process wait for long.
    sharing = made.distributed.model_copy(update={"silence": 120.0, **distributed})
    return made.model_copy(update={"distributed": sharing})


def _fine_tuning(run: Path, weights: Path, settings: dict[str, Any]) -> Any:
    # 29 training rows: the last step of an epoch has fewer than there are processes to deal them to.
    training = {"learning_rate": 0.05, "num_epochs": 2, **settings}
    return config_of(run, weights, class_rows(33), training=training, data={"validation_share": 0.12})


def _pretraining(run: Path, weights: Path, settings: dict[str, Any]) -> Any:
    text = run.parent / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("\n\n".join(text_of(word, number) for number, word in enumerate(WORDS * 2)), encoding="utf-8")
    training = {"learning_rate": 0.1, "max_length": 24, "num_epochs": 2, **settings}
    return PretrainingConfig.model_validate(
        {
            "model": SIZES,
            "computation": {"mode": "pretraining", "method": "autoregressive"},
            "training": training,
            "data": {
                "input_file": str(text),
                "output_dir": str(run),
                "output_weights": str(run.parent / f"{run.name}.bin"),
            },
        }
    )


def _chain_of_thought(run: Path, weights: Path, settings: dict[str, Any]) -> Any:
    rows = run.parent / "problems.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS), encoding="utf-8")
    return ChainOfThoughtConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "chain_of_thought"},
            "training": {"learning_rate": 0.1, "num_epochs": 1, "validate_every": 2, **settings},
            "data": {
                "pretrained_weights": str(weights),
                "reasoning_examples": str(rows),
                "output_dir": str(run),
                "validation_share": 0.2,
            },
            "generation": {"max_new_tokens": 6, "temperature": 0.7},
            "evaluation": {"problems": 3},
        }
    )


def _reward_model(run: Path, weights: Path, settings: dict[str, Any]) -> Any:
    return reward_config(run, weights, training={"learning_rate": 0.1, "num_epochs": 1, **settings})


def _ppo(run: Path, weights: Path, settings: dict[str, Any]) -> Any:
    functions = ["preference_runs:early_letters", "preference_runs:length_of"]
    training = {"learning_rate": 0.05, "max_iterations": 2, **settings, "schedule": "linear"}
    return ppo_config(run, weights, functions=functions, training=training)


def _preference(method: str, run: Path, weights: Path, settings: dict[str, Any], **sections: Any) -> Any:
    rows = thumbs(40) if method == "kto" else None
    training = {"learning_rate": 0.05, "num_epochs": 2, **settings}
    return preference_config(run, weights, method, rows=rows, training=training, **sections)


# One prompt more than two processes, so that their parts differ.
_ANSWERS: dict[str, Any] = {
    "evaluation": {"prompts": 3, "judge": "preference_runs:length_of", "reference_copy": True},
    "generation": {"max_new_tokens": 6},
}


_MADE: Mapping[str, Any] = {
    "fine_tuning": _fine_tuning,
    "pretraining": _pretraining,
    "chain_of_thought": _chain_of_thought,
    "reward_model": _reward_model,
    "dpo": partial(_preference, "dpo"),
    "kto": partial(_preference, "kto"),
    "dpo with answers": partial(_preference, "dpo", **_ANSWERS),
    "ppo": _ppo,
}
METHODS = tuple(_MADE)


def measured(run: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """Kind, step and figures of all that a run measured, in order."""
    kinds = ("step", "validation", "rollout")
    return [(e["event"], e["step"], e["metrics"]) for e in read(run / "events.jsonl") if e["event"] in kinds]
