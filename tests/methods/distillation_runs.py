"""Shared by the tests of distillation: configs over pico models, of which the teacher is another random model."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loopos.config.distillation import DistillationConfig
from loopos.methods.distillation import DistillationTrainer
from loopos.training.progress import RunProgress

WORDS = ("lamp", "film", "card", "order", "box", "hour", "waiter", "march")


def pico_teacher(folder: Path, tokenizer: Path) -> Path:
    """A random Llama that is wider than the student, with the student's tokenizer."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=400, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def rows_of(number: int) -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [
        {"prompt": f"say {WORDS[i % 8]} {i // 8}: ", "completion": " ".join(draw.choices(WORDS, k=draw.randint(2, 5)))}
        for i in range(number)
    ]


def distillation_config(
    run: Path,
    weights: Path,
    teacher: Path | None,
    *,
    rows: list[dict[str, Any]] | None = None,
    **sections: Mapping[str, Any],
) -> DistillationConfig:
    file = run.parent / f"{run.name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(24) if rows is None), encoding="utf-8")
    if rows is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    training = {"learning_rate": 1e-2, "batch_size": 4, "num_epochs": 2, "precision": "fp32", "seed": 5, "warmup": 0}
    data = {"pretrained_weights": str(weights), "training_data": str(file), "output_dir": str(run)}
    return DistillationConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "distillation"},
            "training": {**training, **sections.get("training", {})},
            "data": {
                **data, "teacher": None if teacher is None else str(teacher), "validation_share": 0.25,
                **sections.get("data", {}),
            },
            "evaluation": {"samples": 0},
            **{name: section for name, section in sections.items() if name not in ("training", "data")},
        }
    )  # fmt: skip


def trained(config: DistillationConfig, *, resume: bool = False) -> DistillationTrainer:
    method = DistillationTrainer(config, progress=RunProgress(quiet=True))
    method.train(resume=resume)
    return method
