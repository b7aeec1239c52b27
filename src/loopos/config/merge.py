"""The recipe of a merge (`MergeConfig`) and the checks across its keys.

Checks that need the models (shapes, vocabularies, labels) are made in `merging`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.json_text import MappingNode
from loopos.config.keys import Location, Section, Text, VariantName
from loopos.config.paths import RECIPE, check_output_folder, check_rows, check_weights
from loopos.config.sections import MethodConfig
from loopos.config.variants import MERGE_METHODS, MERGE_PARAMETERS, MergeRow

LayerValues: TypeAlias = float | list[float]
"""A number, or anchor values interpolated over the layers."""


def check_recipe(recipe: MergeConfig) -> Iterator[Problem]:
    """All checks of a recipe."""
    yield from _check_number(recipe)
    yield from _check_base(recipe)
    yield from _check_layers(recipe)
    yield from _check_weights(recipe)
    yield from _check_della(recipe)
    yield from _check_breadcrumbs(recipe)
    yield from _check_patterns(recipe)
    yield from _check_rest(recipe)


def _check_number(recipe: MergeConfig) -> Iterator[Problem]:
    number, method, row = len(recipe.models), recipe.method, recipe.row
    if row.most is not None and number != row.most:
        expected, hint = str(row.most), "linear and ties take any number"
        yield Problem(("models", "method"), f"{number} models with {method}", expected, hint)
    elif number < row.fewest:
        actual = "1 model" if number == 1 else f"{number} models"
        yield Problem(("models", "method"), f"{actual} with {method}", f"at least {row.fewest}")


def _check_base(recipe: MergeConfig) -> Iterator[Problem]:
    if recipe.base is None and recipe.row.base and recipe.result == "model":
        hint = "the base is the model that the others were fine-tuned from; deltas are relative to its weights"
        yield Problem(("base", "method"), f"nothing with {recipe.method}", "a base model", hint)


def _check_layers(recipe: MergeConfig) -> Iterator[Problem]:
    for number, each in enumerate(recipe.models):
        field = f"models.{number}.layers"
        if each.layers is not None and recipe.method != "passthrough":
            yield Problem((field, "method"), f"layers with {recipe.method}", "method passthrough, or no layers")
        elif each.layers is not None and each.layers[0] >= each.layers[1]:
            expected = "[first, one after the last], for example [0, 12]"
            yield Problem((field,), f"[{each.layers[0]}, {each.layers[1]}], which contains no layer", expected)


def _check_weights(recipe: MergeConfig) -> Iterator[Problem]:
    actual = [number for number, each in enumerate(recipe.models) if each.weight != 1.0]
    if not recipe.row.weighs:
        instead = {"slerp": "t sets the position between the two", "passthrough": "layers are copied"}
        for number in actual:
            expected = "no weight: " + instead.get(recipe.method, "the method weighs the models itself")
            yield Problem((f"models.{number}.weight", "method"), f"a weight with {recipe.method}", expected)
    elif recipe.normalizes:
        weights = [each.weight for each in recipe.models]
        if all(isinstance(weight, float) for weight in weights) and _total(recipe.row, weights) == 0:
            yield Problem(("models", "normalize"), "weights that sum to 0", "another sum, or normalize false")


def _total(row: MergeRow, weights: list[LayerValues]) -> float:
    """The divisor of the weights: their sum, or the sum of their absolute values for methods that elect signs."""
    numbers = [weight for weight in weights if isinstance(weight, float)]
    return sum(map(abs, numbers) if row.elects else numbers)


def _check_della(recipe: MergeConfig) -> Iterator[Problem]:
    if "epsilon" not in recipe.row.uses or "density" not in recipe.row.uses:
        return
    for prefix, each in _sections(recipe):
        density = each.density if each.density is not None else recipe.density
        epsilon = each.epsilon if each.epsilon is not None else recipe.epsilon
        widest = max(_values(epsilon))
        for fraction in _values(density):
            most = 2 * min(fraction, 1 - fraction)
            if widest > most + 1e-12:
                fields = (f"{prefix}epsilon", f"{prefix}density")
                expected = f"at most {most:g}: drop probabilities {1 - fraction:g} ± epsilon/2 lie from 0 to 1"
                yield Problem(fields, f"{widest:g} with density {fraction:g}", expected)
                break


def _check_patterns(recipe: MergeConfig) -> Iterator[Problem]:
    if recipe.patterns and recipe.method in ("passthrough", "greedy_soup"):
        yield Problem(("patterns", "method"), f"patterns with {recipe.method}", "no patterns, or another method")
    for number, pattern in enumerate(recipe.patterns):
        if pattern.weights is not None and not recipe.row.weighs:
            fields = (f"patterns.{number}.weights", "method")
            yield Problem(fields, f"weights with {recipe.method}", "no weights: the method has none")
        if pattern.tensors.startswith("re:"):
            try:
                re.compile(pattern.tensors[3:])
            except re.error as problem:
                field = f"patterns.{number}.tensors"
                yield Problem((field,), f'"{pattern.tensors}" ({problem})', 'a regular expression after "re:"')
        if pattern.weights is not None and len(pattern.weights) != len(recipe.models):
            field, actual = f"patterns.{number}.weights", f"{len(pattern.weights)} weights"
            yield Problem((field, "models"), actual, f"{len(recipe.models)}, one per model")


def _check_breadcrumbs(recipe: MergeConfig) -> Iterator[Problem]:
    if "drop_smallest" not in recipe.row.uses or "drop_largest" not in recipe.row.uses:
        return
    for prefix, each in _sections(recipe):
        small = max(_values(recipe.drop_smallest if each.drop_smallest is None else each.drop_smallest))
        large = max(_values(recipe.drop_largest if each.drop_largest is None else each.drop_largest))
        if small + large >= 1:
            fields = (f"{prefix}drop_smallest", f"{prefix}drop_largest")
            yield Problem(fields, f"{small:g} and {large:g}", "fractions that sum to less than 1")


def _check_rest(recipe: MergeConfig) -> Iterator[Problem]:
    if recipe.method == "greedy_soup" and recipe.validation_data is None:
        hint = "each step is evaluated on these rows; use other rows than for the report"
        yield Problem(("validation_data", "method"), "nothing with greedy_soup", "validation rows", hint)
    if recipe.tokenizer == "base" and recipe.base is None:
        yield Problem(("tokenizer", "base"), '"base" without a base model', "a base model, or another tokenizer")
    elif recipe.tokenizer not in ("first", "base", "union", *recipe.model_paths):
        yield Problem(("tokenizer",), f'"{recipe.tokenizer}"', '"first", "base", "union" or a model of the recipe')
    if recipe.tokenizer == "union" and recipe.method == "passthrough":
        yield Problem(
            ("tokenizer", "method"), '"union" with passthrough', "the tokenizer of a model", "layers are copied"
        )
    if recipe.result == "adapter" and recipe.method not in ("linear", "task_arithmetic"):
        actual = f'"adapter" with {recipe.method}'
        hint = 'it needs full-rank deltas: write "result": "model" and merge them into the base'
        yield Problem(("result", "method"), actual, "method linear or task_arithmetic", hint)


def check_overwriting(folder: str) -> Iterator[Problem]:
    """Refuse to replace a folder that was not written by a merge."""
    if os.path.isdir(folder) and os.listdir(folder) and not _holds_merge(folder):
        actual = f'"{folder}", which contains files that no merge wrote'
        yield Problem(("output_dir",), actual, "a new folder, or the folder of an earlier merge", "choose another name")


def _sections(recipe: MergeConfig) -> Iterator[tuple[str, MergeConfig | PatternSection]]:
    """The recipe and each of its patterns, with the prefix of their key names."""
    yield "", recipe
    for number, pattern in enumerate(recipe.patterns):
        yield f"patterns.{number}.", pattern


def _values(value: LayerValues) -> list[float]:
    return value if isinstance(value, list) else [value]


def _holds_merge(folder: str) -> bool:
    """Whether the recipe in a folder is of a merge; pruned, ensemble and exported models have one too."""
    try:
        with open(os.path.join(folder, RECIPE), encoding="utf-8") as file:
            recipe = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(recipe, dict) and "models" in recipe and "output_dir" in recipe


PARAMETERS = tuple(name for name in MERGE_PARAMETERS if name != "normalize")
EXAMPLE_ROW = '{"text": "the parcel came late", "label": "complaint"}'

Finite: TypeAlias = float
Unit: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Density: TypeAlias = Annotated[float, Field(gt=0, le=1)]
Below: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Weights: TypeAlias = Finite | Annotated[list[Finite], Field(min_length=1)]
Units: TypeAlias = Unit | Annotated[list[Unit], Field(min_length=1)]
Densities: TypeAlias = Density | Annotated[list[Density], Field(min_length=1)]
Fractions: TypeAlias = Below | Annotated[list[Below], Field(min_length=1)]


def _named(value: object) -> object:
    """A model written as only its name, as a section."""
    return {"model": value} if isinstance(value, str) else value


class MergedModel(Section):
    """One of the models to merge."""

    model: Location = Field(description="run, model folder, weights file, adapter folder, embedded model or hub id")
    weight: Weights = Field(default=1.0, description="factor of the model; a list is interpolated over the layers")
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="passthrough: layers taken, [first, one after the last]; all of them when absent"
    )


Entry: TypeAlias = Annotated[MergedModel, BeforeValidator(_named, json_schema_input_type=MergedModel | str)]


class PatternSection(Section):
    """Values for the tensors whose names match; absent keys use the recipe's values."""

    tensors: Text = Field(description='names of tensors: a glob such as "*.mlp.*", or "re:" and a regular expression')
    weights: Annotated[list[Weights], Field(min_length=1)] | None = Field(
        default=None, description="factor of each model, in the recipe's order"
    )
    t: Units | None = Field(default=None, description="as the recipe's t")
    scale: Weights | None = Field(default=None, description="as the recipe's scale")
    density: Densities | None = Field(default=None, description="as the recipe's density")
    epsilon: Fractions | None = Field(default=None, description="as the recipe's epsilon")
    drop_smallest: Fractions | None = Field(default=None, description="as the recipe's drop_smallest")
    drop_largest: Fractions | None = Field(default=None, description="as the recipe's drop_largest")


