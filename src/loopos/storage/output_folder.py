"""The new output folder of a command: complete or absent, with its recipe and report. torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopos.config.diagnostics import UserError
from loopos.storage.durable import explain_disk_full, require_writable
from loopos.storage.whole_folder import whole_folder

REPORT = "report.md"
NOTHING_WRITTEN = "nothing was written: {remedy}, then run the command again"


def require_new_folder(out: Path) -> None:
    """Raise `UserError` if `out` exists (nothing is overwritten) or is not writable."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output: got {out}, which exists; expected a new folder")
    require_writable("data.output_dir", out)


@contextmanager
def open_output_folder(out: Path, needed_bytes: int, what: str) -> Iterator[Path]:
    """A folder to write to; it becomes `out` at the end of the block and is removed if the block fails.

    Raises `DiskFull`, with `needed_bytes` and `what` in its message.
    """
    with explain_disk_full(out, needed_bytes, what, NOTHING_WRITTEN), whole_folder(out) as partial:
        yield partial
