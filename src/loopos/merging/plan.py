"""The values of a recipe at one tensor: per-layer lists interpolated, patterns applied.

Enters: a recipe, a tensor's name and its layer. Leaves: the models' weights and the parameters there. Left out: what
they do (`methods.py`).

The plan of a merge: which tensors the result has and where each comes from; all that keeps models from being merged.

Enters: a recipe and its opened sources. Leaves: a `Plan`, or one `UserError` with every fault of every model, before
anything is written. Left out: reading numbers (`tensors.py`), stacking layers (`layers.py`).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from loopos.config.diagnostics import UserError
from loopos.config.merge import PARAMETERS, LayerValues, MergeConfig, PatternSection
from loopos.merging.methods import Parameters
from loopos.merging.sources import HEAD_TENSOR, OUTPUTS, Source, UnitedVocabulary, unite, vocabulary_diagnostics
from loopos.storage.tensor_files import TensorSpec

# Input embeddings come before the layers; all else outside them comes after.
_BEFORE = re.compile(r"embed(?!_out)|\bwte\b|\bwpe\b")


def at_depth(value: LayerValues, depth: float) -> float:
    """A number as it is; a list as anchors at equal distances from depth 0, the first layer, to 1, the last, and linear
    between them.
    """
    if not isinstance(value, list):
        return value
    place = depth * (len(value) - 1)
    below = min(math.floor(place), max(0, len(value) - 2))
    above = min(below + 1, len(value) - 1)
    return value[below] + (value[above] - value[below]) * (place - below)


def depth_of(name: str, layer: int | None, num_layers: int) -> float:
    """Where a tensor stands from 0, the first layer, to 1, the last. Input embeddings stand with the first layer; the
    final norm, output embeddings and heads with the last.
    """
    if layer is None:
        return 0.0 if _BEFORE.search(name) else 1.0
    return layer / (num_layers - 1) if num_layers > 1 else 0.0


class Values:
    """What a recipe says of each tensor."""

    def __init__(self, recipe: MergeConfig, *, num_layers: int) -> None:
        self.recipe, self.num_layers = recipe, num_layers

    def pattern_of(self, name: str) -> PatternSection | None:
        """The first pattern that a name matches."""
        pairs = zip(self._patterns, self.recipe.patterns, strict=True)
        return next((section for pattern, section in pairs if pattern.search(name)), None)

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """The patterns that match none of the names."""
        patterns = zip(self._patterns, self.recipe.patterns, strict=True)
        return [section.tensors for pattern, section in patterns if not any(map(pattern.search, names))]

    def at(self, name: str, layer: int | None) -> tuple[list[float], Parameters]:
        """The models' weights, and the parameters."""
        recipe, pattern = self.recipe, self.pattern_of(name)
        depth = depth_of(name, layer, self.num_layers)
        weights: Sequence[LayerValues] = [each.weight for each in recipe.models]
        if pattern is not None and pattern.weights is not None:
            weights = pattern.weights
        numbers: dict[str, float] = {}
        for key in PARAMETERS:
            own = getattr(pattern, key, None)
            numbers[key] = at_depth(own if own is not None else getattr(recipe, key), depth)
        return [at_depth(weight, depth) for weight in weights], Parameters(**numbers, normalize=recipe.normalizes)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [
            re.compile(each.tensors[3:] if each.tensors.startswith("re:") else rf"\A{fnmatch.translate(each.tensors)}")
            for each in self.recipe.patterns
        ]


