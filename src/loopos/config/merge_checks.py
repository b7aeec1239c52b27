"""What the keys of a merge's recipe must not contradict.

Enters: a recipe, each key of it valid by itself. Leaves: `Finding`s. Left out: single keys (`merge`), the models.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from loopos.config.faults import Finding
from loopos.config.paths import RECIPE

if TYPE_CHECKING:
    from loopos.config.merge import MergeConfig, PatternSection

LayerValues: TypeAlias = float | list[float]
"""A number, or anchors of it that are spread over the layers."""
WITHOUT_BASE = ("linear", "greedy_soup", "slerp", "passthrough")
"""Methods that have no use for a base model."""
ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties")
"""Methods that elect signs; their weights are normalized unless the recipe says otherwise, as those of averages are."""


def check_recipe(recipe: MergeConfig) -> Iterator[Finding]:
    """Every contradiction."""
    yield from _check_number(recipe)
    yield from _check_base(recipe)
    yield from _check_layers(recipe)
    yield from _check_weights(recipe)
    yield from _check_della(recipe)
    yield from _check_breadcrumbs(recipe)
    yield from _check_patterns(recipe)
    yield from _check_rest(recipe)


def _check_number(recipe: MergeConfig) -> Iterator[Finding]:
    number, method = len(recipe.models), recipe.method
    if method == "slerp" and number != 2:
        yield Finding(("models", "method"), f"{number} models with slerp", "2", "linear and ties take any number")
    if method in ("model_stock", "greedy_soup") and number < 2:
        yield Finding(("models", "method"), f"1 model with {method}", "at least 2")


def _check_base(recipe: MergeConfig) -> Iterator[Finding]:
    if recipe.base is None and recipe.method not in WITHOUT_BASE and recipe.result == "model":
        hint = "the model that the others were trained from: its weights are what their changes are counted from"
        yield Finding(("base", "method"), f"nothing with {recipe.method}", "a base model", hint)


def _check_layers(recipe: MergeConfig) -> Iterator[Finding]:
    for number, each in enumerate(recipe.models):
        field = f"models.{number}.layers"
        if each.layers is not None and recipe.method != "passthrough":
            yield Finding((field, "method"), f"layers with {recipe.method}", "method passthrough, or no layers")
        elif each.layers is not None and each.layers[0] >= each.layers[1]:
            wanted = "[first, one after the last], as in [0, 12]"
            yield Finding((field,), f"[{each.layers[0]}, {each.layers[1]}], which holds no layer", wanted)


def _check_weights(recipe: MergeConfig) -> Iterator[Finding]:
    given = [number for number, each in enumerate(recipe.models) if each.weight != 1.0]
    if recipe.method in ("slerp", "model_stock", "passthrough", "greedy_soup"):
        instead = {"slerp": "t says where between the two", "passthrough": "layers are copied"}
        for number in given:
            wanted = "no weight: " + instead.get(recipe.method, "the method weighs the models itself")
            yield Finding((f"models.{number}.weight", "method"), f"a weight with {recipe.method}", wanted)
    elif recipe.normalizes:
        weights = [each.weight for each in recipe.models]
        if all(isinstance(weight, float) for weight in weights) and _total(recipe.method, weights) == 0:
            yield Finding(("models", "normalize"), "weights that sum to 0", "another sum, or normalize false")


def _total(method: str, weights: list[LayerValues]) -> float:
    """What weights are divided by: their sum, and where signs are elected that of their sizes."""
    numbers = [weight for weight in weights if isinstance(weight, float)]
    return sum(map(abs, numbers) if method in ELECTING else numbers)


def _check_della(recipe: MergeConfig) -> Iterator[Finding]:
    if recipe.method not in ("della", "della_linear"):
        return
    for where, each in _spots(recipe):
        density = each.density if each.density is not None else recipe.density
        epsilon = each.epsilon if each.epsilon is not None else recipe.epsilon
        widest = max(_values(epsilon))
        for kept in _values(density):
            most = 2 * min(kept, 1 - kept)
            if widest > most + 1e-12:
                fields = (f"{where}epsilon", f"{where}density")
                wanted = f"at most {most:g}: drop probabilities {1 - kept:g} ± epsilon/2 lie from 0 to 1"
                yield Finding(fields, f"{widest:g} with density {kept:g}", wanted)
                break


def _check_patterns(recipe: MergeConfig) -> Iterator[Finding]:
    if recipe.patterns and recipe.method in ("passthrough", "greedy_soup"):
        yield Finding(("patterns", "method"), f"patterns with {recipe.method}", "no patterns, or another method")
    for number, pattern in enumerate(recipe.patterns):
        if pattern.weights is not None and recipe.method in ("slerp", "model_stock"):
            fields = (f"patterns.{number}.weights", "method")
            yield Finding(fields, f"weights with {recipe.method}", "no weights: the method has none")
        if pattern.tensors.startswith("re:"):
            try:
                re.compile(pattern.tensors[3:])
            except re.error as problem:
                field = f"patterns.{number}.tensors"
                yield Finding((field,), f'"{pattern.tensors}" ({problem})', 'a regular expression after "re:"')
        if pattern.weights is not None and len(pattern.weights) != len(recipe.models):
            field, given = f"patterns.{number}.weights", f"{len(pattern.weights)} weights"
            yield Finding((field, "models"), given, f"{len(recipe.models)}, one a model")


def _check_breadcrumbs(recipe: MergeConfig) -> Iterator[Finding]:
    if not recipe.method.startswith("breadcrumbs"):
        return
    for where, each in _spots(recipe):
        small = max(_values(recipe.drop_smallest if each.drop_smallest is None else each.drop_smallest))
        large = max(_values(recipe.drop_largest if each.drop_largest is None else each.drop_largest))
        if small + large >= 1:
            fields = (f"{where}drop_smallest", f"{where}drop_largest")
            yield Finding(fields, f"{small:g} and {large:g}", "shares that sum to less than 1")


def _check_rest(recipe: MergeConfig) -> Iterator[Finding]:
    if recipe.method == "greedy_soup" and recipe.validation_data is None:
        hint = "a file of rows by which each step is judged; other rows than those of the report"
        yield Finding(("validation_data", "method"), "nothing with greedy_soup", "rows to choose by", hint)
    if recipe.tokenizer == "base" and recipe.base is None:
        yield Finding(("tokenizer", "base"), '"base" without a base model', "a base model, or another tokenizer")
    elif recipe.tokenizer not in ("first", "base", "union", *recipe.places):
        yield Finding(("tokenizer",), f'"{recipe.tokenizer}"', '"first", "base", "union" or a model of the recipe')
    if recipe.tokenizer == "union" and recipe.method == "passthrough":
        yield Finding(
            ("tokenizer", "method"), '"union" with passthrough', "the tokenizer of a model", "layers are copied"
        )
    if recipe.result == "adapter" and recipe.method not in ("linear", "task_arithmetic"):
        given = f'"adapter" with {recipe.method}'
        hint = 'it needs whole deltas, which are of no low rank: write "result": "model" and merge them into the base'
        yield Finding(("result", "method"), given, "method linear or task_arithmetic", hint)


def check_overwriting(folder: str) -> Iterator[Finding]:
    """A folder that something else than a merge has written is never replaced."""
    if os.path.isdir(folder) and os.listdir(folder) and not _holds_merge(folder):
        given = f'"{folder}", which holds files of something else than a merge'
        yield Finding(("output_dir",), given, "a new folder, or that of an earlier merge", "choose another name")


def _spots(recipe: MergeConfig) -> Iterator[tuple[str, MergeConfig | PatternSection]]:
    """The recipe itself and each of its patterns, with what the names of their keys begin with."""
    yield "", recipe
    for number, pattern in enumerate(recipe.patterns):
        yield f"patterns.{number}.", pattern


def _values(value: LayerValues) -> list[float]:
    return value if isinstance(value, list) else [value]


def _holds_merge(folder: str) -> bool:
    """Whether the recipe in a folder is a merge's: pruned, joined and exported models have one too."""
    try:
        with open(os.path.join(folder, RECIPE), encoding="utf-8") as file:
            recipe = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(recipe, dict) and "models" in recipe and "output_dir" in recipe
