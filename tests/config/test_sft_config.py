"""The config of supervised fine-tuning: its keys, those that belong to reasoning, and its checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import ConfigError, Diagnostic
from loopos.config.load import LoadedConfig, load
from loopos.config.methods import config_classes
from loopos.config.sft import SftConfig

Loads = Callable[..., LoadedConfig]


@pytest.fixture
def load_sft(folder: Path) -> Loads:
    """`load_sft(overrides)`: the config of sft on a file of one conversation, with overrides."""
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (folder / "chats.jsonl").write_text(json.dumps(row) + "\n")
    written = {
        "computation": {"mode": "posttraining", "method": "sft"},
        "training": {"learning_rate": 1e-5},
        "data": {"pretrained_weights": "smollm2-135m", "training_data": "chats.jsonl", "output_dir": "out"},
    }

    def loaded(overrides: Sequence[str] = ()) -> LoadedConfig:
        return load(written, overrides, config_classes())

    return loaded


def diagnostics_of(load_sft: Loads, overrides: Sequence[str]) -> tuple[Diagnostic, ...]:
    try:
        load_sft(overrides)
    except ConfigError as error:
        return error.diagnostics
    return ()


def test_three_sections_are_enough(load_sft: Loads) -> None:
    loaded = load_sft()
    config = loaded.config
    assert type(config) is SftConfig
    assert loaded.notes == []
    assert (config.training.optimizer, config.data.train_on, config.evaluation.samples) == ("adamw", "assistant", 3)
    assert (config.data.source_key, config.data.source, config.generates) == ("training_data", "chats.jsonl", False)


@pytest.mark.parametrize(
    "override",
    [
        "data.step_format=hashes",
        "data.reasoning_examples=chats.jsonl",
        "generation.strategy=self_consistency:4",
        "generation.max_reasoning_steps=3",
        "generation.max_step_tokens=3",
        "generation.min_thinking_tokens=3",
        "generation.max_thinking_tokens=3",
        "generation.reward_model=outputs/steps",
        "evaluation.problems=8",
        "evaluation.checker=exact",
        "evaluation.tolerance=0.1",
        "self_improvement.rounds=1",
    ],
)
def test_keys_of_reasoning_belong_to_chain_of_thought(load_sft: Loads, override: str) -> None:
    (diagnostic,) = diagnostics_of(load_sft, [override])
    key = override.split("=")[0]
    assert diagnostic.actual == f'the unknown key "{key.split(".")[0 if key.startswith("self") else 1]}"'
    assert diagnostic.hint == 'it belongs to the method "chain_of_thought"'


def test_every_key_of_reasoning_is_in_the_list_above() -> None:
    """What chain_of_thought knows more than sft, so that a new key of either is decided on."""
    more = {
        f"{section}.{key}"
        for section in ("data", "generation", "evaluation")
        for key in _keys(ChainOfThoughtConfig, section) - _keys(SftConfig, section)
    }
    named = test_keys_of_reasoning_belong_to_chain_of_thought.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {"self_improvement.rounds", *more} == {override.split("=")[0] for override in named}
    for section in ("data", "generation", "evaluation"):
        assert _keys(SftConfig, section) < _keys(ChainOfThoughtConfig, section)


def _keys(config_class: type[Any], section: str) -> set[str]:
    return set(config_class.model_fields[section].annotation.model_fields)


@pytest.mark.parametrize(
    ("overrides", "field", "expected"),
    [
        (["training.metric=accuracy"], "training.metric", '"loss"'),
        (["training.early_stopping.patience=1", "training.early_stopping.metric=r2"],
         "training.early_stopping.metric", '"loss"'),
        (["training.trainable=head"], "training.trainable", '"all" or "lora"'),
        (["data.training_data=gone.jsonl"], "data.training_data", "messages"),
        (["data.training_data=null"], "data.training_data", "text that is not empty"),
        (["data.chat_template=gone.jinja"], "data.chat_template", "a file with a Jinja template"),
        (["evaluation.samples=-1"], "evaluation.samples", "a whole number >= 0"),
    ],
)  # fmt: skip
def test_each_contradiction_has_its_diagnostic(
    load_sft: Loads, overrides: Sequence[str], field: str, expected: str
) -> None:
    (diagnostic,) = diagnostics_of(load_sft, overrides)
    assert diagnostic.field == field
    assert expected in f"{diagnostic.expected} {diagnostic.actual} {diagnostic.hint}"


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        (["evaluation.every=2"], []),
        (["evaluation.every=2", "evaluation.samples=0"], ["evaluation.every"]),
        (["data.max_dropped_share=0.5", "data.over_length=cut"], ["data.max_dropped_share"]),
        (["data.validation_data=./chats.jsonl"], ["data.validation_data"]),
        (["training.head_learning_rate=0.1"], ["training.head_learning_rate"]),
    ],
)
def test_keys_without_effect_are_noted(load_sft: Loads, overrides: Sequence[str], noted: list[str]) -> None:
    assert [note.split()[0] for note in load_sft(overrides).notes] == noted