_MOST_TOLD = 4
# What a model computes with beside its weights: where these differ, equal names do not mean equal places.
_COMPUTING = (
    "model_type",
    "hidden_size",
    "hidden_act",
    "activation_function",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "position_embedding_type",
)
# What one of two kinds of model has and the other need not: a head, an output embedding of its own.
_OF_ONE_KIND = frozenset({HEAD_TENSOR, *OUTPUTS})
_KINDS = {True: "a model with a head", False: "a language model"}
# Where these differ the models may still be merged; it is said.
_TOLD = ("rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings", "sliding_window", "layer_types",
         "rms_norm_eps", "tie_word_embeddings")  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the result. `layer`: None outside the layers; `origins`: its name in each model that it is made of,
    by the model's place, of heads and output embeddings in those that have one; `base`: its name in the base, None
    where the base has none; `has_tokens`: a row a token.
    """

    name: str
    layer: int | None
    origins: Mapping[int, str]
    base: str | None
    spec: TensorSpec
    has_tokens: bool = False


@dataclass(frozen=True)
class Plan:
    """`tensors`: by name; `vocabulary`: where tokens are united; `notes`: what a user should know."""

    models: Sequence[Source]
    base: Source | None
    tensors: Mapping[str, PlannedTensor]
    vocabulary: UnitedVocabulary | None
    notes: Sequence[str]

    @property
    def num_layers(self) -> int:
        return 1 + max((each.layer for each in self.tensors.values() if each.layer is not None), default=-1)


def planned(recipe: MergeConfig, models: Sequence[Source], base: Source | None) -> Plan:
    """Checks everything. Raises `UserError` with all faults."""
    sources = [*models, *([base] if base is not None else [])]
    diagnostics = [*config_diagnostics(sources), *_head_diagnostics(models), *_soup_diagnostics(recipe, models)]
    vocabulary = None
    if recipe.tokenizer == "union":
        vocabulary = unite(sources)
    else:
        diagnostics += vocabulary_diagnostics(sources)
    names = [_names(source, sources) for source in sources]
    diagnostics += _tensor_diagnostics(models, base, names, united=vocabulary is not None)
    values = Values(recipe, num_layers=models[0].num_layers)
    diagnostics += [
        f"patterns: {actual} matches no tensor of {models[0].place}; its names are such as {_example(models[0])}"
        for actual in values.unmatched(list(models[0].specs))
    ]
    if diagnostics:
        raise UserError("\n".join(diagnostics))
    tensors = _tensors(models, base, names, vocabulary)
    return Plan(models, base, tensors, vocabulary, _notes(sources, tensors, base))


def _example(source: Source) -> str:
    names = sorted(source.specs)
    return names[len(names) // 2]


def config_diagnostics(sources: Sequence[Source]) -> list[str]:
    first = sources[0]
    diagnostics = [
        f"{source.place}: quantized weights, which are codes and no numbers to average; expected the model before it"
        for source in sources
        if source.config.get("quantization_config")
    ]
    for other in sources[1:]:
        for key in _COMPUTING:
            one, two = (source.text_config.get(key) for source in (first, other))
            if one != two and (key == "model_type" or None not in (one, two)):
                diagnostics.append(
                    f"{other.place}: {key} {two}, but {first.place} has {one}: models of one architecture merge"
                )
    return diagnostics


def _names(source: Source, sources: Sequence[Source]) -> dict[str, str]:
    """A name that all models share → the model's own: headless models lack the base model's prefix."""
    shortest = min((each.stack for each in sources), key=len)
    prefix = source.stack.removesuffix(shortest) if source.stack.endswith(shortest) else ""
    return {name.removeprefix(prefix): name for name in source.specs}


def _tensor_diagnostics(
    models: Sequence[Source], base: Source | None, names: Sequence[Mapping[str, str]], *, united: bool
) -> list[str]:
    """Tensors that one of the models lacks, or has in another shape."""
    first, own = models[0], names[0]
    diagnostics = []
    for number, other in enumerate([*models[1:], *([base] if base is not None else [])], start=1):
        if other.text_config.get("model_type") != first.text_config.get("model_type"):
            continue
        theirs, is_base = names[number], other is base
        spared = _OF_ONE_KIND if first.is_task_model != other.is_task_model else frozenset()
        absent = [name for name in own if name not in theirs and not (is_base and first.layer_of(own[name]) is None)]
        absent = [name for name in absent if name not in spared]
        surplus = [] if is_base else [name for name in theirs if name not in own and name not in spared]
        shapes = []
        for name in own:
            if name not in theirs:
                continue
            one, two = first.specs[own[name]].shape, other.specs[theirs[name]].shape
            if united and has_tokens(first, own[name]) and has_tokens(other, theirs[name]):
                one, two = one[1:], two[1:]
            if one != two:
                shapes.append(f"{own[name]} {list(two)} where {first.place} has {list(one)}")
        if absent:
            diagnostics.append(f"{other.place}: lacks tensors that {first.place} has: {_some(absent)}")
        if surplus:
            diagnostics.append(f"{other.place}: has tensors that {first.place} lacks: {_some(surplus)}")
        if shapes:
            diagnostics.append(f"{other.place}: of another shape: {_some(shapes)}")
    return diagnostics


def has_tokens(source: Source, name: str) -> bool:
    """Whether a tensor has a row for each token: an input or output embedding, or the bias of one."""
    size = source.text_config.get("vocab_size")
    spec = source.specs[name]
    named = any(part in name for part in ("embed", "wte", "lm_head", "decoder", "predictions"))
    return named and "position" not in name and source.layer_of(name) is None and spec.shape[:1] == (size,)


def _head_diagnostics(models: Sequence[Source]) -> list[str]:
    """Heads whose outputs do not mean the same. Language models have none that could differ."""
    if any(each.is_task_model for each in models):
        models = [each for each in models if each.is_task_model]
    first, diagnostics = models[0], []
    for other in models[1:]:
        for key in ("task", "pooling", "target_mean", "target_std"):
            one, two = first.description.get(key), other.description.get(key)
            if first.is_task_model and one != two:
                diagnostics.append(
                    f"{other.place}: {key} {two}, but {first.place} has {one}: their outputs differ in meaning"
                )
        diagnostics += _label_diagnostics(first, other)
    return diagnostics


def _soup_diagnostics(recipe: MergeConfig, models: Sequence[Source]) -> list[str]:
    """A soup is chosen by one metric, which its models must share."""
    first = models[0]
    if recipe.method != "greedy_soup":
        return []
    return [
        f"{other.place}: {_KINDS[other.is_task_model]}, but {first.place} is {_KINDS[first.is_task_model]}: no metric "
        "chooses between them; expected models of one kind, or another method"
        for other in models[1:]
        if other.is_task_model != first.is_task_model
    ]


def _label_diagnostics(first: Source, other: Source) -> list[str]:
    one, two = _labels(first), _labels(other)
    if one == two:
        return []
    lacks = [label for label in one if label not in two]
    more = [label for label in two if label not in one]
    told = [f"it lacks {_some(lacks)}"] * bool(lacks) + [f"{first.place} lacks {_some(more)}"] * bool(more)
    if not told:
        place = next(number for number, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        told = [f'the same in another order: number {place} is "{two[place]}", there "{one[place]}"']
    return [f"{other.place}: other labels than {first.place}: {'; '.join(told)}; expected heads of one label space"]


def _labels(source: Source) -> list[str]:
    if source.is_task_model:
        return [str(label) for label in source.description.get("class_names") or ()]
    if any("Classification" in str(name) for name in source.config.get("architectures") or ()):
        named = source.config.get("id2label") or {}
        return [str(named[key]) for key in sorted(named, key=int)]
    return []


def _tensors(
    models: Sequence[Source],
    base: Source | None,
    names: Sequence[Mapping[str, str]],
    vocabulary: UnitedVocabulary | None,
) -> dict[str, PlannedTensor]:
    first, found = models[0], {}
    for shared, name in names[0].items():
        spec = first.specs[name]
        tokens = vocabulary is not None and has_tokens(first, name)
        if tokens and vocabulary is not None:
            spec = TensorSpec(spec.dtype, (vocabulary.size, *spec.shape[1:]))
        origins = {index: names[index][shared] for index in range(len(models)) if shared in names[index]}
        under = names[-1].get(shared) if base is not None else None
        if under is not None and base is not None and not tokens and base.specs[under].shape != spec.shape:
            under = None
        found[name] = PlannedTensor(name, first.layer_of(name), origins, under, spec, tokens)
    return found


def _notes(sources: Sequence[Source], tensors: Mapping[str, PlannedTensor], base: Source | None) -> list[str]:
    first, notes = sources[0], []
    for other in sources[1:]:
        for key in _TOLD:
            one, two = (source.text_config.get(key) for source in (first, other))
            if one != two:
                notes.append(f"{other.place}: {key} {two}, {first.place} has {one}; the result takes that of the first")
        if other is not base and other.is_task_model != first.is_task_model:
            left = "its head is left out" if other.is_task_model else "what it says tokens with is left out"
            notes.append(
                f"{other.place}: {_KINDS[other.is_task_model]}: {left}, for the result is what {first.place} is"
            )
            continue
        for key in ("step_format", "stop_tokens", "max_length", "threshold", "score_mean", "score_std"):
            if other is not base and other.description.get(key, first.description.get(key)) != first.description.get(
                key
            ):
                notes.append(f"{other.place}: another {key} than {first.place}; the result takes that of the first")
    without = [name for name, each in tensors.items() if base is not None and each.base is None]
    if without:
        notes.append(f"averaged, since the base has none: {_some(without)}")
    if HEAD_TENSOR in tensors and len(tensors[HEAD_TENSOR].origins) > 1:
        notes.append("the heads are merged with the weights")
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_TOLD:,} more" if len(names) > _MOST_TOLD else ""
    return ", ".join(names[:_MOST_TOLD]) + more
