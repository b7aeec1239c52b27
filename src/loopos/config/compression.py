"""Recipes of pruning and quantization: keys and checks. `config.load.load_recipe` reads them.

Checks that need the weights are made when the model is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from loopos.config.diagnostics import Problem
from loopos.config.keys import Count, Location, Text
from loopos.config.paths import check_rows, check_weights, looks_like_path
from loopos.config.sections import MethodConfig

_EXAMPLE_ROW = '{"text": "Once there was a lighthouse keeper who could not sleep."}'


class Recipe(MethodConfig):
    """The keys that all recipes share."""

    model: Location = Field(description="run folder, model folder, weights file or hub id of the model")
    calibration_rows: Count = Field(default=128, description="rows of calibration text, drawn by the seed")
    calibration_tokens: Annotated[int, Field(ge=2)] = Field(
        default=512, description="length of a calibration row (tokens); at most the model's positions"
    )
    columns: dict[str, Text] = Field(default={}, description="column of each role of the calibration rows")
    evaluate: Location | None = Field(
        default=None,
        description="file to measure the quality loss on: text for perplexity, labeled rows for a model with a head",
    )
    window: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="perplexity: tokens per window; 1024 when absent"
    )
    stride: Count | None = Field(
        default=None, description="perplexity: tokens between two windows; half a window when absent"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="start of the draw of calibration rows")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where the model runs")

    def check(self) -> Iterator[Problem]:
        """Contradictions between keys, and missing files."""
        if self.window is not None and self.stride is not None and self.stride >= self.window:
            yield Problem(("stride", "window"), str(self.stride), f"a stride below the window ({self.window})")
        yield from check_weights("model", self.model)
        yield from check_text("evaluate", self.evaluate)


def check_text(field: str, value: str | None) -> Iterator[Problem]:
    """Check a file of text or of rows."""
    if value is not None and not (looks_like_path(value, (".md", ".text")) and os.path.isfile(value)):
        yield from check_rows(field, value, _EXAMPLE_ROW)


PruningMethod: TypeAlias = Literal["magnitude", "wanda", "sparsegpt", "heads", "channels", "layers"]
UNSTRUCTURED = ("magnitude", "wanda", "sparsegpt")
Sparsity: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
_PATTERN = re.compile(r"([1-9][0-9]{0,2}):([1-9][0-9]{0,2})")


class PruningRecipe(Recipe):
    """Recipe of a pruning."""

    method: PruningMethod = Field(description="criterion that selects the weights, heads, channels or layers to remove")
    sparsity: Sparsity | Annotated[list[Sparsity], Field(min_length=1)] | None = Field(
        default=None,
        description="fraction to remove, or a list with one model each; set by the pattern if there is one",
    )
    pattern: Text | None = Field(
        default=None, description='"2:4" keeps 2 of every 4 inputs of a row, "4:8" 4 of every 8; null is no pattern'
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="magnitude: one threshold for each linear layer, or one for all"
    )
    calibration: Location | None = Field(
        default=None, description="file of text or rows from which the importance of weights is measured"
    )

    @property
    def pattern_counts(self) -> tuple[int, int] | None:
        """The pattern as (kept, of)."""
        found = _PATTERN.fullmatch(self.pattern) if self.pattern is not None else None
        return (int(found[1]), int(found[2])) if found else None

    @property
    def sparsities(self) -> list[float]:
        """The sparsities to prune to, smallest first."""
        if self.pattern_counts is not None:
            return [1 - self.pattern_counts[0] / self.pattern_counts[1]]
        values: Sequence[float | None] = self.sparsity if isinstance(self.sparsity, list) else [self.sparsity]
        return sorted({sparsity for sparsity in values if sparsity is not None})

    @property
    def structured(self) -> bool:
        """Whether whole parts are removed, so that the model becomes smaller."""
        return self.method not in UNSTRUCTURED

    @property
    def needs_calibration(self) -> bool:
        """Whether the method reads text."""
        return self.method != "magnitude"

    def check(self) -> Iterator[Problem]:
        """Contradictions between keys, and missing files."""
        yield from self._check_sparsity()
        if self.scope == "global" and (self.method != "magnitude" or self.pattern is not None):
            actual = f'"global" with method {self.method}' + (" and a pattern" if self.pattern is not None else "")
            yield Problem(("scope", "method", "pattern"), actual, '"layer", or method magnitude without a pattern')
        if self.needs_calibration and self.calibration is None:
            hint = "choose text like that of the model's later use"
            yield Problem(
                ("calibration", "method"), f"nothing with method {self.method}", "a file of text or rows", hint
            )
        yield from check_text("calibration", self.calibration)
        yield from super().check()

    def _check_sparsity(self) -> Iterator[Problem]:
        if self.pattern is None:
            if self.sparsity is None:
                yield Problem(("sparsity",), "nothing", "a fraction such as 0.5, or a pattern such as 2:4")
            return
        if self.structured:
            actual = f'"{self.pattern}" with method {self.method}'
            yield Problem(("pattern", "method"), actual, f"no pattern, or one of {', '.join(UNSTRUCTURED)}")
        if self.pattern_counts is None or self.pattern_counts[0] >= self.pattern_counts[1]:
            yield Problem(("pattern",), f'"{self.pattern}"', "N:M, N kept of every M, such as 2:4")
        elif self.sparsity is not None and self.sparsity not in (self.sparsities[0], self.sparsities):
            actual = f"{self.sparsity} with pattern {self.pattern}"
            yield Problem(("sparsity", "pattern"), actual, f"{self.sparsities[0]:g}, or no sparsity")


QuantizationMethod: TypeAlias = Literal["int8", "int8-dynamic", "int4"]
Calibration: TypeAlias = Literal["none", "gptq", "awq"]


class QuantizationRecipe(Recipe):
    """Recipe of a quantization."""

    method: QuantizationMethod = Field(
        description="format of the linear layers' weights, and whether activations are rounded too"
    )
    group_size: Literal[32, 64, 128, 256] | None = Field(
        default=None, description="int4: inputs that share a scale; 32 when absent"
    )
    calibration: Calibration = Field(
        default="none",
        description="rounding of weights: to the nearest code, or with activations on a calibration text",
    )
    calibration_text: Location | None = Field(
        default=None, description="gptq, awq: file of text or rows that the model reads"
    )
    keep: list[Text] = Field(
        default=[], description="layers that are not quantized, as patterns; * matches any characters"
    )

    @property
    def bits(self) -> int:
        """Bits of a weight of the linear layers."""
        return 4 if self.method == "int4" else 8

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None for one scale per row."""
        return (self.group_size or 32) if self.method == "int4" else None

    @property
    def needs_calibration(self) -> bool:
        """Whether the model reads text."""
        return self.calibration != "none"

    def check(self) -> Iterator[Problem]:
        """Contradictions between keys, and missing files."""
        if self.group_size is not None and self.method != "int4":
            actual = f"{self.group_size} with method {self.method}"
            yield Problem(("group_size", "method"), actual, "no group size (int8: one scale per row), or method int4")
        if self.needs_calibration and self.calibration_text is None:
            yield Problem(
                ("calibration_text", "calibration"),
                f"nothing with calibration {self.calibration}",
                "a file of text or rows",
                "choose text like that of the model's later use",
            )
        if self.calibration_text is not None and not self.needs_calibration:
            yield Problem(("calibration_text", "calibration"), "a text that is not used", "calibration gptq or awq")
        yield from check_text("calibration_text", self.calibration_text)
        yield from super().check()
