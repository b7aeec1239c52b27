"""The config of pretraining: the shipped one, contradictions, where the weights go, notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from loopos.config.diagnostics import ConfigError, Diagnostic
from loopos.config.load import LoadedConfig, load, schema
from loopos.config.pretraining import PretrainingConfig

SHIPPED = Path(__file__).parents[2] / "configs" / "pretraining.json"
Loads = Callable[..., LoadedConfig]
Faults = Callable[..., tuple[Diagnostic, ...]]


@pytest.fixture
def load_shipped(folder: Path) -> Loads:
    """`load_shipped(overrides)`: what `load` makes of the shipped config, its text file given."""
    (folder / "data").mkdir()
    (folder / "data" / "pretraining.txt").write_text("Once there was a lighthouse keeper.\n")

    def loaded(overrides: Sequence[str] = ()) -> LoadedConfig:
        (folder / "run.json").write_bytes(SHIPPED.read_bytes())
        return load("run.json", overrides, {("pretraining", "autoregressive"): PretrainingConfig})

    return loaded


@pytest.fixture
def shipped_diagnostics(load_shipped: Loads) -> Faults:
    def diagnostics(overrides: Sequence[str] = ()) -> tuple[Diagnostic, ...]:
        try:
            load_shipped(overrides)
        except ConfigError as error:
            return error.diagnostics
        return ()

    return diagnostics


def test_the_config_in_the_repository(load_shipped: Loads) -> None:
    loaded = load_shipped()
    config = loaded.config
    assert isinstance(config, PretrainingConfig)
    assert loaded.notes == []
    assert (config.training.max_length, config.training.batch_size, config.training.optimizer) == (96, 32, "adamw")
    assert (config.data.output_weights, config.data.weights_folder) == ("models/pretrained_model.bin", "models")
    assert config.data.source == "data/pretraining.txt"


@pytest.mark.parametrize(
    ("overrides", "field", "expected"),
    [
        (["data.input_file=none.txt"], "data.input_file", "csv, tsv"),
        (["data.input_file=null"], "data.input_file", "the rows to train on"),
        (["data.training_data=rows.jsonl"], "data.training_data", "one of the two"),
        (["model.vocab_size=100"], "model.vocab_size", "at least 260"),
        (["model.d_ff=null", "model.num_layers=null"], "model", "all of d_model"),
        (["model.d_model=380"], "model.d_model", "a multiple of num_heads (8)"),
        (["model.num_heads=128"], "model.d_model", "an even number per head"),
        (["training.trainable=lora"], "training.trainable", '"all"'),
        (["training.freeze_layers=2"], "training.freeze_layers", "0"),
        (["training.metric=accuracy"], "training.metric", '"loss", or nothing'),
        (["training.max_length=1"], "training.max_length", "at least 2 tokens"),
        (["data.validation_share=0", "training.schedule=plateau"], "training.schedule", "another schedule"),
        (["data.output_weights=weights.gguf"], "data.output_weights", "a folder, or a file that ends in .bin"),
        (["data.output_weights=rows.jsonl/w.bin"], "data.output_weights", "a folder that can be written to"),
        (["data.output_weights=data.bin"], "data.output_weights", "a file's name, or another folder"),
        (["data.output_weights=outputs/pretraining/w.bin"], "data.output_weights", "another folder"),
        (["data.tokenizer=word"], "data.tokenizer", 'a hub id "org/name"'),
        (["data.pretrained_weights=new"], "data.pretrained_weights", "a key of data"),
    ],
)
def test_each_contradiction_is_one_diagnostic(
    shipped_diagnostics: Faults, folder: Path, overrides: Sequence[str], field: str, expected: str
) -> None:
    (folder / "data.bin").mkdir()
    (diagnostic,) = shipped_diagnostics(overrides)
    assert diagnostic.field == field
    assert expected in diagnostic.expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.input_file=null", "data.training_data=rows.jsonl"],
        ["data.output_weights=weights"],
        ["data.output_weights=w.safetensors"],
        ["model.vocab_size=100", "data.tokenizer=org/name"],
        ['data.columns={"text": "body"}'],
        ["data.input_file=org/name", "data.streaming=true", "data.max_rows=10"],
    ],
)
def test_what_is_no_contradiction_loads(shipped_diagnostics: Faults, overrides: Sequence[str]) -> None:
    assert shipped_diagnostics(overrides) == ()


def test_notes_and_the_folder_of_weights(load_shipped: Loads) -> None:
    assert [note.split()[0] for note in load_shipped(["training.num_workers=2"]).notes] == ["training.num_workers"]
    config = load_shipped(["data.output_weights=weights"]).config
    assert isinstance(config, PretrainingConfig)
    assert config.data.weights_folder == "weights"
    bare = load_shipped(["data.output_weights=w.bin"]).config
    assert isinstance(bare, PretrainingConfig)
    assert bare.data.weights_folder == "."


def test_the_schema_describes_every_key() -> None:
    described = schema(PretrainingConfig)
    definitions = {**described["$defs"], "top": described}
    assert len(definitions) == 8
    for name, definition in definitions.items():
        assert definition["additionalProperties"] is False, name
        for key, field in definition["properties"].items():
            assert field.get("description"), f"{name}.{key}"
    assert set(described["required"]) == {"model", "computation", "training", "data"}
