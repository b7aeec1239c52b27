"""The commands `export` and `ensemble`.

Enters: the words of a command line. Leaves: the exit code. As in `commands`, here stand names, options and help alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loopos.cli.option_types import Columns, Device, Json, Verbose, path
from loopos.config.paths import expanded

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Folder to write, which is not there yet.", show_default=False, parser=path),
]


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='Run folder, model folder, adapter folder, checkpoint of transformers or "smollm2-135m".',
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
        typer.Option("--type", help="f32, f16 or bf16; of gguf and modelfile also q8_0 and q4_0 (f16 when absent)."),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Send the folder to this repository of a hub.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Licence that the model card names.")] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not open the export again to compare it.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Export a model for other programs: one folder, with a model card."""
    from loopos.cli import export as command

    options = command.ExportOptions(output, file_format, number_type, push, licence, not no_check, json, verbose)
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
        str, typer.Option("--method", help="mean or logits; weighted or majority; of language models also vote.")
    ] = "mean",
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Share of a language model, in their order; may be repeated.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option("--fit", metavar="DATA", help="Labelled rows that weights are fitted on.", parser=expanded),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            "--test", metavar="DATA", help="Rows or text that members and ensemble are measured on.", parser=expanded
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the members into the folder, not their paths alone.")
    ] = False,
    columns: Columns = None,
    device: Device = "auto",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Join classifiers, regressors or language models to one model."""
    from loopos.cli import ensemble as command

    options = command.EnsembleOptions(
        output, method, tuple(weight or ()), fit, test, copy, tuple(columns or ()), device, json, verbose
    )
    raise typer.Exit(command.run(members, options))
