"""`loopos merge`: merges models or adapters into one.

Takes a recipe, or models and options that make one. Results go to standard output, notes and progress to standard
error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.cli.answers import say, say_json, table
from loopos.cli.bar import Bar
from loopos.cli.configs import print_notes
from loopos.cli.outcome import note
from loopos.cli.quiet import hush_libraries
from loopos.cli.sampling_options import DEVICES, refuse
from loopos.config.figures import as_time
from loopos.config.json_text import MappingNode, Mark
from loopos.config.load import load_recipe
from loopos.config.merge import MergeConfig
from loopos.config.source import COMMAND_LINE, Source, read_source

if TYPE_CHECKING:
    from loopos.merging.merge import MergeResult

_OVERRIDE = re.compile(r"[a-z_]+(\.[A-Za-z0-9_]+)*=")
_RECIPES = (".json", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of `loopos merge`."""

    method: str | None = None
    base: str | None = None
    weights: tuple[float, ...] = ()
    output: Path | None = None
    evaluate: tuple[str, ...] = ()
    device: str = "auto"
    json: bool = False
    verbose: bool = False


def run(arguments: Sequence[str], options: MergeOptions) -> int:
    """Merges and prints. Raises `UserError`."""
    recipe = read_recipe(arguments, options)
    hush_libraries(verbose=options.verbose)
    from loopos.merging.merge import merge
    from loopos.training.precision import pick_device

    device = pick_device(options.device).type
    with Bar("tensors") as bar:
        result = merge(recipe, device=device, note=note, on_progress=bar.progress)
    if options.json:
        say_json(_summary(recipe, result))
    else:
        _describe(recipe, result)
    return 0


def read_recipe(arguments: Sequence[str], options: MergeOptions) -> MergeConfig:
    """The recipe of a command line. Raises `UserError` with all problems at once, without torch."""
    locations = [argument for argument in arguments if not _OVERRIDE.match(argument) or Path(argument).exists()]
    overrides = [argument for argument in arguments if argument not in locations]
    is_recipe = len(locations) == 1 and locations[0].lower().endswith(_RECIPES)
    diagnostics = []
    if not locations:
        diagnostics.append(
            "got no model and no recipe; expected loopos merge RECIPE.json, or loopos merge A B --method …"
        )
    if not is_recipe and options.weights and len(options.weights) != len(locations):
        diagnostics.append(f"--weight: got {len(options.weights)}; expected {len(locations)}, one per model, in order")
    if options.device not in DEVICES:
        diagnostics.append(f"--device: got {options.device}; expected one of {', '.join(DEVICES)}")
    refuse(diagnostics)
    if is_recipe:
        source = read_source(locations[0])
    else:
        source = Source(COMMAND_LINE, "", MappingNode({}, {}, Mark(COMMAND_LINE)))
        overrides = [f"models={json.dumps([{'model': location} for location in locations])}", *overrides]
    loaded = load_recipe(
        source, [*_of_options(options), *overrides] if is_recipe else [*overrides, *_of_options(options)], MergeConfig
    )
    print_notes(loaded)
    assert isinstance(loaded.config, MergeConfig)
    return loaded.config


def _of_options(options: MergeOptions) -> Iterator[str]:
    """The options as recipe keys."""
    actual: dict[str, object] = {
        "method": options.method,
        "base": options.base,
        "output_dir": None if options.output is None else str(options.output),
        "evaluate": list(options.evaluate) or None,
        **{f"models.{number}.weight": weight for number, weight in enumerate(options.weights)},
    }
    return (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in actual.items() if value is not None)


def _summary(recipe: MergeConfig, result: MergeResult) -> dict[str, Any]:
    return {
        "model": str(result.folder),
        "method": recipe.method,
        "tensors": result.num_tensors,
        "parameters": result.num_parameters,
        "seconds": result.seconds,
        "notes": list(result.notes),
        "measured": {each.data: each.values for each in result.measured},
        "soup": [recipe.models[location].model for location in result.trials[-1].members] if result.trials else None,
    }


def _describe(recipe: MergeConfig, result: MergeResult) -> None:
    summary = f"{result.num_tensors:,} tensors, {result.num_parameters:,} parameters, {as_time(result.seconds)}"
    say(f"{result.folder}: {recipe.method} of {len(recipe.models)} models; {summary}")
    for each in result.measured:
        names = list(dict.fromkeys(name for values in each.values.values() for name in values))
        say(f"measured on {each.data}")
        rows = [[location, *(values.get(name) for name in names)] for location, values in each.values.items()]
        say(table(rows, head=["model", *names]))
    say(f"report: {result.folder / 'report.md'}")
