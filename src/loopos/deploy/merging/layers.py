"""Stacking layers of several models into one deeper, or shallower, model.

Enters: a recipe with ranges of layers and its opened sources. Leaves: a `Plan` of copies, and the config of the stack.
Layers keep their order; what lies outside them (embeddings, final norm, heads) comes from the first model. Left out:
training the seams.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from loopos.config.faults import UserError
from loopos.config.merge import MergeConfig
from loopos.deploy.merging.plan import Plan, PlannedTensor, config_faults
from loopos.deploy.merging.sources import Source
from loopos.deploy.merging.vocabulary import vocabulary_faults

# The names of the number of layers in configs of transformers.
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def ranges_of(recipe: MergeConfig, models: Sequence[Source]) -> list[tuple[int, int]]:
    """First layer and the one after the last of each model. Raises `UserError` for layers that a model lacks."""
    found, faults = [], []
    for number, (each, source) in enumerate(zip(recipe.models, models, strict=True)):
        start, end = each.layers or (0, source.num_layers)
        if end > source.num_layers:
            faults.append(
                f"models.{number}.layers: given [{start}, {end}]; wanted at most {source.num_layers}, the layers of "
                f"{source.place}"
            )
        found.append((start, end))
    if faults:
        raise UserError("\n".join(faults))
    return found


def stacked(recipe: MergeConfig, models: Sequence[Source]) -> Plan:
    """The plan of a stack. Raises `UserError` with every fault: other architectures, shapes or vocabularies."""
    ranges, first = ranges_of(recipe, models), models[0]
    faults = [*config_faults(models), *vocabulary_faults(models)]
    tensors = {name: _copy(name, None, 0, name, first) for name in first.specs if first.layer_of(name) is None}
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    depth = 0
    for place, (source, (start, end)) in enumerate(zip(models, ranges, strict=True)):
        for name, spec in source.specs.items():
            layer = source.layer_of(name)
            if layer is None or not start <= layer < end:
                continue
            rest = name.removeprefix(source.stack).partition(".")[2]
            named, shape = seen.setdefault(rest, (source.place, spec.shape))
            if shape != spec.shape:
                faults.append(f"{source.place}: {name} is {list(spec.shape)} where {named} has {list(shape)}")
            target = f"{first.stack}{depth + layer - start}.{rest}"
            tensors[target] = _copy(target, depth + layer - start, place, name, source)
        depth += end - start
    if faults:
        raise UserError("\n".join(faults))
    said = ", ".join(
        f"{source.place} {start} to {end - 1}" for source, (start, end) in zip(models, ranges, strict=True)
    )
    return Plan(models, None, tensors, None, [f"{depth} layers: {said}"])


def _copy(name: str, layer: int | None, place: int, own: str, source: Source) -> PlannedTensor:
    return PlannedTensor(name, layer, {place: own}, None, source.specs[own])


def stacked_config(recipe: MergeConfig, models: Sequence[Source]) -> dict[str, Any]:
    """The first model's config with the stack's number of layers; a list with a value a layer (such as layer_types) is
    put together of the models' lists as the layers are.
    """
    ranges = ranges_of(recipe, models)
    config: dict[str, Any] = copy.deepcopy(dict(models[0].config))
    part = config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
    for key, value in list(part.items()):
        if key in _NUM_LAYERS:
            part[key] = sum(end - start for start, end in ranges)
        elif isinstance(value, list) and len(value) == models[0].num_layers and value:
            lists = [source.text_config.get(key) for source in models]
            if all(
                isinstance(each, list) and len(each) == source.num_layers
                for each, source in zip(lists, models, strict=True)
            ):
                part[key] = [
                    item for each, (start, end) in zip(lists, ranges, strict=True) for item in (each or [])[start:end]
                ]
    return config
