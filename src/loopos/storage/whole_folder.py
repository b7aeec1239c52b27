"""Write folders atomically: under a hidden name next to the target, then renamed.

    OUT   .OUT.partial-PID while it is written   .OUT.replaced-PID the old OUT between the two renames

The finished folder is durable, has a manifest (`manifest`), and its files have the mode that the umask allows.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loopos.storage.durable import fsync_path
from loopos.storage.foreign_errors import os_error_of
from loopos.storage.manifest import file_records, write_manifest

_LEFTOVER = re.compile(r"\.(.+)\.(partial|replaced|removed)-(\d{1,9})")


def hidden(final: Path, purpose: str) -> Path:
    """The hidden sibling of `final` that is "partial", "replaced" or "removed", for this process."""
    return final.with_name(f".{final.name}.{purpose}-{os.getpid()}")


def replace_folder(partial: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing an existing one."""
    replaced = hidden(final, "replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    fsync_path(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def is_another_process(process: int) -> bool:
    """Whether another process with this id is running."""
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
    """A folder to write to; it becomes `folder` at the end of the block and is removed if the block fails.

    `replaces`: whether it replaces a folder that exists by then, or is dropped in favor of it. Raises `OSError` if the
    disk is full.
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
        fsync_path(folder.parent)
        return
    replace_folder(partial, folder)


@contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """A hidden folder next to `final` to write to: durable at the end of the block, removed if the block fails.

    First removes such folders of killed processes. Raises `OSError` if the disk is full.
    """
    _clear(final)
    partial = hidden(final, "partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        write_manifest(partial, file_records(partial))
        _open_to_readers(partial)
        # Without fsync, the rename may become durable before the content.
        for path in (*partial.rglob("*"), partial):
            fsync_path(path)
    # Ctrl-C, too, must leave no partial folder.
    except BaseException as problem:
        shutil.rmtree(partial, ignore_errors=True)
        # A caller that handles a full disk needs the system's error number, which some libraries hide.
        if (hidden_error := os_error_of(problem, str(final))) is not None:
            raise hidden_error from problem
        raise


def _open_to_readers(folder: Path) -> None:
    """Set the mode of each file to that of the umask: safetensors creates files that only the owner may read."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode & 0o111 | mode)


def clear_leftovers(folder: Path) -> list[str]:
    """Remove partial files and folders of killed processes from a folder, and restore what they were about to replace.

    Returns one line for each. Only the owner of the folder's lock may call this (`folder_lock`).
    """
    lines = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        caught = _LEFTOVER.fullmatch(entry.name)
        if caught is None or is_another_process(int(caught[3])):
            continue
        final = folder / caught[1]
        if caught[2] == "replaced" and not final.exists() and not caught[1].startswith("."):
            os.rename(entry, final)
            lines.append(f"{final}: restored, its replacement was never finished")
        else:
            remove(entry)
            lines.append(f"{entry}: removed, left by process {caught[3]}, which ended early")
    return lines


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _clear(folder: Path) -> None:
    """Remove what killed processes left next to `folder`, and restore what they were about to replace."""
    # A name with two dots is the partial folder of a partial folder.
    name = re.escape(folder.name)
    left = re.compile(rf"\.(?:\.{name}\.partial-\d+|{name})\.(partial|replaced)-(\d+)")
    for path in sorted(folder.parent.iterdir()) if folder.parent.is_dir() else ():
        caught = left.fullmatch(path.name)
        if caught is None or is_another_process(int(caught[2])):
            continue
        if caught[1] == "replaced" and not path.name.startswith("..") and not folder.exists():
            os.rename(path, folder)
        else:
            # Another process may do the same at this moment.
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
