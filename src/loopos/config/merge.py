"""The recipe of a merge: models, method, its parameters, and what they must not contradict.

Enters: plain values. Leaves: `MergeConfig`, and `Finding`s for contradictions between keys and for missing files. Left
out: what only the models can tell (shapes, vocabularies, labels), and the methods (`deploy.merging.methods`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from loopos.config import checks
from loopos.config.faults import Finding
from loopos.config.keys import Place, Section, Text
from loopos.config.merge_checks import ELECTING, WITHOUT_BASE, check_overwriting, check_recipe
from loopos.config.nodes import MappingNode
from loopos.config.paths import check_output_folder, check_rows, check_weights
from loopos.config.sections import MethodConfig

MergeMethod: TypeAlias = Literal[
    "linear",
    "greedy_soup",
    "slerp",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della_linear",
    "della",
    "breadcrumbs",
    "breadcrumbs_ties",
    "model_stock",
    "passthrough",
]

_NORMALIZED = ("linear", "greedy_soup", *ELECTING)
_DENSE = ("ties", "dare_linear", "dare_ties", "della_linear", "della")
_SCALED = ("task_arithmetic", *_DENSE, "breadcrumbs", "breadcrumbs_ties")
_USES: dict[str, tuple[str, ...]] = {
    "t": ("slerp",),
    "scale": _SCALED,
    "density": _DENSE,
    "epsilon": ("della_linear", "della"),
    "drop_smallest": ("breadcrumbs", "breadcrumbs_ties"),
    "drop_largest": ("breadcrumbs", "breadcrumbs_ties"),
    "normalize": (*_NORMALIZED, *_SCALED),
}
PARAMETERS = ("t", "scale", "density", "epsilon", "drop_smallest", "drop_largest")
EXAMPLE_ROW = '{"text": "the parcel came late", "label": "complaint"}'

Finite: TypeAlias = float
Unit: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Density: TypeAlias = Annotated[float, Field(gt=0, le=1)]
Below: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Weights: TypeAlias = Finite | Annotated[list[Finite], Field(min_length=1)]
Units: TypeAlias = Unit | Annotated[list[Unit], Field(min_length=1)]
Densities: TypeAlias = Density | Annotated[list[Density], Field(min_length=1)]
Shares: TypeAlias = Below | Annotated[list[Below], Field(min_length=1)]


def _named(value: object) -> object:
    """A model given by its name alone, as a section."""
    return {"model": value} if isinstance(value, str) else value


class MergedModel(Section):
    """One of the models that are merged."""

    model: Place = Field(description="run, model folder, weights file, adapter folder, embedded model or hub id")
    weight: Weights = Field(default=1.0, description="factor of the model; a list is spread over the layers")
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="passthrough: layers taken, [first, one after the last]; all of them when absent"
    )


Entry: TypeAlias = Annotated[MergedModel, BeforeValidator(_named, json_schema_input_type=MergedModel | str)]


class PatternSection(Section):
    """Values of their own for the tensors whose names match; keys that are absent keep the recipe's."""

    tensors: Text = Field(description='names of tensors: a glob such as "*.mlp.*", or "re:" and a regular expression')
    weights: Annotated[list[Weights], Field(min_length=1)] | None = Field(
        default=None, description="factor of each model, in the recipe's order"
    )
    t: Units | None = Field(default=None, description="as the recipe's t")
    scale: Weights | None = Field(default=None, description="as the recipe's scale")
    density: Densities | None = Field(default=None, description="as the recipe's density")
    epsilon: Shares | None = Field(default=None, description="as the recipe's epsilon")
    drop_smallest: Shares | None = Field(default=None, description="as the recipe's drop_smallest")
    drop_largest: Shares | None = Field(default=None, description="as the recipe's drop_largest")


class MergeConfig(MethodConfig):
    """Everything that a merge is told. A list in the place of a number is spread over the layers, first to last."""

    method: MergeMethod = Field(description="how tensors are merged")
    models: Annotated[list[Entry], Field(min_length=1)] = Field(description="the models, in order")
    output_dir: Place = Field(description="folder to write")
    base: Place | None = Field(default=None, description="model that the others were trained from")
    description: str = Field(default="", description="free text, for people")
    t: Units = Field(default=0.5, description="slerp: where between the first model (0) and the second (1)")
    scale: Weights = Field(default=1.0, description="factor λ on the merged change, before the base is added")
    density: Densities = Field(default=0.5, description="ties, dare, della: share of each delta's elements kept")
    epsilon: Shares = Field(default=0.1, description="della: width of the window of drop probabilities")
    drop_smallest: Shares = Field(default=0.85, description="breadcrumbs: share of elements dropped as negligible")
    drop_largest: Shares = Field(default=0.01, description="breadcrumbs: share of elements dropped as outliers")
    normalize: bool | None = Field(
        default=None,
        description="divide by the sum of the weights; when absent, as the method's paper: averages and elections do",
    )
    patterns: list[PatternSection] = Field(
        default_factory=list, description="values for tensors by name; the first that matches counts"
    )
    tokenizer: Place = Field(
        default="first",
        description='whose tokenizer the result gets: "first", "base", a model of the recipe; or "union" of all tokens',
    )
    result: Literal["model", "adapter"] = Field(
        default="model", description="adapter: adapters alone, summed exactly into one by joining their ranks"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="number format of the result; that of the first model when auto"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=42, description="start of all random numbers")
    shard_gigabytes: Annotated[float, Field(gt=0)] = Field(default=5.0, description="largest file of weights (GB)")
    validation_data: Place | None = Field(default=None, description="greedy_soup: rows by which models are chosen")
    metric: Text | None = Field(
        default=None, description="greedy_soup: metric to keep; accuracy, pair_accuracy, mae or loss when absent"
    )
    evaluate: list[Place] = Field(
        default_factory=list, description="rows on which all models and the result are measured"
    )

    @property
    def normalizes(self) -> bool:
        """Whether weights are divided by their sum."""
        return self.method in _NORMALIZED if self.normalize is None else self.normalize

    @property
    def places(self) -> list[str]:
        """Where the models are, the base last if there is one."""
        return [each.model for each in self.models] + ([self.base] if self.base is not None else [])

    def check(self) -> Iterator[Finding]:
        return check_recipe(self)

    def check_files(self) -> Iterator[Finding]:
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
        for place in self.places:
            if os.path.isdir(place) and checks.same_path(place, self.output_dir):
                yield Finding(("output_dir",), f'"{self.output_dir}", one of the models', "another folder")
        yield from check_overwriting(self.output_dir)

    def notes(self) -> list[str]:
        fields = type(self).model_fields
        said = [
            f"{name} has no effect: the method is {self.method}"
            for name, methods in _USES.items()
            if self.method not in methods and getattr(self, name) != fields[name].default
        ]
        if self.base is not None and self.method in WITHOUT_BASE and self.tokenizer != "base" and not self._adapters():
            said.append(f"base has no effect: the method is {self.method}")
        return said

    def _adapters(self) -> bool:
        return any(os.path.isfile(os.path.join(each.model, "adapter_config.json")) for each in self.models)


def is_merge_recipe(root: MappingNode) -> bool:
    """Whether the tree of a config file is a merge's recipe: it names models, and no method of training."""
    return "models" in root.entries and "computation" not in root.entries
