"""What the file system refuses is one line that names the file, whichever library met it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from loopos.storage.durable import DiskFull, StorageError, explain_disk_full, write_new
from loopos.storage.json_files import save_json
from loopos.storage.output_folder import open_output_folder
from loopos.storage.whole_folder import whole_folder

REFUSALS = (errno.EIO, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ESTALE)


@pytest.mark.parametrize("number", REFUSALS)
def test_a_refusal_names_the_file_and_what_is_whole(number: int, tmp_path: Path) -> None:
    file = str(tmp_path / "run" / "file")
    with pytest.raises(StorageError) as caught, explain_disk_full(tmp_path / "run", 10, "an event"):
        raise OSError(number, os.strerror(number), file)
    assert not isinstance(caught.value, DiskFull)
    assert caught.value.exit_code == 74
    assert str(caught.value).startswith(
        f"{file}: {os.strerror(number)} (while writing an event); earlier checkpoints are intact: "
    )
    assert str(caught.value).endswith("then continue with --resume")
    assert "{" not in str(caught.value)


def write_bytes(file: Path) -> None:
    write_new(file, [b"content"])


def write_json(file: Path) -> None:
    save_json(file, {"key": "value"})


@pytest.mark.parametrize("write", [write_bytes, write_json])
def test_a_file_whose_disk_fails_is_named(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fsync that fails knows a descriptor only."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        write(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_full_disk_while_a_tokenizer_is_saved_is_reported(tmp_path: Path) -> None:
    """tokenizers raises an `Exception` of no class of its own."""
    tokenizer = Tokenizer(models.BPE())
    with pytest.raises(Exception, match="No space left on device") as plain:
        tokenizer.save("/dev/full")
    assert type(plain.value) is Exception
    with (
        pytest.raises(DiskFull, match=r"the exported model needs 10 bytes.* nothing was written: free some space"),
        open_output_folder(tmp_path / "out", 10, "the exported model"),
    ):
        tokenizer.save("/dev/full")
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_network_passes_through(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), explain_disk_full(tmp_path, 0, "a model"):
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match=rf"{tmp_path}/file/\S+: Not a directory"),
        explain_disk_full(tmp_path / "file" / "out", 0, "the model"),
        whole_folder(tmp_path / "file" / "out"),
    ):
        pass
