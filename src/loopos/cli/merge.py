"""`loopos merge`: merges models or adapters into one.

Takes a recipe, or models and options that make one. Results go to standard output, notes and progress to standard
error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import say, say_json, table
from loopos.cli.options import Device, Json, Verbose, argument, device_diagnostics, path, refuse
from loopos.cli.outcome import note
from loopos.cli.process import hush_libraries
from loopos.config.figures import as_time
from loopos.config.paths import expanded
from loopos.config.source import CONFIG_SUFFIXES

if TYPE_CHECKING:
    from loopos.config.merge import MergeConfig
    from loopos.merging.merge import MergeResult

_OVERRIDE = re.compile(r"[a-z_]+(\.[A-Za-z0-9_]+)*=")

RecipeOrModels = Annotated[
    tuple[str, ...],
    argument("RECIPE | MODEL... [KEY=VALUE ...]", "Recipe (.json or .yaml) or models, then recipe keys as KEY=VALUE."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """The options of `loopos merge`; None leaves the recipe's value."""

    method: str | None = field(default=None, metadata={"help": "Merge method; see docs/merging.md."})
    base: Annotated[
        str | None, typer.Option("--base", help="Base model that the others were trained from.", parser=expanded)
    ] = None
    weight: tuple[float, ...] = field(default=(), metadata={"help": "Weight of each model, in order."})
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Output folder.", parser=path)] = None
    evaluate: Annotated[
        tuple[str, ...],
        typer.Option(
            "--evaluate", metavar="DATA", help="Data to evaluate inputs and result on; repeatable.", parser=expanded
        ),
    ] = ()
    device: Device = "auto"
    json: Json = False
    verbose: Verbose = False

    def values(self) -> dict[str, object]:
        """The options by the recipe's keys."""
        return {
            "method": self.method,
            "base": self.base,
            "output_dir": self.output,
            "evaluate": self.evaluate or None,
            **{f"models.{number}.weight": weight for number, weight in enumerate(self.weight)},
        }


def run(arguments: RecipeOrModels, options: MergeOptions) -> int:
    """Merges and prints. Raises `UserError`."""
    recipe = read_recipe(arguments, options)
    hush_libraries(verbose=options.verbose)
    from loopos.cli.bar import Bar
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
    from loopos.cli.configs import print_notes
    from loopos.config.load import load_recipe
    from loopos.config.merge import MergeConfig
    from loopos.config.source import read_source, source_on_command_line

    locations = [argument for argument in arguments if not _OVERRIDE.match(argument) or Path(argument).exists()]
    overrides = [argument for argument in arguments if argument not in locations]
    is_recipe = len(locations) == 1 and locations[0].lower().endswith(CONFIG_SUFFIXES)
    diagnostics = []
    if not locations:
        diagnostics.append(
            "got no model and no recipe; expected loopos merge RECIPE.json, or loopos merge A B --method …"
        )
    if not is_recipe and options.weight and len(options.weight) != len(locations):
        diagnostics.append(f"--weight: got {len(options.weight)}; expected {len(locations)}, one per model, in order")
    refuse([*diagnostics, *device_diagnostics(options.device)])
    if is_recipe:
        loaded = load_recipe(read_source(locations[0]), overrides, MergeConfig, values=options.values())
    else:
        # Here options take precedence over KEY=VALUE arguments, which are the recipe.
        source = source_on_command_line({"models": [{"model": location} for location in locations]}, overrides)
        loaded = load_recipe(source, [], MergeConfig, values=options.values())
    print_notes(loaded)
    assert isinstance(loaded.config, MergeConfig)
    return loaded.config


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
