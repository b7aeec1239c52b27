"""`loopos prune`: weights set to zero, or parts taken out, with what it cost.

Enters: a model or a recipe file, and options. Leaves: a model's folder, and the figures on standard output. Left out:
what it shares with `loopos quantize` (`weight_change.py`), the pruning (`deploy.prune`).
"""

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


def run(actual: str, options: ChangeOptions) -> int:
    """Prunes, writes and prints. Raises `UserError`."""
    result = weight_change.run(actual, options, read=read_pruning_recipe, counted="blocks", work=_prune)
    weight_change.tell(
        result,
        [f"{each.told.sparsity:.3g}" for each in result.after],
        lambda each: {
            "sparsity": each.told.sparsity,
            "zeros": sum(kind.zeros for kind in each.told.zeros),
            "block_weights": sum(kind.weights for kind in each.told.zeros),
        },
        as_json=options.json,
    )
    if not options.json:
        say(f"{result.folder}: report.md, recipe.json")
    return 0


def shares(actual: str | None) -> list[float | str] | float | str | None:
    """The word after --sparsity: a share, or with commas several. What is no number is left to the recipe's checks."""
    if actual is None:
        return None
    found = [_number(word) for word in actual.split(",")]
    return found[0] if len(found) == 1 else found


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _prune(recipe: PruningRecipe, device: str, output: Path, bar: Bar) -> PruningResult:
    from loopos.compression.prune import Pruner

    return Pruner(recipe, device=device, say=bar.say, progress=bar.progress).prune(output)
