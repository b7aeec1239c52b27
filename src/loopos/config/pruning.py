"""The recipe of a pruning: its keys, what they must not contradict, and how it is read.

Enters: a recipe file, words of the command line, or both. Leaves: a `PruningRecipe`, or every fault at once. Left out:
what only the weights can tell (which layers there are, whether a family can be shrunk).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from loopos.config.faults import Finding
from loopos.config.keys import Place, Text
from loopos.config.recipe import Recipe, check_text, read

Method: TypeAlias = Literal["magnitude", "wanda", "sparsegpt", "heads", "channels", "layers"]
UNSTRUCTURED = ("magnitude", "wanda", "sparsegpt")
Sparsity: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
_PATTERN = re.compile(r"([1-9][0-9]{0,2}):([1-9][0-9]{0,2})")


class PruningRecipe(Recipe):
    """Everything that a pruning is told."""

    method: Method = Field(description="what says which weights, heads, channels or layers go")
    sparsity: Sparsity | Annotated[list[Sparsity], Field(min_length=1)] | None = Field(
        default=None,
        description="share that goes, or a list of shares, each a model of its own; a pattern says its own",
    )
    pattern: Text | None = Field(
        default=None, description='"2:4" keeps 2 of every 4 inputs of a row, "4:8" 4 of every 8; null is no pattern'
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="magnitude: one threshold for each linear layer, or one for all"
    )
    calibration: Place | None = Field(
        default=None, description="file of text or rows that the model reads to see which weights matter"
    )

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """The pattern as (kept, of)."""
        found = _PATTERN.fullmatch(self.pattern) if self.pattern is not None else None
        return (int(found[1]), int(found[2])) if found else None

    @property
    def sparsities(self) -> list[float]:
        """The shares to prune to, smallest first."""
        if self.kept_of is not None:
            return [1 - self.kept_of[0] / self.kept_of[1]]
        given: Sequence[float | None] = self.sparsity if isinstance(self.sparsity, list) else [self.sparsity]
        return sorted({share for share in given if share is not None})

    @property
    def structured(self) -> bool:
        """Whether whole parts go, so that the model becomes smaller."""
        return self.method not in UNSTRUCTURED

    @property
    def needs_calibration(self) -> bool:
        """Whether the method reads text."""
        return self.method != "magnitude"

    def check(self) -> Iterator[Finding]:
        """Contradictions between keys, and files that are not there."""
        yield from self._check_shares()
        if self.scope == "global" and (self.method != "magnitude" or self.pattern is not None):
            given = f'"global" with method {self.method}' + (" and a pattern" if self.pattern is not None else "")
            yield Finding(("scope", "method", "pattern"), given, '"layer", or method magnitude without a pattern')
        if self.needs_calibration and self.calibration is None:
            hint = "the text should be like that which the model will meet"
            yield Finding(
                ("calibration", "method"), f"nothing with method {self.method}", "a file of text or rows", hint
            )
        yield from check_text("calibration", self.calibration)
        yield from super().check()

    def _check_shares(self) -> Iterator[Finding]:
        if self.pattern is None:
            if self.sparsity is None:
                yield Finding(("sparsity",), "nothing", "a share such as 0.5, or a pattern such as 2:4")
            return
        if self.structured:
            given = f'"{self.pattern}" with method {self.method}'
            yield Finding(("pattern", "method"), given, f"no pattern, or one of {', '.join(UNSTRUCTURED)}")
        if self.kept_of is None or self.kept_of[0] >= self.kept_of[1]:
            yield Finding(("pattern",), f'"{self.pattern}"', "N:M, N kept of every M, such as 2:4")
        elif self.sparsity is not None and self.sparsity not in (self.sparsities[0], self.sparsities):
            given = f"{self.sparsity} with pattern {self.pattern}"
            yield Finding(("sparsity", "pattern"), given, f"{self.sparsities[0]:g}, or no sparsity")


def read_recipe(path: str | None, overrides: Sequence[str]) -> PruningRecipe:
    """The recipe in a file, if one is named, with `key=value` words that win over it. Raises `ConfigError` with every
    fault.
    """
    return read(PruningRecipe, path, overrides)
