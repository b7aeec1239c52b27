"""What `loopos prune` and `loopos quantize` share: options of a recipe, how it is read, and how figures are printed.

The work is in `loopos.compression`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer

from loopos.cli.answers import say, say_json, table
from loopos.cli.options import Columns, Json, Stride, Verbose, Window, argument, parse_columns, path
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.config.figures import as_bytes
from loopos.config.paths import expanded
from loopos.config.source import CONFIG_SUFFIXES

if TYPE_CHECKING:
    from loopos.compression.pipeline import Changed, ChangedModel
    from loopos.config.compression import Recipe
    from loopos.evaluation.quality import Measured

RecipeT = TypeVar("RecipeT", bound="Recipe")

ModelOrRecipe = Annotated[
    str,
    argument("MODEL|RECIPE", "Run folder, model folder, weights file or hub id; or a recipe (.json or .yaml)."),
]

ChangedFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="New output folder for model, recipe and report.",
        show_default=False,
        parser=path,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOptions:
    """Options that take precedence over the recipe: None leaves its value, or the default."""

    calibration_rows: int | None = field(default=None, metadata={"help": "Rows of calibration text; default: 128."})
    calibration_tokens: int | None = field(default=None, metadata={"help": "Tokens per calibration row; default: 512."})
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            metavar="FILE",
            help="Measure quality on this file: text for perplexity, labeled rows for a head.",
            parser=expanded,
        ),
    ] = None
    window: Window = None
    stride: Stride = None
    columns: Columns = ()
    seed: int | None = field(default=None, metadata={"help": "Seed for choosing calibration rows; default: 0."})
    device: str | None = field(default=None, metadata={"help": "auto, cpu, cuda or mps."})
    json: Json = False
    verbose: Verbose = False

    def values(self) -> dict[str, object]:
        """The options by the recipe's keys."""
        names = ("calibration_rows", "calibration_tokens", "evaluate", "window", "stride", "seed", "device")
        columns = parse_columns(self.columns) if self.columns else None
        return {"columns": columns, **{name: getattr(self, name) for name in names}}


class CompressionOptions(Protocol):
    """The options of a command that changes weights by a recipe."""

    @property
    def output(self) -> Path: ...

    @property
    def recipe(self) -> RecipeOptions: ...

    def values(self) -> dict[str, object]:
        """The options by the recipe's keys."""


def prepared_recipe(recipe_class: type[RecipeT], model: str, options: CompressionOptions) -> RecipeT:
    """The recipe of a command line, after all checks that need no torch; the process is ready to compute.

    model: a recipe file, or the model of a recipe that the options alone make. Raises `UserError`.
    """
    from loopos.config.load import read_recipe
    from loopos.storage.output_folder import require_new_folder

    if model.lower().endswith(CONFIG_SUFFIXES) and not os.path.isdir(model):
        recipe = read_recipe(recipe_class, model, options.values())
    else:
        recipe = read_recipe(recipe_class, None, {"model": model, **options.values()})
    require_new_folder(options.output)
    prepare_to_compute(verbose=options.recipe.verbose)
    return recipe


def print_figures(
    changed: Changed[Any, Any],
    heads: Sequence[str],
    own: Callable[[ChangedModel[Any]], Mapping[str, Any]],
    *,
    as_json: bool,
) -> None:
    """Prints the figures. heads: column titles of the changed models; own: extra JSON fields of a changed model."""
    if as_json:
        after = [
            {
                "folder": str(changed.folder / each.name),
                **own(each),
                **_figures(each.measured),
                "rates": [
                    {"work": rate.name, "before": rate.before, "after": rate.after, "ratio": rate.ratio,
                     "slower": rate.slower}
                    for rate in each.rates
                ],
            }
            for each in changed.after
        ]  # fmt: skip
        folder = str(changed.folder)
        say_json({"folder": folder, "before": _figures(changed.before), "after": after, "notes": changed.notes})
        return
    models = [changed.before, *(each.measured for each in changed.after)]
    rows: list[list[object]] = [
        ["parameters", *(model.parameters for model in models)],
        ["weights", *(as_bytes(model.weight_bytes) for model in models)],
    ]
    rows += [[name, *(model.metrics.get(name) for model in models)] for name in changed.before.metrics]
    for number, first in enumerate(changed.after[0].rates):
        after_rates = [each.rates[number].after for each in changed.after]
        rows.append([f"{first.name}, tokens/s", first.before, *after_rates])
    for row in rows:
        say(table([row], head=["", "before", *heads] if row is rows[0] else ()))
    for sentence in changed.notes:
        note(sentence)


def _figures(measured: Measured) -> dict[str, Any]:
    return {
        "parameters": measured.parameters,
        "weight_bytes": measured.weight_bytes,
        "precision": measured.precision,
        "metrics": measured.metrics,
    }
