"""The commands that make a trained model one that ships.

Enters: the words of a command line. Leaves: the exit code. As in `commands`, here stand names, options and help alone.
"""

from __future__ import annotations

from typing import Annotated

import typer

from loopos.cli import option_types as of
from loopos.config.paths import expanded


def prune(
    model: of.ModelOrRecipe,
    output: of.ChangedOutput,
    method: Annotated[
        str | None, typer.Option("--method", help="magnitude, wanda, sparsegpt, heads, channels or layers.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", help="Share that goes, or several with commas, each a model of its own.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="2:4 keeps 2 of every 4 inputs of a row, 4:8 4 of every 8.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option("--scope", help="magnitude: one threshold for each linear layer, or global.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", metavar="FILE", help="Text or rows that the model reads to choose.", parser=expanded
        ),
    ] = None,
    calibration_rows: of.CalibrationRows = None,
    calibration_tokens: of.CalibrationTokens = None,
    evaluate: of.EvaluatedOn = None,
    window: of.Window = None,
    stride: of.Stride = None,
    columns: of.Columns = None,
    seed: of.CalibrationSeed = None,
    device: of.RecipeDevice = None,
    json: of.Json = False,
    verbose: of.Verbose = False,
) -> None:
    """Prune a model: set weights to zero, or take out heads, channels or layers."""
    from loopos.cli import prune as command
    from loopos.cli.weight_change import ChangeOptions

    recipe = {
        "method": method, "sparsity": command.shares(sparsity), "pattern": pattern, "scope": scope,
        "calibration": calibration, "calibration_rows": calibration_rows, "calibration_tokens": calibration_tokens,
        "evaluate": evaluate, "window": window, "stride": stride, "seed": seed, "device": device,
    }  # fmt: skip
    raise typer.Exit(command.run(model, ChangeOptions(output, recipe, tuple(columns or ()), json, verbose)))


def quantize(
    model: of.ModelOrRecipe,
    output: of.ChangedOutput,
    method: Annotated[
        str | None, typer.Option("--method", help="int8; int8-dynamic, activations too; or int4, in groups.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="int4: inputs that share a scale: 32, 64, 128 or 256.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="How weights are rounded: none, gptq or awq.")
    ] = None,
    calibration_text: Annotated[
        str | None,
        typer.Option(
            "--calibration-text", metavar="FILE", help="Text or rows that gptq and awq read.", parser=expanded
        ),
    ] = None,
    calibration_rows: of.CalibrationRows = None,
    calibration_tokens: of.CalibrationTokens = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="PATTERN", help="Layers that stay as they are, as *.down_proj; repeatable."),
    ] = None,
    evaluate: of.EvaluatedOn = None,
    window: of.Window = None,
    stride: of.Stride = None,
    columns: of.Columns = None,
    seed: of.CalibrationSeed = None,
    device: of.RecipeDevice = None,
    json: of.Json = False,
    verbose: of.Verbose = False,
) -> None:
    """Quantize a model: weights as codes of eight or four bits, smaller on disk and in memory."""
    from loopos.cli import quantize as command
    from loopos.cli.weight_change import ChangeOptions

    recipe = {
        "method": method, "group_size": group_size, "calibration": calibration, "calibration_text": calibration_text,
        "calibration_rows": calibration_rows, "calibration_tokens": calibration_tokens, "keep": keep or None,
        "evaluate": evaluate, "window": window, "stride": stride, "seed": seed, "device": device,
    }  # fmt: skip
    raise typer.Exit(command.run(model, ChangeOptions(output, recipe, tuple(columns or ()), json, verbose)))
