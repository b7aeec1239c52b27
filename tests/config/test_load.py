"""Loading: all diagnostics at once and in order, the choice of the method, moved keys, files; only diagnostics are raised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import Field

from loopos.config.diagnostics import ConfigError, Diagnostic
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.load import LoadedConfig, Methods, load
from loopos.config.sections import ComputationSection, MethodConfig

Loads = Callable[..., LoadedConfig]
Faults = Callable[..., tuple[Diagnostic, ...]]

REPOSITORY = Path(__file__).parents[2]
METHODS: Methods = {("posttraining", "fine_tuning"): FineTuningConfig}


class OtherConfig(MethodConfig):
    computation: ComputationSection
    size: int = Field(default=1)


TWO_METHODS: Methods = {**METHODS, ("pretraining", "autoregressive"): OtherConfig}


def config_of(loaded: LoadedConfig) -> FineTuningConfig:
    assert isinstance(loaded.config, FineTuningConfig)
    return loaded.config


def test_a_good_config_loads_with_its_values_and_defaults(load_text: Loads, good: str) -> None:
    loaded = load_text(good)
    config = config_of(loaded)
    assert (loaded.path, loaded.text, loaded.notes) == ("run.json", good, [])
    assert (config.model.d_model, config.model.num_classes, config.model.pooling) == (384, 10, "auto")
    assert (config.training.learning_rate, config.training.batch_size, config.training.num_epochs) == (1e-5, 16, 5)
    assert (config.training.optimizer, config.training.schedule, config.training.betas) == (
        "adamw",
        "cosine",
        (0.9, 0.999),
    )
    assert config.data.validation_share == 0.1
    assert config.description == config.computation.description == ""
    with pytest.raises(ValueError, match="frozen"):
        config.training.batch_size = 2


def test_the_same_config_in_yaml_is_equal(load_text: Loads, good: str) -> None:
    sections = json.loads(good)
    lines: list[str] = []
    for name, keys in sections.items():
        lines += [f"{name}:", *(f"  {key}: {value}" for key, value in keys.items())]
    text = "\n".join(lines).replace("1e-05", "1e-5  # a number in YAML 1.2")
    assert "1e-5" in text
    assert load_text(text, name="run.yaml").config == load_text(good).config


def test_the_guides_config_without_its_files_names_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "fine_tuning.json"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "fine_tuning.json").write_bytes(config.read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load("configs/fine_tuning.json", [], METHODS)
    weights, data = caught.value.diagnostics
    assert (weights.field, weights.line, weights.column) == ("data.pretrained_weights", 21, 27)
    assert (data.field, data.line, data.column) == ("data.training_data", 22, 22)
    assert '"smollm2-135m"' in weights.hint
    assert "configs/pretraining.json" in weights.hint
    assert '"label"' in data.hint
    assert len(str(caught.value).splitlines()) <= 12
    assert caught.value.exit_code == 2


def test_the_guides_config_loads_once_its_files_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/pretrained_model.bin", "data/classification_train.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    config = config_of(load(REPOSITORY / "configs" / "fine_tuning.json", [], METHODS))
    assert (config.model.vocab_size, config.data.output_dir) == (16000, "outputs/fine_tuned")


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys, loopos.config.load, loopos.config.fine_tuning, loopos.config.load;"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'yaml', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    source = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=source)
    assert result.stdout.strip() == "[]"


def test_diagnostics_of_shape_of_several_keys_and_of_files_come_together_by_line(
    diagnostics_in: Faults, good: str
) -> None:
    text = good.replace('"num_heads": 8', '"num_heads": 7').replace('"batch_size": 16', '"batch_size": "x"')
    text = text.replace('"rows.jsonl"', '"row.jsonl"').replace('"num_epochs"', '"epochs"')
    diagnostics = diagnostics_in(text, ["training.momentum=2"])
    assert [(diagnostic.field, diagnostic.line) for diagnostic in diagnostics] == [
        ("model.d_model", 4),
        ("training.batch_size", 17),
        ("training.epochs", 18),
        ("data.training_data", 22),
        ("training.momentum", None),
    ]
    assert 'did you mean "rows.jsonl"?' in diagnostics[3].hint
    assert 'did you mean "num_epochs"?' in diagnostics[2].hint


def test_missing_sections_are_reported_with_what_they_need(diagnostics_in: Faults) -> None:
    text = '{"computation": {"mode": "posttraining", "method": "fine_tuning"}}'
    assert [(diagnostic.field, diagnostic.actual) for diagnostic in diagnostics_in(text)] == [
        ("data", "nothing"),
        ("training", "nothing"),
    ]
    assert "learning_rate" in diagnostics_in(text)[1].expected
    assert [diagnostic.field for diagnostic in diagnostics_in("{}")] == ["computation", "data", "training"]
    assert [diagnostic.field for diagnostic in diagnostics_in('{"data": 3, "training": []}')] == [
        "computation",
        "data",
        "training",
    ]


def test_a_key_of_another_section_is_sent_there(diagnostics_in: Faults, good: str) -> None:
    hints = {
        '"pooling": "max"': 'it belongs under "model"',
        '"lr": 1': 'did you mean "learning_rate"?',
        '"d_modell": 1': 'did you mean "d_model" under "model"?',
        '"zzzzzz": 1': "remove it",
        '"num_labels": 1': 'did you mean "num_classes" under "model"?',
    }
    for entry, hint in hints.items():
        (diagnostic,) = diagnostics_in(good.replace('"num_epochs": 5', f'"num_epochs": 5, {entry}'))
        assert hint in diagnostic.hint, entry


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ('"batch_size": "16"', "write 16, without quotes"),
        ('"batch_size": 1e3', "write 1000"),
        ('"shuffle": "yes"', "write true"),
        ('"shuffle": 0', "write false"),
        ('"optimizer": "AdamW"', 'did you mean "adamw"?'),
        ('"batch_size": null', "leave the key out for its default, 16"),
        ('"max_time": "none"', "write null, without quotes"),
        ('"learning_rate": 1e999', "finite"),
        ('"precision": 32', ""),
    ],
)
def test_hints_say_what_to_write(diagnostics_in: Faults, good: str, entry: str, hint: str) -> None:
    key = json.loads(f"{{{entry}}}").popitem()[0]
    sections = json.loads(good)
    sections["training"].pop(key, None)
    text = json.dumps(sections).replace('"training": {', f'"training": {{{entry}, ').replace(", }", "}")
    (diagnostic,) = diagnostics_in(text)
    assert diagnostic.field == f"training.{key}"
    assert hint in diagnostic.hint


def test_numbers_for_text_keys_must_be_quoted(diagnostics_in: Faults, good: str) -> None:
    (diagnostic,) = diagnostics_in(good, ["data.subset=2024"])
    assert "in quotes" in diagnostic.hint
    (diagnostic,) = diagnostics_in(good.replace('"outputs/run"', "2024"))
    assert '"2024"' in diagnostic.hint


def test_at_most_fifty_diagnostics_are_listed(diagnostics_in: Faults, good: str, load_text: Loads) -> None:
    keys = ", ".join(f'"key_{index}": 1' for index in range(60))
    text = good.replace('"num_epochs": 5', f'"num_epochs": 5, {keys}')
    assert len(diagnostics_in(text)) == 60
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    lines = str(caught.value).splitlines()
    assert lines[-1] == "... and 10 more"
    assert sum(line.startswith("run.json:") for line in lines) == 50


def test_consequences_of_a_faulty_key_are_not_reported_twice(diagnostics_in: Faults, good: str) -> None:
    text = good.replace('"num_heads": 8', '"num_heads": "7"')
    assert [diagnostic.field for diagnostic in diagnostics_in(text)] == ["model.num_heads"]


def test_an_unknown_method_of_two(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def diagnostics(mode: str, method: str) -> list[tuple[str, str, str]]:
        path.write_text(json.dumps({"computation": {"mode": mode, "method": method}}))
        with pytest.raises(ConfigError) as caught:
            load(path, [], TWO_METHODS)
        return [(diagnostic.field, diagnostic.expected, diagnostic.hint) for diagnostic in caught.value.diagnostics]

    assert diagnostics("pretraining", "fine_tuning") == [
        (
            "computation.method",
            '"autoregressive" or "module:name" of your own',
            '"fine_tuning" goes with mode "posttraining"',
        )
    ]
    assert diagnostics("pre", "sleep") == [
        ("computation.mode", '"posttraining" or "pretraining"', ""),
        ("computation.method", '"fine_tuning", "autoregressive" or "module:name" of your own', ""),
    ]
    assert diagnostics("pretrainin", "autoregressiv") == [
        ("computation.mode", '"posttraining" or "pretraining"', 'did you mean "pretraining"?'),
        (
            "computation.method",
            '"fine_tuning", "autoregressive" or "module:name" of your own',
            'did you mean "autoregressive"?',
        ),
    ]
    path.write_text('{"size": 2}')
    with pytest.raises(ConfigError, match=r"computation\.method: got nothing"):
        load(path, [], TWO_METHODS)
    path.write_text('{"computation": {"mode": "pretraining", "method": "autoregressive"}, "size": 2}')
    loaded = load(path, ["size=3"], TWO_METHODS)
    assert isinstance(loaded.config, OtherConfig)
    assert loaded.config.size == 3


def test_keys_of_the_original_under_data_move_to_training(load_text: Loads, diagnostics_in: Faults, good: str) -> None:
    keys = '"shuffle": false, "num_workers": 4, "prefetch_batches": 3, "max_length": 64'
    text = good.replace('"outputs/run"', f'"outputs/run",\n {keys}')
    loaded = load_text(text)
    training = config_of(loaded).training
    assert (training.shuffle, training.max_length) == (False, 64)
    assert loaded.notes == [
        "data.num_workers has no effect: rows are read by the training process itself",
        "data.prefetch_batches has no effect: rows are read by the training process itself",
    ]

    both = text.replace('"num_epochs": 5', '"num_epochs": 5, "max_length": 65')
    (diagnostic,) = diagnostics_in(both)
    assert (diagnostic.field, diagnostic.line, diagnostic.expected) == ("data.max_length", 24, "one value")
    assert diagnostics_in(both.replace("65", "64")) == ()
    assert config_of(load_text(both, ["data.max_length=66"])).training.max_length == 66
    assert config_of(load_text(text, ["training.max_length=67"])).training.max_length == 67


def test_schema_key_descriptions_and_overrides(load_text: Loads, good: str) -> None:
    text = good.replace("{\n", '{\n  "$schema": "schema.json", "description": "mine",\n', 1)
    loaded = load_text(
        text, ["training.lora.rank=4", "training.trainable=lora", "data.columns.text=body", "model.labels=null"]
    )
    config = config_of(loaded)
    assert config.description == "mine"
    assert config.training.lora is not None
    assert (config.training.lora.rank, config.training.lora.alpha) == (4, 32.0)
    assert config.data.columns == {"text": "body"}
    assert loaded.text == text


@pytest.mark.parametrize(
    ("entries", "seconds"), [('"90s"', 90.0), ('"30m"', 1800.0), ('"1.5h"', 5400.0), ("12", 12.0), ("0.5", 0.5)]
)
def test_durations_are_seconds(load_text: Loads, good: str, entries: str, seconds: float) -> None:
    text = good.replace('"num_epochs": 5', f'"num_epochs": 5, "max_time": {entries}')
    assert config_of(load_text(text)).training.max_time == seconds


@pytest.mark.parametrize(("written", "kind"), [("0", int), ("10", int), ("0.1", float)])
def test_warmup_is_steps_or_a_fraction(load_text: Loads, good: str, written: str, kind: type) -> None:
    warmup = config_of(load_text(good, [f"training.warmup={written}"])).training.warmup
    assert type(warmup) is kind
    assert warmup == kind(written)


def test_a_resolved_config_loads_to_itself(load_text: Loads, good: str) -> None:
    overrides = ["training.max_time=2h", "training.lora={}", "training.trainable=lora", "training.warmup=0.1"]
    for more in (["model.class_weights=balanced"], ["training.validate_every=never", "data.max_length=8"]):
        loaded = load_text(good, [*overrides, *more])
        again = load_text(loaded.config.model_dump_json(indent=1))
        assert (again.config, again.notes) == (loaded.config, loaded.notes)


def test_files_need_not_exist_when_not_checked(tmp_path: Path, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(good)
    assert config_of(load("run.json", [], METHODS, check_files=False)).data.training_data == "rows.jsonl"
    with pytest.raises(ConfigError, match=r"data\.training_data"):
        load("run.json", [], METHODS)
