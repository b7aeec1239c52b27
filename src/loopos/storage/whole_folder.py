"""Folders that are whole or not there: written beside their place under a hidden name, then renamed.

    OUT   .OUT.partial-PID while it is written   .OUT.replaced-PID what was OUT, in the instant between two renames

Enters: a place, and who writes into it. Leaves: the folder at its place, durable, with a manifest of its files
(`manifest.py`), each of which may be read by whom the umask lets. Left out: what it holds.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loopos.storage.durable import fsync_place
from loopos.storage.foreign_errors import os_error_of
from loopos.storage.manifest import file_records, write_manifest

_LEFTOVER = re.compile(r"\.(.+)\.(partial|replaced|removed)-(\d{1,9})")


def hidden(final: Path, purpose: str) -> Path:
    """The sibling in which this process holds `final` while it is "partial", "replaced" or "removed"."""
    return final.with_name(f".{final.name}.{purpose}-{os.getpid()}")


def put_in_place(partial: Path, final: Path) -> None:
    """Gives a finished folder its name; what has it already is replaced."""
    replaced = hidden(final, "replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    fsync_place(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def is_another_process(process: int) -> bool:
    """Whether a process of this number runs, and is not this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def whole_folder(folder: Path, *, replaces: bool = True) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` at once when the block ends, and vanishes when it fails.
    replaces: whether it takes the place of one that is there by then, or gives way to it.

    Raises `OSError` when the disk is full.
    """
    with partial_folder(folder) as partial:
        yield partial
    if not replaces:
        try:
            os.rename(partial, folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if not folder.exists():
                raise
            return
        fsync_place(folder.parent)
        return
    put_in_place(partial, folder)


@contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final` to write into, which is durable when the block ends and gone when it fails. What
    killed processes left of such folders is removed before. Raises `OSError` when the disk is full.
    """
    _clear(final)
    partial = hidden(final, "partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        write_manifest(partial, file_records(partial))
        _open_to_readers(partial)
        # A rename alone may come before what it names.
        for place in (*partial.rglob("*"), partial):
            fsync_place(place)
    # Ctrl-C too must leave nothing beside the folder.
    except BaseException as problem:
        shutil.rmtree(partial, ignore_errors=True)
        # A caller that handles a full disk needs the system's error number, which some libraries hide.
        if (hidden_error := os_error_of(problem, str(final))) is not None:
            raise hidden_error from problem
        raise


def _open_to_readers(folder: Path) -> None:
    """Gives each file the mode that a new one has under the umask: safetensors makes files that the owner alone may
    read.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode & 0o111 | mode)


def clear_leftovers(folder: Path) -> list[str]:
    """Removes what processes that were killed left half done in a folder, files and folders alike; what one of them was
    about to replace goes back. Returns a line for each. Only the folder's one writer may call this (`folder_lock`).
    """
    lines = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        caught = _LEFTOVER.fullmatch(entry.name)
        if caught is None or is_another_process(int(caught[3])):
            continue
        final = folder / caught[1]
        if caught[2] == "replaced" and not final.exists() and not caught[1].startswith("."):
            os.rename(entry, final)
            lines.append(f"{final}: put back, its replacement was never finished")
        else:
            remove(entry)
            lines.append(f"{entry}: removed, left by process {caught[3]} that ended before it was done")
    return lines


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _clear(folder: Path) -> None:
    """Removes what processes that were killed left beside `folder`; what one of them was about to replace goes back."""
    # One of two dots was to become the content of one that was being written itself.
    name = re.escape(folder.name)
    left = re.compile(rf"\.(?:\.{name}\.partial-\d+|{name})\.(partial|replaced)-(\d+)")
    for place in sorted(folder.parent.iterdir()) if folder.parent.is_dir() else ():
        caught = left.fullmatch(place.name)
        if caught is None or is_another_process(int(caught[2])):
            continue
        if caught[1] == "replaced" and not place.name.startswith("..") and not folder.exists():
            os.rename(place, folder)
        else:
            # Another process that begins now may be at the same.
            with suppress(FileNotFoundError):
                shutil.rmtree(place)
