"""`loopos export`: a trained model as a folder that other programs open.

Enters: MODEL, a format, a folder that is not there yet. Leaves: the folder, and on standard output what it holds and
what was found when it was opened again. Left out: the work itself (`deploy.export`).
"""

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
    licence: str | None = None
    check: bool = True
    json: bool = False
    verbose: bool = False


def run(source: str, options: ExportOptions) -> int:
    """Exports and tells. Raises `UserError`."""
    settings = ExportSettings(
        format=options.format, type=options.type, push=options.push, licence=options.licence, check=options.check
    )
    check_settings(settings)
    require_new_folder(options.output)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.exporting.export import export

    with Bar("export") as bar:
        done = export(source, options.output, settings, tell=bar.progress)
    if options.json:
        check = done.check
        say_json(
            {
                "folder": str(done.folder),
                "format": options.format,
                "type": done.type,
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
                "largest_difference": check.largest if check else None,
                "same_likeliest": check.same if check else None,
                "greedy_texts": list(check.texts) if check else [],
                "notes": list(done.notes),
                "warning": done.warning or None,
                "pushed": done.pushed,
            }
        )
        return _exit_code(done)
    say(f"{done.folder}: {options.format}, {done.type.upper()}, {as_bytes(done.bytes_after)}")
    say(f"  before {as_bytes(done.bytes_before)}")
    for line in done.notes:
        say(f"  {line}")
    if done.check is not None:
        say(f"  verified: {done.check.summary()}")
    if done.pushed is not None:
        say(f"  sent to {done.pushed}")
    return _exit_code(done)


def _exit_code(done: Exported) -> int:
    """0, or that of an export that was written and says other things than the model, after a warning."""
    from loopos.exporting.checks import UNLIKE_EXIT_CODE

    if not done.warning:
        return 0
    note(f"warning: {done.warning}")
    return UNLIKE_EXIT_CODE
