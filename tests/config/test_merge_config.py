"""Merge recipes: every diagnostic at once, with its position."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import ConfigError
from loopos.config.load import load_recipe
from loopos.config.merge import MergeConfig
from loopos.config.source import read_source

Faults = Callable[..., dict[str, str]]


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.fixture
def diagnostics(tmp_path: Path, models: list[str]) -> Faults:
    """The diagnostics of a recipe by field: `diagnostics(method="ties", density=2)`."""

    def told(**keys: Any) -> dict[str, str]:
        values = {"method": "linear", "models": models, "output_dir": str(tmp_path / "out"), **keys}
        file = tmp_path / "recipe.json"
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}, indent=1))
        found: dict[str, str] = {}
        try:
            load_recipe(read_source(file), [], MergeConfig)
        except ConfigError as error:
            # Every fault has its place in the file.
            found = {
                diagnostic.field: str(diagnostic) for diagnostic in error.diagnostics if diagnostic.line is not None
            }
        return found

    return told


def test_a_whole_recipe_is_read(tmp_path: Path, models: list[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"method: slerp\nmodels: [{models[0]}, {{model: {models[1]}}}]\noutput_dir: {tmp_path / 'out'}\nt: [0, 0.5, 1]\n"
    )
    recipe = load_recipe(read_source(file), ["seed=3"], MergeConfig).config
    assert isinstance(recipe, MergeConfig)
    assert [each.model for each in recipe.models] == models
    assert recipe.t == [0.0, 0.5, 1.0]
    assert recipe.seed == 3
    assert not recipe.normalizes


def test_diagnostics_come_at_once(diagnostics: Faults) -> None:
    found = diagnostics(method="tise", density=2, densty=0.5, shard_gigabytes=0)
    assert set(found) == {"method", "density", "densty", "shard_gigabytes"}
    assert 'did you mean "ties"?' in found["method"]
    assert 'did you mean "density"?' in found["densty"]


@pytest.mark.parametrize(
    ("keys", "field", "words"),
    [
        ({"method": "ties"}, "base", "a base model"),
        ({"method": "slerp", "models": ["smollm2-135m"]}, "models", "1 models with slerp"),
        ({"method": "slerp", "t": 1.5}, "t", ">= 0 and <= 1"),
        ({"method": "greedy_soup"}, "validation_data", "validation rows"),
        ({"tokenizer": "bese"}, "tokenizer", '"first", "base", "union" or a model'),
        ({"tokenizer": "base"}, "tokenizer", "without a base model"),
        ({"patterns": [{"tensors": "re:("}]}, "patterns.0.tensors", "a regular expression"),
        ({"patterns": [{"tensors": "*", "weights": [1, 2, 3]}]}, "patterns.0.weights", "2, one per model"),
        ({"method": "della", "base": "smollm2-135m", "density": 0.9, "epsilon": 0.4}, "epsilon", "at most 0.2"),
        ({"method": "breadcrumbs", "base": "smollm2-135m", "drop_largest": 0.2}, "drop_smallest", "less than 1"),
        ({"method": "ties", "base": "smollm2-135m", "result": "adapter"}, "result", "linear or task_arithmetic"),
        ({"models": ["/nowhere/at/all", "smollm2-135m"]}, "models.0.model", "no folder"),
    ],
)  # fmt: skip
def test_contradictions_are_reported(diagnostics: Faults, keys: dict[str, Any], field: str, words: str) -> None:
    found = diagnostics(**keys)
    assert list(found) == [field]
    assert words in found[field]


def test_weights_that_cannot_be_divided_by(diagnostics: Faults, models: list[str]) -> None:
    apart = [{"model": models[0], "weight": 1.0}, {"model": models[1], "weight": -1.0}]
    assert "weights that sum to 0" in diagnostics(models=apart)["models"]
    assert diagnostics(models=apart, normalize=False) == {}
    assert diagnostics(models=apart, method="task_arithmetic", base=models[0]) == {}
    weighed = [models[0], {"model": models[1], "weight": 0.5}]
    assert "t sets the position" in diagnostics(method="slerp", models=weighed)["models.1.weight"]


@pytest.mark.parametrize(
    ("recipe", "refused"),
    [
        ({"models": [], "method": "linear", "output_dir": "out"}, False),
        ({"model": "a", "method": "wanda", "sparsity": [0.5]}, True),
        ({"command": "export", "model": "a"}, True),
        ([], True),
        (None, True),
    ],
)
def test_only_the_folder_of_an_earlier_merge_is_replaced(
    tmp_path: Path, diagnostics: Faults, recipe: object, refused: bool
) -> None:
    (tmp_path / "out").mkdir()
    assert diagnostics() == {}
    (tmp_path / "out" / "model.safetensors").write_bytes(b"precious")
    if recipe is not None:
        (tmp_path / "out" / "recipe.json").write_text(json.dumps(recipe))
    found = diagnostics()
    assert list(found) == ["output_dir"] * refused
    assert not refused or "that no merge wrote" in found["output_dir"]


def test_keys_without_effect_are_reported(tmp_path: Path, models: list[str]) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(
        json.dumps(
            {"method": "linear", "models": models, "output_dir": str(tmp_path / "out"), "t": 0.1, "density": 0.9}
        )
    )
    notes = load_recipe(read_source(file), [], MergeConfig).notes
    assert notes == [f"{name} has no effect: the method is linear" for name in ("t", "density")]
