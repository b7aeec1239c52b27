"""What the recipes of pruning and quantization share: keys, checks, and how a recipe is read.

Enters: a kind of recipe, a file, words of the command line. Leaves: the recipe, or every fault at once with its place.
Left out: the keys of one kind alone (`pruning.py`, `quantization.py`), what only the weights can tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from loopos.config.faults import ConfigError, Fault, Finding
from loopos.config.keys import Count, Place, Section, Text
from loopos.config.nodes import MappingNode, Mark, find, plain, value_mark
from loopos.config.paths import check_rows, check_weights, expanded, looks_like_path
from loopos.config.source import COMMAND_LINE, apply_overrides, read_source
from loopos.config.wording import faults_of

_EXAMPLE_ROW = '{"text": "Once there was a lighthouse keeper who could not sleep."}'


class Recipe(Section):
    """What a change of a trained model's weights is told, whatever the change."""

    model: Place = Field(description="run folder, model folder, weights file or hub id of the model")
    calibration_rows: Count = Field(default=128, description="rows of calibration text, drawn by the seed")
    calibration_tokens: Annotated[int, Field(ge=2)] = Field(
        default=512, description="length of a calibration row (tokens); at most the model's positions"
    )
    columns: dict[str, Text] = Field(default={}, description="column of each role of the calibration rows")
    evaluate: Place | None = Field(
        default=None,
        description="file that says what it cost: text for perplexity, labelled rows for a model with a head",
    )
    window: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="perplexity: tokens that the model sees at a time; 1024 when absent"
    )
    stride: Count | None = Field(
        default=None, description="perplexity: tokens between two windows; half a window when absent"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="start of the draw of calibration rows")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where the model runs")

    def check(self) -> Iterator[Finding]:
        """Contradictions between keys, and files that are not there."""
        if self.window is not None and self.stride is not None and self.stride >= self.window:
            yield Finding(("stride", "window"), str(self.stride), f"a stride below the window ({self.window})")
        yield from check_weights("model", self.model)
        yield from check_text("evaluate", self.evaluate)


def check_text(field: str, value: str | None) -> Iterator[Finding]:
    """Faults of a file of running text or of rows."""
    if value is not None and not (looks_like_path(value, (".md", ".text")) and os.path.isfile(value)):
        yield from check_rows(field, value, _EXAMPLE_ROW)


Kind = TypeVar("Kind", bound=Recipe)


def read(kind: type[Kind], path: str | None, overrides: Sequence[str]) -> Kind:
    """The recipe in a file, if one is named, with `key=value` words that win over it. Raises `ConfigError` with every
    fault.
    """
    mark = Mark(COMMAND_LINE)
    root = read_source(expanded(path)).root if path is not None else MappingNode({}, {}, mark)
    root = apply_overrides(root, overrides)
    try:
        recipe = kind.model_validate(plain(root))
    except ValidationError as error:
        described = faults_of(error, root, kind.model_json_schema(), {})
        raise ConfigError([fault for _, fault in described]) from error
    if faults := [_placed(finding, root) for finding in recipe.check()]:
        raise ConfigError(faults)
    return recipe


def _placed(finding: Finding, root: MappingNode) -> Fault:
    written = next((field for field in finding.fields if find(root, (field,)) is not None), finding.fields[0])
    place = value_mark(root, (written,))
    return Fault(place.source, place.line, place.column, finding.fields[0], finding.given, finding.wanted, finding.hint)
