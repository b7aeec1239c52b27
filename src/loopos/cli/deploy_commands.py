"""The commands `prune` and `quantize`: options and help texts."""

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
        str | None, typer.Option("--sparsity", help="Fraction to remove; several with commas, each for its own model.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="2:4 keeps 2 of every 4 inputs of a row; 4:8 keeps 4 of every 8.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option("--scope", help="For magnitude: layer (a threshold per linear layer) or global.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", metavar="FILE", help="Text or rows for calibration.", parser=expanded),
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
    """Prune a model: set weights to zero, or remove heads, channels or layers."""
    from loopos.cli import prune as command
    from loopos.cli.weight_change import ChangeOptions

    recipe = {
        "method": method, "sparsity": command.fractions(sparsity), "pattern": pattern, "scope": scope,
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
        int | None, typer.Option("--group-size", help="int4: inputs per scale: 32, 64, 128 or 256.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Rounding method: none, gptq or awq.")
    ] = None,
    calibration_text: Annotated[
        str | None,
        typer.Option(
            "--calibration-text", metavar="FILE", help="Calibration text or rows for gptq and awq.", parser=expanded
        ),
    ] = None,
    calibration_rows: of.CalibrationRows = None,
    calibration_tokens: of.CalibrationTokens = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="PATTERN", help="Layers to leave unquantized, e.g. *.down_proj; repeatable."),
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
    """Quantize a model to 8-bit or 4-bit weights: smaller on disk and in memory."""
    from loopos.cli import quantize as command
    from loopos.cli.weight_change import ChangeOptions

    recipe = {
        "method": method, "group_size": group_size, "calibration": calibration, "calibration_text": calibration_text,
        "calibration_rows": calibration_rows, "calibration_tokens": calibration_tokens, "keep": keep or None,
        "evaluate": evaluate, "window": window, "stride": stride, "seed": seed, "device": device,
    }  # fmt: skip
    raise typer.Exit(command.run(model, ChangeOptions(output, recipe, tuple(columns or ()), json, verbose)))
