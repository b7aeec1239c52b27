"""The schema: every field has a description, and an independent reader of schemas agrees with `load` on types."""

from __future__ import annotations

import json
from typing import Any

from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.load import schema

SCHEMA = schema(FineTuningConfig)


def section(name: str) -> dict[str, Any]:
    reference = SCHEMA["properties"][name]["$ref"]
    found: dict[str, Any] = SCHEMA["$defs"][reference.removeprefix("#/$defs/")]
    return found


def test_dialect_sections_and_required_keys() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(SCHEMA["properties"]) == {
        "$schema",
        "description",
        "model",
        "computation",
        "training",
        "distributed",
        "data",
    }
    assert set(SCHEMA["required"]) == {"computation", "training", "data"}
    assert section("training")["required"] == ["learning_rate"]
    assert set(section("data")["required"]) == {"pretrained_weights", "training_data", "output_dir"}
    assert set(section("computation")["required"]) == {"mode", "method"}
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_no_section_takes_unknown_keys_and_every_field_is_described() -> None:
    definitions = {**SCHEMA["$defs"], "top": SCHEMA}
    assert len(definitions) == 8
    for name, definition in definitions.items():
        assert definition["additionalProperties"] is False, name
        for key, field in definition["properties"].items():
            assert field.get("description"), f"{name}.{key}"


def test_bounds_defaults_and_choices_are_there() -> None:
    training = section("training")["properties"]
    assert training["batch_size"] | {"description": ""} == {
        "type": "integer",
        "minimum": 1,
        "default": 16,
        "title": "Batch Size",
        "description": "",
    }
    assert training["learning_rate"]["exclusiveMinimum"] == 0
    assert training["optimizer"]["enum"] == ["sgd", "adam", "adamw", "adafactor", "muon"]
    assert training["betas"]["default"] == [0.9, 0.999]
    assert {"type": "null"} in section("model")["properties"]["num_classes"]["anyOf"]


def test_keys_allowed_under_data_are_in_its_schema() -> None:
    data, training = section("data")["properties"], section("training")["properties"]
    for key in ("shuffle", "max_length"):
        assert data[key] == training[key]


def test_keys_without_effect_are_not_in_the_schema() -> None:
    for name in ("training", "data"):
        assert not {"num_workers", "prefetch_batches"} & set(section(name)["properties"])
