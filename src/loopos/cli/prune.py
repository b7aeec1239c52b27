"""`loopos prune`: weights set to zero, or parts taken out, with what it cost.

Enters: a model or a recipe file, and options, which win over the recipe. Leaves: a model's folder with recipe and
report, and the figures on standard output. Left out: the pruning (`deploy.prune`), the recipe's checks
(`config.pruning`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.cli.answers import as_bytes, say, say_json, table
from loopos.cli.columns import parse_columns
from loopos.cli.opened_models import in_our_words
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.config.faults import UserError
from loopos.config.pruning import read_recipe
from loopos.deploy.shipped_folder import refuse_taken

if TYPE_CHECKING:
    from loopos.deploy.prune import PruningResult
    from loopos.deploy.quality import Measured

_RECIPES = (".json", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """The options of `loopos prune`; `recipe`: key → value of those that are keys of a recipe, None where not given."""

    output: Path
    recipe: Mapping[str, Any]
    columns: tuple[str, ...] = ()
    sparsity: str | None = None
    json: bool = False
    verbose: bool = False


def run(given: str, options: PruneOptions) -> int:
    """Prunes, writes and prints. Raises `UserError`."""
    is_recipe = given.lower().endswith(_RECIPES) and not os.path.isdir(given)
    recipe = read_recipe(given if is_recipe else None, _words(None if is_recipe else given, options))
    refuse_taken(options.output)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.cli.bar import Bar
    from loopos.deploy.prune import Pruner
    from loopos.training.precision import pick_device

    try:
        with Bar("blocks") as bar:
            pruner = Pruner(recipe, device=pick_device(recipe.device).type, say=bar.say, progress=bar.progress)
            result = pruner.prune(options.output)
    except UserError as error:
        raise in_our_words(error) from error
    if options.json:
        say_json(_told(result))
    else:
        _describe(result)
    return 0


def _words(model: str | None, options: PruneOptions) -> list[str]:
    """The options as `key=value` words."""
    values: dict[str, Any] = {"model": model, **options.recipe}
    if options.columns:
        values["columns"] = parse_columns(options.columns)
    words = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    if options.sparsity is not None:
        shares = options.sparsity.split(",")
        words.append(f"sparsity={shares[0] if len(shares) == 1 else '[' + ','.join(shares) + ']'}")
    return words


def _told(result: PruningResult) -> dict[str, Any]:
    """The figures as one JSON object."""
    after = [
        {
            "sparsity": pruned.sparsity,
            "folder": str(result.folder / pruned.name),
            "zeros": sum(each.zeros for each in pruned.zeros),
            "block_weights": sum(each.weights for each in pruned.zeros),
            **_figures(pruned.measured),
        }
        for pruned in result.after
    ]
    return {"folder": str(result.folder), "before": _figures(result.before), "after": after, "notes": result.notes}


def _figures(measured: Measured) -> dict[str, Any]:
    return {
        "parameters": measured.parameters,
        "weight_bytes": measured.weight_bytes,
        "reading_tokens_per_second": measured.reading,
        "writing_tokens_per_second": measured.writing,
        "metrics": measured.metrics,
    }


def _describe(result: PruningResult) -> None:
    models = [("before", result.before), *((f"{each.sparsity:.3g}", each.measured) for each in result.after)]
    rows: list[list[object]] = [
        ["parameters", *(model.parameters for _, model in models)],
        ["weights", *(as_bytes(model.weight_bytes) for _, model in models)],
    ]
    rows += [[name, *(model.metrics.get(name) for _, model in models)] for name in result.before.metrics]
    rows.append(["reading, tokens/s", *(model.reading for _, model in models)])
    if result.before.writing is not None:
        rows.append(["writing, tokens/s", *(model.writing for _, model in models)])
    for row in rows:
        say(table([row], head=["", *(name for name, _ in models)] if row is rows[0] else ()))
    for sentence in result.notes:
        note(sentence)
    say(f"{result.folder}: report.md, recipe.json")
