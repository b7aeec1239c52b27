"""The plan of a merge: which tensors the result has, where each comes from, and the weights and parameters for each.

All reasons why models cannot be merged are reported in one `UserError`, before anything is written.
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

# Input embeddings come before the layers; everything else outside the layers comes after.
_BEFORE = re.compile(r"embed(?!_out)|\bwte\b|\bwpe\b")


def at_depth(value: LayerValues, depth: float) -> float:
    """A number as it is; a list as anchors at equal distances from depth 0, the first layer, to 1, the last, with
    linear interpolation between them.
    """
    if not isinstance(value, list):
        return value
    position = depth * (len(value) - 1)
    below = min(math.floor(position), max(0, len(value) - 2))
    above = min(below + 1, len(value) - 1)
    return value[below] + (value[above] - value[below]) * (position - below)


def depth_of(name: str, layer: int | None, num_layers: int) -> float:
    """The depth of a tensor from 0, the first layer, to 1, the last. Input embeddings have depth 0; the final norm,
    output embeddings and heads depth 1.
    """
    if layer is None:
        return 0.0 if _BEFORE.search(name) else 1.0
    return layer / (num_layers - 1) if num_layers > 1 else 0.0


class Values:
    """The recipe's values for each tensor."""

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


_MOST_LISTED = 4
# Settings that change what a model computes with its weights: where they differ, equal names do not mean equal roles.
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
# Tensors that one kind of model has and another need not have: a head, or an output embedding of its own.
_OF_ONE_KIND = frozenset({HEAD_TENSOR, *OUTPUTS})
_KINDS = {True: "a model with a head", False: "a language model"}
# Differences that allow a merge, with a note.
_NOTED = ("rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings", "sliding_window", "layer_types",
         "rms_norm_eps", "tie_word_embeddings")  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the result. `layer`: None outside the layers; `origins`: its name in each model that contributes, by
    the model's index (for heads and output embeddings only models that have one); `base`: its name in the base, None if
    the base has none; `has_tokens`: one row per token.
    """

    name: str
    layer: int | None
    origins: Mapping[int, str]
    base: str | None
    spec: TensorSpec
    has_tokens: bool = False


@dataclass(frozen=True)
class Plan:
    """`tensors`: by name; `vocabulary`: if tokens are united; `notes`: what a user should know."""

    models: Sequence[Source]
    base: Source | None
    tensors: Mapping[str, PlannedTensor]
    vocabulary: UnitedVocabulary | None
    notes: Sequence[str]

    @property
    def num_layers(self) -> int:
        return 1 + max((each.layer for each in self.tensors.values() if each.layer is not None), default=-1)


def planned(recipe: MergeConfig, models: Sequence[Source], base: Source | None) -> Plan:
    """Checks everything. Raises `UserError` with all problems."""
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
        f"patterns: {actual} matches no tensor of {models[0].location}; its names look like {_example(models[0])}"
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
        f"{source.location}: quantized weights cannot be averaged; expected the model before quantization"
        for source in sources
        if source.config.get("quantization_config")
    ]
    for other in sources[1:]:
        for key in _COMPUTING:
            one, two = (source.text_config.get(key) for source in (first, other))
            if one != two and (key == "model_type" or None not in (one, two)):
                diagnostics.append(
                    f"{other.location}: {key} {two}, but {first.location} has {one}: the architectures differ"
                )
    return diagnostics


def _names(source: Source, sources: Sequence[Source]) -> dict[str, str]:
    """Common name → the model's own name: models without a head lack the base model's prefix."""
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
        other_names, is_base = names[number], other is base
        spared = _OF_ONE_KIND if first.is_task_model != other.is_task_model else frozenset()
        absent = [
            name for name in own if name not in other_names and not (is_base and first.layer_of(own[name]) is None)
        ]
        absent = [name for name in absent if name not in spared]
        surplus = [] if is_base else [name for name in other_names if name not in own and name not in spared]
        shapes = []
        for name in own:
            if name not in other_names:
                continue
            one, two = first.specs[own[name]].shape, other.specs[other_names[name]].shape
            if united and has_tokens(first, own[name]) and has_tokens(other, other_names[name]):
                one, two = one[1:], two[1:]
            if one != two:
                shapes.append(f"{own[name]} {list(two)} where {first.location} has {list(one)}")
        if absent:
            diagnostics.append(f"{other.location}: lacks tensors that {first.location} has: {_some(absent)}")
        if surplus:
            diagnostics.append(f"{other.location}: has tensors that {first.location} lacks: {_some(surplus)}")
        if shapes:
            diagnostics.append(f"{other.location}: different shapes: {_some(shapes)}")
    return diagnostics


def has_tokens(source: Source, name: str) -> bool:
    """Whether a tensor has one row per token: an input or output embedding, or the bias of one."""
    size = source.text_config.get("vocab_size")
    spec = source.specs[name]
    named = any(part in name for part in ("embed", "wte", "lm_head", "decoder", "predictions"))
    return named and "position" not in name and source.layer_of(name) is None and spec.shape[:1] == (size,)


def _head_diagnostics(models: Sequence[Source]) -> list[str]:
    """Heads whose outputs differ in meaning. Language models have none."""
    if any(each.is_task_model for each in models):
        models = [each for each in models if each.is_task_model]
    first, diagnostics = models[0], []
    for other in models[1:]:
        for key in ("task", "pooling", "target_mean", "target_std", "process"):
            one, two = first.description.get(key), other.description.get(key)
            if first.is_task_model and one != two:
                diagnostics.append(
                    f"{other.location}: {key} {two}, but {first.location} has {one}: their outputs differ in meaning"
                )
        diagnostics += _label_diagnostics(first, other)
    return diagnostics


def _soup_diagnostics(recipe: MergeConfig, models: Sequence[Source]) -> list[str]:
    """A soup is chosen by one metric, which its models must share."""
    first = models[0]
    if recipe.method != "greedy_soup":
        return []
    return [
        f"{other.location}: {_KINDS[other.is_task_model]}, but {first.location} is {_KINDS[first.is_task_model]}: no "
        "metric compares them; use models of one kind, or another method"
        for other in models[1:]
        if other.is_task_model != first.is_task_model
    ]


def _label_diagnostics(first: Source, other: Source) -> list[str]:
    one, two = _labels(first), _labels(other)
    if one == two:
        return []
    lacks = [label for label in one if label not in two]
    more = [label for label in two if label not in one]
    differences = [f"it lacks {_some(lacks)}"] * bool(lacks) + [f"{first.location} lacks {_some(more)}"] * bool(more)
    if not differences:
        number = next(number for number, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        differences = [f'the same in another order: number {number} is "{two[number]}" instead of "{one[number]}"']
    return [
        f"{other.location}: other labels than {first.location}: {'; '.join(differences)}; "
        "use heads with the same labels"
    ]


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
        for key in _NOTED:
            one, two = (source.text_config.get(key) for source in (first, other))
            if one != two:
                notes.append(f"{other.location}: {key} {two}, {first.location} has {one}; the result uses the first")
        if other is not base and other.is_task_model != first.is_task_model:
            left = "its head is ignored" if other.is_task_model else "its output embedding is ignored"
            notes.append(
                f"{other.location}: {_KINDS[other.is_task_model]}: {left}, as the result is what {first.location} is"
            )
            continue
        for key in ("step_format", "stop_tokens", "max_length", "threshold", "score_mean", "score_std"):
            if other is not base and other.description.get(key, first.description.get(key)) != first.description.get(
                key
            ):
                notes.append(f"{other.location}: another {key} than {first.location}; the result uses the first")
    without = [name for name, each in tensors.items() if base is not None and each.base is None]
    if without:
        notes.append(f"averaged, because the base lacks them: {_some(without)}")
    if HEAD_TENSOR in tensors and len(tensors[HEAD_TENSOR].origins) > 1:
        notes.append("the heads are merged with the weights")
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED:,} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
