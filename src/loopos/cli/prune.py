"""`loopos prune`: sets weights to zero or removes parts of a model, and reports the effect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopos.cli import weight_change
from loopos.cli.answers import say
from loopos.cli.weight_change import ChangeOptions
from loopos.config.compression import PruningRecipe, read_pruning_recipe

if TYPE_CHECKING:
    from loopos.cli.bar import Bar
    from loopos.compression.prune import PruningResult


def run(model: str, options: ChangeOptions) -> int:
    """Prunes, writes and prints. Raises `UserError`."""
    result = weight_change.run(model, options, read=read_pruning_recipe, counted="blocks", work=_prune)
    weight_change.print_figures(
        result,
        [f"{each.details.sparsity:.3g}" for each in result.after],
        lambda each: {
            "sparsity": each.details.sparsity,
            "zeros": sum(kind.zeros for kind in each.details.zeros),
            "block_weights": sum(kind.weights for kind in each.details.zeros),
        },
        as_json=options.json,
    )
    if not options.json:
        say(f"{result.folder}: report.md, recipe.json")
    return 0


def fractions(text: str | None) -> list[float | str] | float | str | None:
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


def _prune(recipe: PruningRecipe, device: str, output: Path, bar: Bar) -> PruningResult:
    from loopos.compression.prune import Pruner

    return Pruner(recipe, device=device, say=bar.say, progress=bar.progress).prune(output)
