"""The values of a recipe at one tensor: per-layer lists interpolated, patterns applied.

Enters: a recipe, a tensor's name and its layer. Leaves: the models' weights and the parameters there. Left out: what
they do (`methods.py`).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from functools import cached_property

from loopos.config.merge import PARAMETERS, MergeConfig, PatternSection
from loopos.config.merge_checks import LayerValues
from loopos.deploy.merging.methods import Parameters

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
