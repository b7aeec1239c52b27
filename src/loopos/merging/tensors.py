"""The tensors of a merge, one after the other: read from the models, merged, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.merge import MergeConfig
from loopos.config.variants import MERGE_METHODS
from loopos.merging.methods import Parameters, generator_of, merged
from loopos.merging.plan import Plan, PlannedTensor, Values
from loopos.models.load import NUMBER_FORMATS

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with the number of finished tensors, and of all."""


@dataclass(frozen=True, slots=True)
class Change:
    """How far a tensor moved from the base, or without one from the first model: the squared norm of the change, and of
    the tensor it started from. 0 for copies.
    """

    name: str
    layer: int | None
    squared: float
    squared_before: float


@dataclass
class TensorMerger:
    """weights: those of a soup's models, which are averaged, instead of the recipe's."""

    plan: Plan
    recipe: MergeConfig
    weights: Sequence[float] | None
    on_progress: OnProgress
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._values = Values(self.recipe, num_layers=self.plan.num_layers)

    def dtype_of(self, planned: PlannedTensor) -> torch.dtype:
        """The number format in which a tensor is written."""
        if self.recipe.dtype == "auto" or not planned.spec.dtype.is_floating_point:
            return planned.spec.dtype
        return NUMBER_FORMATS[self.recipe.dtype]

    def tensor(self, planned: PlannedTensor, dtype: torch.dtype) -> Tensor:
        """The tensor of the result. Raises `UserError` if it holds non-finite numbers."""
        made = self._merged(planned) if self._has_values(planned) else self._copied(planned)
        made = made.to(dtype)
        if dtype.is_floating_point and not bool(torch.isfinite(made).all()):
            names = ", ".join(source.location for source in self.plan.models)
            raise UserError(
                f"{planned.name}: the merged tensor has non-finite numbers in {dtype}; check "
                f"{names}, or use another dtype or smaller weights"
            )
        self.on_progress(len(self.changes), len(self.plan.tensors))
        return made

    def _has_values(self, planned: PlannedTensor) -> bool:
        """Whether the method computes the numbers: not for integers, nor where layers are copied."""
        return planned.spec.dtype.is_floating_point and self.recipe.method != "passthrough"

    def _copied(self, planned: PlannedTensor) -> Tensor:
        (index, name), *others = planned.origins.items()
        made = self.plan.models[index].read(name)
        for other, own in others:
            if not torch.equal(self.plan.models[other].read(own), made):
                first, second = self.plan.models[index].location, self.plan.models[other].location
                raise UserError(f"{planned.name}: integers that differ between {first} and {second}")
        self.changes.append(Change(planned.name, planned.layer, 0.0, 0.0))
        return made

    def _merged(self, planned: PlannedTensor) -> Tensor:
        weights, parameters = self._values.at(planned.name, planned.layer)
        method = self.recipe.method if self.weights is None else "linear"
        weights = weights if self.weights is None else list(self.weights)
        tensors, base = self._inputs(planned)
        row = MERGE_METHODS[method]
        if len(planned.origins) < len(weights):
            weights = [weights[index] for index in planned.origins]
            if not row.weighs:
                method, weights, parameters = "linear", [1.0] * len(weights), Parameters()
            elif method == "linear":
                parameters = replace(parameters, normalize=True)
        if base is None and row.base:
            # A tensor that the base lacks (a head) has no delta: the models' own are averaged.
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
            draws=lambda index: generator_of(self.recipe.seed, planned.name, index),
        )
        self.changes.append(self._change(planned, made, base))
        return made

    def _inputs(self, planned: PlannedTensor) -> tuple[Iterator[Tensor], Tensor | None]:
        """The models' tensors in fp32, each read when needed, and the base's. If tokens are united, all are read at
        once, with one row per token.
        """
        base = None
        if planned.base is not None and self.plan.base is not None:
            base = self.plan.base.read_float(planned.base)
        if not planned.has_tokens:
            return self._tensors(planned), base
        assert self.plan.vocabulary is not None
        tensors, indices = list(self._tensors(planned)), list(planned.origins)
        if base is None:
            return iter(self.plan.vocabulary.united(tensors, indices)), None
        *united, base = self.plan.vocabulary.united([*tensors, base], [*indices, len(self.plan.models)])
        return iter(united), base

    def _tensors(self, planned: PlannedTensor) -> Iterator[Tensor]:
        for index, name in planned.origins.items():
            yield self.plan.models[index].read_float(name)

    def _change(self, planned: PlannedTensor, made: Tensor, base: Tensor | None) -> Change:
        before = base if base is not None else next(self._inputs(planned)[0])
        size = float(torch.linalg.vector_norm(before)) ** 2
        return Change(planned.name, planned.layer, float(torch.linalg.vector_norm(before.sub_(made))) ** 2, size)
