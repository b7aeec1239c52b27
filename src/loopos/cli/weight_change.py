"""What `loopos prune` and `loopos quantize` share: reading a recipe from the command line, running it, printing
figures.

Options take precedence over the recipe file. The work is in `loopos.compression`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loopos.cli.answers import say, say_json, table
from loopos.cli.columns import parse_columns
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.config.compression import Recipe
from loopos.config.figures import as_bytes
from loopos.storage.output_folder import require_new_folder

if TYPE_CHECKING:
    from loopos.cli.bar import Bar
    from loopos.compression.pipeline import Changed, ChangedModel
    from loopos.evaluation.quality import Measured

_RECIPES = (".json", ".yaml", ".yml")
RecipeT = TypeVar("RecipeT", bound=Recipe)


@dataclass(frozen=True, slots=True)
class ChangeOptions:
    """The options of such a command. `recipe`: values by recipe key; None: not set on the command line."""

    output: Path
    recipe: Mapping[str, Any]
    columns: tuple[str, ...] = ()
    json: bool = False
    verbose: bool = False


def run(
    model: str,
    options: ChangeOptions,
    *,
    read: Callable[[str | None, Sequence[str]], RecipeT],
    counted: str,
    work: Callable[[RecipeT, str, Path, Bar], Changed[RecipeT, Any]],
) -> Changed[RecipeT, Any]:
    """Changes the model and writes it. model: a model or a recipe file. read: makes the recipe from a file and
    `key=value` overrides; counted: what the progress bar counts; work: runs a recipe on a device into a folder.
    Raises `UserError`.
    """
    is_recipe = model.lower().endswith(_RECIPES) and not os.path.isdir(model)
    values: dict[str, Any] = {"model": None if is_recipe else model, **options.recipe}
    if options.columns:
        values["columns"] = parse_columns(options.columns)
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    recipe = read(model if is_recipe else None, overrides)
    require_new_folder(options.output)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.cli.bar import Bar
    from loopos.training.precision import pick_device

    with Bar(counted) as bar:
        return work(recipe, pick_device(recipe.device).type, options.output, bar)


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
