"""Contradictions between keys that the table of broken configs cannot show with one added line, and the notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pytest

from loopos.config.diagnostics import Diagnostic
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.keys import BUILT_IN_METRICS, METRICS, Task
from loopos.config.load import LoadedConfig

Faults = Callable[..., tuple[Diagnostic, ...]]
Loads = Callable[..., LoadedConfig]

BROKEN: list[tuple[list[str], str, str]] = [
    (["model.task=regression"], "model.num_classes", "1, or nothing"),
    (["model.num_classes=1", "model.task=classification"], "model.num_classes", "at least 2"),
    (["model.num_classes=1", "model.task=multi_label"], "model.num_classes", "at least 2"),
    (["model.num_classes=null", "model.task=regression", 'model.labels=["a"]'], "model.labels", "no class names"),
    (["model.num_classes=null", 'model.labels=["a"]'], "model.labels", "at least 2 classes"),
    (
        ["model.num_classes=null", 'model.labels=["a","b"]', "model.class_weights=[1]"],
        "model.class_weights",
        "one weight",
    ),
    (["model.task=multi_label", "model.class_weights=balanced"], "model.class_weights", "null"),
    (["model.task=multi_label", "model.label_smoothing=0.1"], "model.label_smoothing", "0"),
    (["model.num_classes=1", "model.task=regression", "model.label_smoothing=0.1"], "model.label_smoothing", "0"),
    (["model.task=classification", "model.regression_loss=huber"], "model.regression_loss", "regression"),
    (["model.task=classification", "training.metric=mae"], "training.metric", "one of loss, accuracy"),
    (["model.task=multi_label", "training.metric=accuracy"], "training.metric", "subset_accuracy"),
    (
        ["model.task=classification", 'training.early_stopping={"patience": 1, "metric": "r2"}'],
        "training.early_stopping.metric",
        "one of loss",
    ),
    (["data.validation_share=0", "training.early_stopping.patience=1"], "training.early_stopping", "validation rows"),
    (["data.validation_share=0.0", "training.schedule=plateau"], "training.schedule", "another schedule"),
    (["data.pretrained_weights=new", "data.tokenizer=a/b", "model.d_ff=null"], "model", "need all five sizes"),
    (["data.pretrained_weights=new", "data.tokenizer=a/b", "model.num_heads=128"], "model.d_model", "an even number"),
    (["data.pretrained_weights=bare.bin", "model.vocab_size=null"], "model", "need all five sizes"),
    (["training.precision=fp16", "training.device=mps"], "training.precision", "auto, fp32 or bf16"),
    (["training.optimizer=adafactor", "training.momentum=0.5"], "training.momentum", "0, or optimizer"),
    (["data.pretrained_weights=weights", "data.output_dir=./weights"], "data.output_dir", "another folder"),
]

GOOD: list[list[str]] = [
    ["model.num_classes=null", "model.task=regression"],
    ["model.num_classes=1", "model.task=regression", "model.regression_loss=huber", "training.metric=spearman"],
    ["model.num_classes=1"],
    ["model.num_classes=2", 'model.labels=["a","b"]', "model.class_weights=[1, 2.5]"],
    ["model.class_weights=balanced", "model.label_smoothing=0.1"],
    ["model.num_key_value_heads=2"],
    ["data.pretrained_weights=new", "data.tokenizer=smollm2-135m"],
    ["data.pretrained_weights=new", "data.tokenizer=org/name"],
    ["data.pretrained_weights=org/name-0.5B"],
    ["data.pretrained_weights=bare.bin"],
    ["data.pretrained_weights=weights", "model={}"],
    ["data.training_data=org/name", "data.subset=en", "data.validation_split=test", "data.validation_share=0"],
    ["data.training_data=*.jsonl"],
    ["data.training_data=weights"],
    ["data.streaming=true", "data.max_rows=100"],
    ["data.validation_share=0"],
    ["data.validation_share=0", "data.validation_data=rows.jsonl", "training.early_stopping.patience=1"],
    ["training.optimizer=muon", "training.momentum=0.95"],
    ["training.freeze_layers=4", "training.unfreeze_step=9", "training.max_steps=10", "training.warmup=9"],
    ["training.schedule=warmup_stable_decay", "training.warmup=0.5", "training.decay_share=0.5"],
    ["training.trainable=head"],
    ['training.lora={"target_modules": ["q_proj", "v_proj"]}', "training.trainable=lora"],
    ["training.max_grad_norm=null", "training.validate_every=5", "training.save_every=10"],
    ["training.betas=[0, 0.95]", "training.optimizer=adamw"],
    ["training.learning_rate=1"],
]


@pytest.fixture
def held(folder: Path) -> Path:
    (folder / "bare.bin").write_bytes(b"x")
    (folder / "weights").mkdir()
    return folder


@pytest.mark.parametrize(("overrides", "field", "expected"), BROKEN, ids=[str(row[0]) for row in BROKEN])
def test_each_contradiction_is_one_diagnostic(
    diagnostics_in: Faults, held: Path, good: str, overrides: Sequence[str], field: str, expected: str
) -> None:
    (diagnostic,) = diagnostics_in(good, overrides)
    assert diagnostic.field == field
    assert expected in (diagnostic.expected or diagnostic.actual)


@pytest.mark.parametrize("overrides", GOOD, ids=[str(row) for row in GOOD])
def test_what_is_no_contradiction_loads(
    diagnostics_in: Faults, held: Path, good: str, overrides: Sequence[str]
) -> None:
    assert diagnostics_in(good, overrides) == ()


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        (["training.learning_rate=1e-4"], []),
        (["training.num_workers=1"], ["training.num_workers"]),
        (["data.validation_share=0"], ["training.save_every"]),
        (["training.validate_every=never"], ["training.save_every"]),
        (["training.validate_every=never", "training.save_every=5"], []),
        (["training.lora={}"], ["training.lora"]),
        (["training.trainable=lora", "training.optimizer=sgd"], ["training.learning_rate", "training.optimizer"]),
        (["training.trainable=lora"], []),
        (["training.trainable=lora", "training.optimizer=sgd", "training.learning_rate=0.1"], []),
        (["training.betas=[0.9,0.9]"], []),
        (["training.betas=[0.9,0.9]", "training.optimizer=sgd", "training.learning_rate=0.1"], ["training.betas"]),
        (["training.num_cycles=2", "training.decay_share=0.2"], ["training.num_cycles", "training.decay_share"]),
        (["training.minimum_ratio=0.1", "training.schedule=constant"], ["training.minimum_ratio"]),
        (["training.minimum_ratio=0.1"], []),
        (["training.plateau_factor=0.1", "training.plateau_patience=1", "training.schedule=plateau"], []),
        (["model.huber_delta=2"], ["model.huber_delta"]),
        (["data.validation_share=0.2", "data.validation_data=weights"], ["data.validation_share"]),
        (["data.validation_data=./rows.jsonl"], ["data.validation_data"]),
    ],
)
def test_keys_without_effect_are_noted(
    load_text: Loads, held: Path, good: str, overrides: Sequence[str], noted: list[str]
) -> None:
    assert [note.split()[0] for note in load_text(good, overrides).notes] == noted


def test_the_contradicting_key_is_placed_where_the_user_wrote_one(diagnostics_in: Faults, good: str) -> None:
    text = good.replace('"smollm2-135m"', '"new"').replace('    "d_ff": 1536,\n', "")
    size, tokenizer = diagnostics_in(text)
    assert (size.field, size.line, size.actual) == ("model", 2, 'no d_ff with "new": new weights need all five sizes')
    assert (tokenizer.field, tokenizer.line) == ("data.tokenizer", 20)


def test_every_metric_has_a_task_and_every_task_has_loss() -> None:
    assert set(METRICS) == set(get_args(Task))
    assert {metric for metrics in METRICS.values() for metric in metrics} == BUILT_IN_METRICS
    assert all("loss" in metrics for metrics in METRICS.values())


def test_whether_a_run_validates(load_text: Loads, good: str) -> None:
    expected = {
        (): (True, True),
        ("training.validate_every=never",): (True, False),
        ("data.validation_share=0",): (False, False),
        ("data.validation_share=0", "data.validation_split=test"): (True, True),
    }
    for overrides, answer in expected.items():
        config = load_text(good, overrides).config
        assert isinstance(config, FineTuningConfig)
        assert (config.has_validation, config.validates) == answer
