"""`loopos export`: writes a trained model as a folder that other programs open, and prints the verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loopos.cli.answers import say, say_json
from loopos.cli.bar import Bar
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.config.figures import as_bytes
from loopos.exporting.settings import ExportSettings, check_settings
from loopos.storage.output_folder import require_new_folder

if TYPE_CHECKING:
    from loopos.exporting.export import Exported


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The options of `loopos export`."""

    output: Path
    format: str
    type: str | None = None
    push: str | None = None
    license: str | None = None
    check: bool = True
    json: bool = False
    verbose: bool = False


def run(source: str, options: ExportOptions) -> int:
    """Exports and prints. Raises `UserError`."""
    settings = ExportSettings(
        format=options.format, type=options.type, push=options.push, licence=options.license, check=options.check
    )
    check_settings(settings)
    require_new_folder(options.output)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
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
