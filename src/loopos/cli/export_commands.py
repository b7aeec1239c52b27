"""The commands `export` and `ensemble`: options and help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loopos.cli.option_types import Columns, Device, Json, Verbose, path
from loopos.config.paths import expanded

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="New output folder.", show_default=False, parser=path),
]


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='Run folder, model folder, adapter folder, transformers checkpoint or "smollm2-135m".',
            show_default=False,
            parser=expanded,
        ),
    ],
    output: Output,
    file_format: Annotated[
        str, typer.Option("--format", help="huggingface, gguf, adapter, modelfile or onnx.", show_default=False)
    ],
    number_type: Annotated[
        str | None,
        typer.Option("--type", help="f32, f16 or bf16; for gguf and modelfile also q8_0 and q4_0; default: f16."),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload the folder to this hub repository.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", "--licence", help="License that the model card names.")
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not reopen the export to compare it.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Export a model for other programs: one folder with a model card."""
    from loopos.cli import export as command

    options = command.ExportOptions(output, file_format, number_type, push, license, not no_check, json, verbose)
    raise typer.Exit(command.run(model, options))


def ensemble(
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Runs or model folders of one task, or language models.",
            show_default=False,
            parser=expanded,
        ),
    ],
    output: Output,
    method: Annotated[
        str, typer.Option("--method", help="mean, logits, weighted or majority; for language models also vote.")
    ] = "mean",
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Weight of each language model, in order; repeatable.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option("--fit", metavar="DATA", help="Labeled rows to fit the weights on.", parser=expanded),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            "--test", metavar="DATA", help="Rows or text to evaluate members and ensemble on.", parser=expanded
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the members into the folder instead of storing their paths.")
    ] = False,
    columns: Columns = None,
    device: Device = "auto",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Combine classifiers, regressors or language models into one ensemble."""
    from loopos.cli import ensemble as command

    options = command.EnsembleOptions(
        output, method, tuple(weight or ()), fit, test, copy, tuple(columns or ()), device, json, verbose
    )
    raise typer.Exit(command.run(members, options))
