"""Whether a folder can be written, found out by writing: permissions do not tell of a read-only disk, of /proc, or of
what an administrator may not do either.

Enters: a folder, there or not. Leaves: nothing, or the error that names it. Left out: how much room there is.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from loopos.config.faults import SettingError


def require_writable(key: str, folder: Path) -> None:
    """Raises `SettingError` where `folder` cannot be made or written. key: the setting that names it."""
    above = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".loopos-", dir=above))
    except OSError as problem:
        raise SettingError(
            key, f"nothing can be written in {above} ({problem.strerror}); name another place than {folder}"
        ) from problem
