"""The folder that a work of this room leaves: new, whole or not at all, with its recipe and report.

Enters: a place. Leaves: a folder to write into. Torch is not imported. Left out: what is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopos.config.diagnostics import UserError
from loopos.storage.durable import explain_disk_full, require_writable
from loopos.storage.whole_folder import whole_folder

REPORT = "report.md"
NOTHING_WRITTEN = "nothing was written: {remedy}, then run the command again"


def refuse_taken(out: Path) -> None:
    """Raises `UserError` where something lies already, for nothing is overwritten, and where nothing can be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output: got {out}, which is there already; expected a new folder")
    require_writable("data.output_dir", out)


@contextmanager
def shipped_folder(out: Path, needed_bytes: int, what: str) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends and vanishes when it fails. needed_bytes, what:
    told where the disk is full. Raises `DiskFull`.
    """
    with explain_disk_full(out, needed_bytes, what, NOTHING_WRITTEN), whole_folder(out) as partial:
        yield partial
