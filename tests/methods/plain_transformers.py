"""Outputs of a model with a head in plain transformers, next to those of LoopOS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pico_runs import class_rows, config_of, train
from transformers import pipeline

from loopos.evaluation.predictor import Predictor

LABELS: Mapping[str, list[Any]] = {
    "classification": ["a", "b", "c"],
    "multi_label": [["a"], ["b"], ["a", "c"]],
    "regression": [41.5, 47.0, 37.0],
}
TEXTS = ["good the parcel came late", "bad", "where my card was charged a lovely ending please change it", "film order"]


def trained(run: Path, weights: Path, task: str, *, lora: bool = False, **model: Any) -> Path:
    """A short run of a task; its folder."""
    training: dict[str, Any] = {"num_epochs": 1}
    if lora:
        training |= {"trainable": "lora", "lora": {"rank": 4, "alpha": 64}}
    train(config_of(run, weights, class_rows(24, LABELS[task]), model={"task": task, **model}, training=training))
    return run


def by_loopos(folder: Path, texts: list[str] = TEXTS) -> list[list[float]]:
    """Probabilities in the order of the classes, or the value, of each text."""
    answers = Predictor.open(folder, precision="fp32").predict(texts)
    return [[answer["value"]] if "value" in answer else list(answer["probabilities"].values()) for answer in answers]


def by_pipeline(
    folder: Path, texts: list[str] = TEXTS, *, trust: bool = False, side: str = "right", batch_size: int = 4
) -> list[list[float]]:
    """The same by transformers' pipeline, as the card shows it."""
    run: Any = pipeline("text-classification", model=str(folder), trust_remote_code=trust, dtype=torch.float32)
    run.tokenizer.padding_side = side
    labels = [run.model.config.id2label[index] for index in range(run.model.config.num_labels)]
    found = []
    for answer in run(texts, top_k=None, batch_size=batch_size):
        scores = {each["label"]: each["score"] for each in answer}
        assert len(scores) == len(labels)
        found.append([scores[label] for label in labels])
    return found


def largest(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest difference of two such tables."""
    return float((torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).abs().max())


def cell(folder: Path) -> str:
    """How a folder opens in plain transformers, and how far its answers are from LoopOS's, pads on either side."""
    expected = by_loopos(folder)
    trust = False
    try:
        by_pipeline(folder)
    except ValueError as problem:
        if "trust_remote_code=True" not in str(problem):
            raise
        trust = True
    differences = [largest(expected, by_pipeline(folder, trust=trust, side=side)) for side in ("right", "left")]
    return f"{'refuses; trusted' if trust else 'plain'} {max(differences):.0e}"