class MergeConfig(MethodConfig):
    """Recipe of a merge. A list instead of a number is interpolated over the layers, first to last."""

    method: Annotated[str, VariantName(MERGE_METHODS)] = Field(
        description="how tensors are merged (`loopos list merge-methods`)"
    )
    models: Annotated[list[Entry], Field(min_length=1)] = Field(description="the models, in order")
    output_dir: Location = Field(description="folder to write")
    base: Location | None = Field(default=None, description="model that the others were fine-tuned from")
    description: str = Field(default="", description="free text")
    t: Units = Field(default=0.5, description="slerp: position between the first model (0) and the second (1)")
    scale: Weights = Field(default=1.0, description="factor λ on the merged change, before the base is added")
    density: Densities = Field(default=0.5, description="ties, dare, della: fraction of each delta's elements kept")
    epsilon: Fractions = Field(default=0.1, description="della: width of the window of drop probabilities")
    drop_smallest: Fractions = Field(
        default=0.85, description="breadcrumbs: fraction of elements dropped as negligible"
    )
    drop_largest: Fractions = Field(default=0.01, description="breadcrumbs: fraction of elements dropped as outliers")
    normalize: bool | None = Field(
        default=None,
        description="divide by the sum of the weights; when absent, as in the method's paper",
    )
    patterns: list[PatternSection] = Field(
        default_factory=list, description="values for tensors by name; the first match applies"
    )
    tokenizer: Location = Field(
        default="first",
        description='tokenizer of the result: "first", "base", a model of the recipe; or "union" of all tokens',
    )
    result: Literal["model", "adapter"] = Field(
        default="model", description="adapter: only adapters, summed exactly by concatenating their ranks"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="number format of the result; that of the first model when auto"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=42, description="seed of all random numbers")
    shard_gigabytes: Annotated[float, Field(gt=0)] = Field(default=5.0, description="largest file of weights (GB)")
    validation_data: Location | None = Field(default=None, description="greedy_soup: rows for selecting models")
    metric: Text | None = Field(
        default=None, description="greedy_soup: metric to improve; accuracy, pair_accuracy, mae or loss when absent"
    )
    evaluate: list[Location] = Field(
        default_factory=list, description="rows on which all models and the result are evaluated"
    )

    @property
    def normalizes(self) -> bool:
        """Whether weights are divided by their sum."""
        return self.row.normalizes if self.normalize is None else self.normalize

    @property
    def row(self) -> MergeRow:
        """What the method needs."""
        return MERGE_METHODS[self.method]

    @property
    def model_paths(self) -> list[str]:
        """Paths or ids of the models, then of the base if there is one."""
        return [each.model for each in self.models] + ([self.base] if self.base is not None else [])

    def check(self) -> Iterator[Problem]:
        return check_recipe(self)

    def check_files(self) -> Iterator[Problem]:
        for number, each in enumerate(self.models):
            yield from check_weights(f"models.{number}.model", each.model)
        if self.base is not None:
            yield from check_weights("base", self.base)
        for field, value in (
            ("validation_data", self.validation_data),
            *(("evaluate", each) for each in self.evaluate),
        ):
            if value is not None:
                yield from check_rows(field, value, EXAMPLE_ROW)
        yield from check_output_folder("output_dir", self.output_dir)
        for path in self.model_paths:
            if os.path.isdir(path) and checks.same_path(path, self.output_dir):
                yield Problem(("output_dir",), f'"{self.output_dir}", one of the models', "another folder")
        yield from check_overwriting(self.output_dir)

    def notes(self) -> list[str]:
        fields = type(self).model_fields
        notes = [
            f"{name} has no effect: the method is {self.method}"
            for name in MERGE_PARAMETERS
            if name not in self.row.uses and getattr(self, name) != fields[name].default
        ]
        if self.base is not None and not self.row.base and self.tokenizer != "base" and not self._adapters():
            notes.append(f"base has no effect: the method is {self.method}")
        return notes

    def _adapters(self) -> bool:
        return any(os.path.isfile(os.path.join(each.model, "adapter_config.json")) for each in self.models)


def is_merge_recipe(root: MappingNode) -> bool:
    """Whether the tree of a config file is a merge recipe: it has models and no computation section."""
    return "models" in root.entries and "computation" not in root.entries
