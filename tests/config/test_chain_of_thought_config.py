"""The config of chain-of-thought training: the guide's own, broken ones by line, contradictions, notes, the schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loopos.config.chain_of_thought import ChainOfThoughtConfig, StepFormatSection
from loopos.config.diagnostics import ConfigError, Diagnostic
from loopos.config.load import LoadedConfig, load, schema

GUIDE = Path(__file__).parents[2] / "configs" / "chain_of_thought.json"
GOOD = """{
  "model": {
    "num_layers": 6
  },
  "computation": {
    "mode": "posttraining",
    "method": "chain_of_thought"
  },
  "training": {
    "learning_rate": 0.00001
  },
  "data": {
    "pretrained_weights": "smollm2-135m",
    "reasoning_examples": "rows.jsonl",
    "output_dir": "outputs/run"
  }
}
"""
Loads = Callable[..., LoadedConfig]
Faults = Callable[..., tuple[Diagnostic, ...]]


@pytest.fixture
def load_chain(folder: Path) -> Loads:
    def loaded(text: str, overrides: Sequence[str] = ()) -> LoadedConfig:
        (folder / "run.json").write_text(text)
        return load("run.json", overrides, {("posttraining", "chain_of_thought"): ChainOfThoughtConfig})

    return loaded


@pytest.fixture
def chain_diagnostics(load_chain: Loads) -> Faults:
    def diagnostics(text: str, overrides: Sequence[str] = ()) -> tuple[Diagnostic, ...]:
        try:
            load_chain(text, overrides)
        except ConfigError as error:
            return error.diagnostics
        return ()

    return diagnostics


def test_the_guide_s_config_is_valid_but_for_its_missing_files(chain_diagnostics: Faults) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    weights, rows = chain_diagnostics(text)
    assert (weights.field, weights.line) == ("data.pretrained_weights", 20)
    assert (rows.field, rows.line) == ("data.reasoning_examples", 21)
    assert 'one row looks like {"problem": ' in rows.hint
    assert rows.hint.endswith("or lines: Problem: What is 17 + 26? / 7 + 6 = 13, carry 1 / 1 + 2 + 1 = 4 / Answer: 43")
    assert json.loads(text) == {
        "model": {
            "type": "transformer", "d_model": 384, "num_heads": 8, "num_layers": 6, "d_ff": 1536, "vocab_size": 16000
        },
        "computation": {"mode": "posttraining", "method": "chain_of_thought"},
        "training": {"learning_rate": 1e-05, "batch_size": 16, "num_epochs": 3},
        "data": {
            "pretrained_weights": "models/pretrained_model.bin",
            "reasoning_examples": "data/reasoning_examples.txt",
            "output_dir": "outputs/chain_of_thought",
        },
    }  # fmt: skip


def test_the_guide_s_config_with_its_files(load_chain: Loads, folder: Path) -> None:
    for name in ("models/pretrained_model.bin", "data/reasoning_examples.txt"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"x")
    loaded = load_chain(GUIDE.read_text(encoding="utf-8"))
    config = loaded.config
    assert isinstance(config, ChainOfThoughtConfig)
    assert loaded.notes == []
    assert config.training.optimizer == "adamw"
    assert config.data.source == "data/reasoning_examples.txt"
    assert (config.data.train_on, config.data.over_length, config.data.step_format) == ("assistant", "drop", "think")
    assert (config.validates, config.generates, config.self_improvement) == (True, True, None)
    assert config.generation.chains == 1


def test_a_resolved_config_is_a_valid_config(load_chain: Loads) -> None:
    overrides = ['data.step_format={"delimiter": "|"}', "self_improvement.rounds=2", "generation.temperature=0.7"]
    first = load_chain(GOOD, overrides).config
    assert load_chain(json.dumps(first.model_dump(mode="json"))).config == first
    assert isinstance(first, ChainOfThoughtConfig)
    assert isinstance(first.data.step_format, StepFormatSection)


# (section, what is added to it, field, piece of what is expected)
BROKEN: list[tuple[str, str, str, str]] = [
    ("model", '"num_classes": 10', "model.num_classes", "a key of model"),
    ("model", '"d_model": 0', "model.d_model", "a whole number >= 1"),
    ("training", '"trainable": "head"', "training.trainable", '"all" or "lora"'),
    ("training", '"metric": "macro_f1"', "training.metric", "one of loss, accuracy"),
    ("training", '"optimizer": "lion"', "training.optimizer", '"adamw"'),
    ("training", '"freeze_layers": 7', "training.freeze_layers", "at most num_layers (6)"),
    ("data", '"step_format": "tags"', "data.step_format", '"think", "hashes", "lines" or a section'),
    ("data", '"step_format": {"delimiter": ""}', "data.step_format.delimiter", "text that is not empty"),
    ("data", '"step_format": {"closing": "\\n"}', "data.step_format.closing", "visible text"),
    ("data", '"step_format": {"close": "x"}', "data.step_format.close", "a key of data.step_format"),
    ("data", '"train_on": "user"', "data.train_on", '"all", "assistant" or "answer"'),
    ("data", '"over_length": "truncate"', "data.over_length", '"drop", "cut" or "error"'),
    ("data", '"max_dropped_share": 2', "data.max_dropped_share", "a number >= 0 and <= 1"),
    ("data", '"columns": {"question": "q"}', "data.columns.question", '"problem", "reasoning"'),
    ("data", '"columns": {"problem": "q", "answer": "q"}', "data.columns.answer", "one role per column"),
    ("data", '"training_data": "rows.jsonl"', "data.training_data", "one of the two"),
    ("data", '"validation_data": "none.jsonl"', "data.validation_data", "csv, tsv"),
    ("data", '"chat_template": "none.jinja"', "data.chat_template", '"auto", "plain" or a file'),
    ("data", '"streaming": true', "data.streaming", "data.max_rows"),
    ("data", '"on_truncation": "error"', "data.on_truncation", "a key of data"),
]


@pytest.mark.parametrize(("section", "entry", "field", "expected"), BROKEN, ids=[row[1] for row in BROKEN])
def test_each_broken_key_has_its_diagnostic(
    chain_diagnostics: Faults, section: str, entry: str, field: str, expected: str
) -> None:
    last = {"model": '"num_layers": 6', "training": '"learning_rate": 0.00001', "data": '"output_dir": "outputs/run"'}
    line = {"model": 4, "training": 11, "data": 16}[section]
    (diagnostic,) = chain_diagnostics(GOOD.replace(last[section], f"{last[section]},\n    {entry}"))
    assert (diagnostic.field, diagnostic.line) == (field, line)
    assert expected in (diagnostic.expected or diagnostic.actual)


CONTRADICTIONS: list[tuple[list[str], str, str]] = [
    (["data.reasoning_examples=null"], "data.reasoning_examples", "the rows to train on"),
    (["generation.strategy=self_consistency:8"], "generation.strategy", "a temperature > 0"),
    (["generation.strategy=step_beam:2x4"], "generation.strategy", "a temperature > 0"),
    (["generation.strategy=self_consistency"], "generation.strategy", '"self_consistency:8"'),
    (["generation.strategy=best_of_n:0"], "generation.strategy", '"best_of_n:4"'),
    (["generation.max_thinking_tokens=256"], "generation.max_thinking_tokens", "fewer than max_new_tokens (256)"),
    (
        ["generation.min_thinking_tokens=50", "generation.max_thinking_tokens=40"],
        "generation.min_thinking_tokens",
        "at most max_thinking_tokens (40)",
    ),
    (["evaluation.checker=fuzzy"], "evaluation.checker", '"module:function"'),
    (["evaluation.checker=a b:c"], "evaluation.checker", '"math_verify"'),
    (["training.metric=accuracy", "evaluation.problems=0"], "training.metric", "evaluation.problems of at least 1"),
    (
        ['training.early_stopping={"patience": 1, "metric": "accuracy"}', "evaluation.every=2"],
        "training.early_stopping.metric",
        "evaluation.every 1",
    ),
    (["data.validation_share=0", "training.early_stopping.patience=1"], "training.early_stopping", "validation rows"),
    (["self_improvement={}"], "self_improvement.rounds", "a whole number >= 1"),
    (["self_improvement.rounds=1", "self_improvement.temperature=0"], "self_improvement.temperature", "a number > 0"),
    (["data.pretrained_weights=new", "data.tokenizer=a/b"], "model", "need all five sizes"),
    (["training.trainable=lora", "training.freeze_layers=1"], "training.freeze_layers", "0, or trainable all"),
    (["training.warmup=5", "training.max_steps=5"], "training.warmup", "fewer than max_steps (5)"),
    (["training.momentum=0.5"], "training.momentum", "0, or optimizer sgd or muon"),
]


def test_a_reward_model_exists_and_has_chains_to_rank(chain_diagnostics: Faults) -> None:
    strategy, folder = chain_diagnostics(GOOD, ["generation.reward_model=nowhere"])
    assert (strategy.field, strategy.expected) == ("generation.reward_model", '"best_of_n:N" or "step_beam:BxK"')
    assert (folder.field, folder.actual) == ("generation.reward_model", '"nowhere", which does not exist')


@pytest.mark.parametrize(
    ("overrides", "field", "expected"), CONTRADICTIONS, ids=[str(row[0]) for row in CONTRADICTIONS]
)
def test_each_contradiction_is_one_diagnostic(
    chain_diagnostics: Faults, overrides: Sequence[str], field: str, expected: str
) -> None:
    (diagnostic,) = chain_diagnostics(GOOD, overrides)
    assert diagnostic.field == field
    assert expected in (diagnostic.expected or diagnostic.actual)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.reasoning_examples=null", "data.training_data=rows.jsonl"],
        ["data.step_format=hashes", "data.train_on=answer", "data.over_length=cut"],
        ['data.step_format={"opening": "", "closing": "", "answer_marker": "So: "}'],
        ["generation.strategy=self_consistency:8", "generation.temperature=0.7"],
        ["generation.min_thinking_tokens=10", "generation.max_thinking_tokens=100"],
        ["evaluation.checker=my.checks:right", "training.metric=accuracy"],
        ["self_improvement.rounds=2", "self_improvement.rationalize=true"],
        ['data.columns={"problem": "q", "reasoning": "r", "answer": "a"}'],
        ["data.max_length=512"],
        ["training.trainable=lora"],
    ],
)
def test_what_is_no_contradiction_loads(chain_diagnostics: Faults, overrides: Sequence[str]) -> None:
    assert chain_diagnostics(GOOD, overrides) == ()


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        ([], []),
        (["training.head_learning_rate=0.1"], ["training.head_learning_rate"]),
        (["data.max_dropped_share=0.5"], []),
        (["data.max_dropped_share=0.5", "data.over_length=cut"], ["data.max_dropped_share"]),
        (["evaluation.problems=0", "evaluation.checker=exact"], ["evaluation.checker"]),
        (["data.validation_data=./rows.jsonl"], ["data.validation_data"]),
        (["training.validate_every=never"], ["training.save_every"]),
    ],
)
def test_keys_without_effect_are_noted(load_chain: Loads, overrides: Sequence[str], noted: list[str]) -> None:
    assert [note.split()[0] for note in load_chain(GOOD, overrides).notes] == noted


@pytest.mark.parametrize(
    ("strategy", "chains"), [("single", 1), ("self_consistency:8", 8), ("best_of_n:4", 4), ("step_beam:2x4", 8)]
)
def test_the_chains_of_a_strategy(load_chain: Loads, strategy: str, chains: int) -> None:
    config = load_chain(GOOD, [f"generation.strategy={strategy}", "generation.temperature=1"]).config
    assert isinstance(config, ChainOfThoughtConfig)
    assert config.generation.chains == chains


def test_the_schema_describes_every_key() -> None:
    described = schema(ChainOfThoughtConfig)
    definitions: dict[str, dict[str, Any]] = {**described["$defs"], "top": described}
    assert len(definitions) == 12
    for name, definition in definitions.items():
        assert definition["additionalProperties"] is False, name
        for key, field in definition["properties"].items():
            assert field.get("description"), f"{name}.{key}"
    assert set(described["required"]) == {"computation", "training", "data"}
