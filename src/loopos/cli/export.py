"""`loopos export`: writes a trained model as a folder that other programs open, and prints the verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from loopos.cli.answers import say, say_json
from loopos.cli.options import Json, NewFolder, Verbose, argument
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.config.figures import as_bytes

if TYPE_CHECKING:
    from loopos.exporting.export import Exported


Exportable = Annotated[
    str,
    argument("MODEL", 'Run folder, model folder, adapter folder, transformers checkpoint or "smollm2-135m".'),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options of `loopos export`."""

    output: NewFolder
    format: Annotated[
        str, typer.Option("--format", help="huggingface, gguf, adapter, modelfile or onnx.", show_default=False)
    ]
    type: Annotated[
        str | None,
        typer.Option("--type", help="f32, f16 or bf16; for gguf and modelfile also q8_0 and q4_0; default: f16."),
    ] = None
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload the folder to this hub repository.")
    ] = None
    license: Annotated[
        str | None, typer.Option("--license", "--licence", help="License that the model card names.")
    ] = None
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not reopen the export to compare it.")] = False
    json: Json = False
    verbose: Verbose = False


def run(source: Exportable, options: ExportOptions) -> int:
    """Exports and prints. Raises `UserError`."""
    from loopos.exporting.settings import ExportSettings, check_settings
    from loopos.storage.output_folder import require_new_folder

    settings = ExportSettings(
        format=options.format,
        type=options.type,
        push=options.push,
        license=options.license,
        check=not options.no_check,
    )
    check_settings(settings)
    require_new_folder(options.output)
    prepare_to_compute(verbose=options.verbose)
    from loopos.cli.bar import Bar
    from loopos.exporting.export import export

    with Bar("export") as bar:
        exported = export(source, options.output, settings, on_progress=bar.progress)
    if options.json:
        check = exported.check
        say_json(
            {
                "folder": str(exported.folder),
                "format": options.format,
                "type": exported.type,
                "bytes_before": exported.bytes_before,
                "bytes_after": exported.bytes_after,
                "largest_difference": check.largest if check else None,
                "same_likeliest": check.same if check else None,
                "greedy_texts": list(check.texts) if check else [],
                "notes": list(exported.notes),
                "warning": exported.warning or None,
                "pushed": exported.pushed,
            }
        )
        return _exit_code(exported)
    say(f"{exported.folder}: {options.format}, {exported.type.upper()}, {as_bytes(exported.bytes_after)}")
    say(f"  before {as_bytes(exported.bytes_before)}")
    for line in exported.notes:
        say(f"  {line}")
    if exported.check is not None:
        say(f"  verified: {exported.check.summary()}")
    if exported.pushed is not None:
        say(f"  pushed to {exported.pushed}")
    return _exit_code(exported)


def _exit_code(exported: Exported) -> int:
    """0, or the exit code of an export whose outputs differ from the model's, after a warning."""
    from loopos.exporting.checks import UNLIKE_EXIT_CODE

    if not exported.warning:
        return 0
    note(f"warning: {exported.warning}")
    return UNLIKE_EXIT_CODE
