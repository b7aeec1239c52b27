"""One tensor of a merge after the other: read from the models, merged, checked.

Enters: a plan and its recipe. Leaves: tensors of the result in their formats, and how far each went. Left out: files
(`storage.tensor_files`), the mathematics (`methods.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.merge import MergeConfig
from loopos.merging.methods import Parameters, generator_of, merged
from loopos.merging.plan import Plan, PlannedTensor, Values
from loopos.models.load import NUMBER_FORMATS

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with the number of tensors done, and of all."""


@dataclass(frozen=True, slots=True)
class Change:
    """How far a tensor went from the base, or without one from the first model: the squared norm of the change, and of
    what it is from. Copies went nowhere.
    """

    name: str
    layer: int | None
    squared: float
    squared_before: float


@dataclass
class TensorMerger:
    """weights: those of a soup's models, which are then averaged, instead of what the recipe says."""

    plan: Plan
    recipe: MergeConfig
    weights: Sequence[float] | None
    on_progress: OnProgress
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._values = Values(self.recipe, num_layers=self.plan.num_layers)

    def dtype_of(self, planned: PlannedTensor) -> torch.dtype:
        """The number format that a tensor is written in."""
        if self.recipe.dtype == "auto" or not planned.spec.dtype.is_floating_point:
            return planned.spec.dtype
        return NUMBER_FORMATS[self.recipe.dtype]

    def tensor(self, planned: PlannedTensor, dtype: torch.dtype) -> Tensor:
        """The tensor of the result. Raises `UserError` where it holds numbers that are not finite."""
        made = self._merged(planned) if self._has_values(planned) else self._copied(planned)
        made = made.to(dtype)
        if dtype.is_floating_point and not bool(torch.isfinite(made).all()):
            places = ", ".join(source.place for source in self.plan.models)
            raise UserError(
                f"{planned.name}: the merged tensor holds numbers that are not finite in {dtype}; look for them in "
                f"{places}, or take another dtype or smaller weights"
            )
        self.on_progress(len(self.changes), len(self.plan.tensors))
        return made

    def _has_values(self, planned: PlannedTensor) -> bool:
        """Whether the method says the numbers: not where they are whole, nor where layers are copied."""
        return planned.spec.dtype.is_floating_point and self.recipe.method != "passthrough"

    def _copied(self, planned: PlannedTensor) -> Tensor:
        (place, name), *others = planned.origins.items()
        made = self.plan.models[place].read(name)
        for other, own in others:
            if not torch.equal(self.plan.models[other].read(own), made):
                first, second = self.plan.models[place].place, self.plan.models[other].place
                raise UserError(f"{planned.name}: whole numbers that differ between {first} and {second}")
        self.changes.append(Change(planned.name, planned.layer, 0.0, 0.0))
        return made

    def _merged(self, planned: PlannedTensor) -> Tensor:
        weights, parameters = self._values.at(planned.name, planned.layer)
        method = self.recipe.method if self.weights is None else "linear"
        weights = weights if self.weights is None else list(self.weights)
        tensors, base = self._inputs(planned)
        if len(planned.origins) < len(weights):
            weights = [weights[place] for place in planned.origins]
            if method in ("slerp", "model_stock"):
                method, weights, parameters = "linear", [1.0] * len(weights), Parameters()
            elif method == "linear":
                parameters = replace(parameters, normalize=True)
        if base is None and method not in ("linear", "slerp"):
            # What the base lacks (a head) has no delta: the models' own are averaged.
            method, weights, parameters = "linear", [1.0] * len(weights), Parameters()
        if method == "linear" and parameters.normalize and math.isclose(sum(weights), 0.0, abs_tol=1e-12):
            raise UserError(
                f"{planned.name}: weights that sum to 0 cannot be normalized; change them, or set normalize=false"
            )
        made = merged(
            method,
            tensors,
            weights,
            parameters,
            base=base,
            draws=lambda place: generator_of(self.recipe.seed, planned.name, place),
        )
        self.changes.append(self._change(planned, made, base))
        return made

    def _inputs(self, planned: PlannedTensor) -> tuple[Iterator[Tensor], Tensor | None]:
        """The models' tensors in fp32, each read when its turn comes, and the base's. Where tokens are united all are
        read at once, with a row for each token.
        """
        base = None
        if planned.base is not None and self.plan.base is not None:
            base = self.plan.base.read_float(planned.base)
        if not planned.has_tokens:
            return self._tensors(planned), base
        assert self.plan.vocabulary is not None
        tensors, places = list(self._tensors(planned)), list(planned.origins)
        if base is None:
            return iter(self.plan.vocabulary.united(tensors, places)), None
        *united, base = self.plan.vocabulary.united([*tensors, base], [*places, len(self.plan.models)])
        return iter(united), base

    def _tensors(self, planned: PlannedTensor) -> Iterator[Tensor]:
        for place, name in planned.origins.items():
            yield self.plan.models[place].read_float(name)

    def _change(self, planned: PlannedTensor, made: Tensor, base: Tensor | None) -> Change:
        before = base if base is not None else next(self._inputs(planned)[0])
        size = float(torch.linalg.vector_norm(before)) ** 2
        return Change(planned.name, planned.layer, float(torch.linalg.vector_norm(before.sub_(made))) ** 2, size)
