"""`loopos quantize`: weights as codes of eight or four bits, with what it cost.

Enters: a model or a recipe file, and options, which win over the recipe. Leaves: a model's folder with recipe and
report, and the figures on standard output. Left out: the quantization (`deploy.quantizing`), the recipe's checks
(`config.quantization`).
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
from loopos.config.quantization import read_recipe
from loopos.deploy.shipped_folder import refuse_taken

if TYPE_CHECKING:
    from loopos.deploy.quantize import QuantizationResult

_RECIPES = (".json", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """The options of `loopos quantize`; `recipe`: key → value of those that are keys of a recipe, None where not
    given.
    """

    output: Path
    recipe: Mapping[str, Any]
    columns: tuple[str, ...] = ()
    json: bool = False
    verbose: bool = False


def run(given: str, options: QuantizeOptions) -> int:
    """Quantizes, writes and prints. Raises `UserError`."""
    is_recipe = given.lower().endswith(_RECIPES) and not os.path.isdir(given)
    values: dict[str, Any] = {"model": None if is_recipe else given, **options.recipe}
    if options.columns:
        values["columns"] = parse_columns(options.columns)
    words = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    recipe = read_recipe(given if is_recipe else None, words)
    refuse_taken(options.output)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.cli.bar import Bar
    from loopos.deploy.quantize import Quantizer
    from loopos.training.precision import pick_device

    try:
        with Bar("layers") as bar:
            quantizer = Quantizer(recipe, device=pick_device(recipe.device).type, say=bar.say, progress=bar.progress)
            result = quantizer.quantize(options.output)
    except UserError as error:
        raise in_our_words(error) from error
    if options.json:
        say_json(_told(result))
    else:
        _describe(result)
    return 0


def _told(result: QuantizationResult) -> dict[str, Any]:
    """The figures as one JSON object."""
    return {
        "folder": str(result.folder),
        "parameters": result.parameters,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "before": result.before,
        "after": result.after,
        "rates": [
            {"work": rate.name, "before": rate.before, "after": rate.after, "ratio": rate.ratio, "slower": rate.slower}
            for rate in result.rates
        ],
        "verdict": result.verdict,
        "notes": result.notes,
    }


def _describe(result: QuantizationResult) -> None:
    rows: list[list[object]] = [
        ["parameters", result.parameters, result.parameters],
        ["weights", as_bytes(result.bytes_before), as_bytes(result.bytes_after)],
    ]
    rows += [[name, value, result.after.get(name)] for name, value in result.before.items()]
    rows += [[f"{rate.name}, tokens/s", rate.before, rate.after] for rate in result.rates]
    for row in rows:
        say(table([row], head=["", "bf16", result.recipe.method] if row is rows[0] else ()))
    for sentence in result.notes:
        note(sentence)
    say(result.verdict)
    say(f"{result.folder}: report.md, recipe.json")
