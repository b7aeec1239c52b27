"""`loopos prune`: sets weights to zero or removes parts of a model, and reports the effect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from loopos.cli.answers import say
from loopos.cli.compression import ChangedFolder, ModelOrRecipe, RecipeOptions, prepared_recipe, print_figures
from loopos.config.paths import expanded


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """The options of `loopos prune`."""

    output: ChangedFolder
    method: str | None = field(
        default=None, metadata={"help": "magnitude, wanda, sparsegpt, heads, channels or layers."}
    )
    sparsity: str | None = field(
        default=None, metadata={"help": "Fraction to remove; several with commas, each for its own model."}
    )
    pattern: str | None = field(
        default=None, metadata={"help": "2:4 keeps 2 of every 4 inputs of a row; 4:8 keeps 4 of every 8."}
    )
    scope: str | None = field(
        default=None, metadata={"help": "For magnitude: layer (a threshold per linear layer) or global."}
    )
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", metavar="FILE", help="Text or rows for calibration.", parser=expanded),
    ] = None
    recipe: RecipeOptions

    def values(self) -> dict[str, object]:
        """The options by the recipe's keys."""
        names = ("method", "pattern", "scope", "calibration")
        own = {name: getattr(self, name) for name in names}
        return {**own, "sparsity": _fractions(self.sparsity), **self.recipe.values()}


def run(model: ModelOrRecipe, options: PruneOptions) -> int:
    """Prunes, writes and prints. Raises `UserError`."""
    from loopos.config.compression import PruningRecipe

    recipe = prepared_recipe(PruningRecipe, model, options)
    from loopos.cli.bar import Bar
    from loopos.compression.prune import Pruner
    from loopos.training.precision import pick_device

    device = pick_device(recipe.device).type
    with Bar("blocks") as bar:
        result = Pruner(recipe, device=device, say=bar.say, progress=bar.progress).prune(options.output)
    print_figures(
        result,
        [f"{each.details.sparsity:.3g}" for each in result.after],
        lambda each: {
            "sparsity": each.details.sparsity,
            "zeros": sum(kind.zeros for kind in each.details.zeros),
            "block_weights": sum(kind.weights for kind in each.details.zeros),
        },
        as_json=options.recipe.json,
    )
    if not options.recipe.json:
        say(f"{result.folder}: report.md, recipe.json")
    return 0


def _fractions(text: str | None) -> list[float | str] | float | str | None:
    """The value of --sparsity: a fraction, or several with commas. The recipe's checks reject what is no number."""
    if text is None:
        return None
    found = [_number(each) for each in text.split(",")]
    return found[0] if len(found) == 1 else found


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
