"""Arrow and parquet files with flipped bytes give a diagnostic or rows, and never crash the process."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from loopos.config.diagnostics import DataError
from loopos.data.rows import read

NUM_DAMAGED = 120
# What the child process ends with for an exception that is no fault; a signal has a code of its own.
TRACEBACK = 3


def _table() -> Any:
    rows = [
        {"text": f"film {i} " + "x" * (i % 13), "label": "abc"[i % 3], "spans": [i] * (i % 4), "m": [{"role": str(i)}]}
        for i in range(200)
    ]
    table = pyarrow.Table.from_pylist(rows)
    return table.append_column("kind", table["label"].dictionary_encode())


def _write_file(path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, _table().schema) as writer:
        writer.write_table(_table(), max_chunksize=64)


def _write_stream(path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, _table().schema) as writer:
        writer.write_table(_table(), max_chunksize=64)


def _write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(_table(), path, compression="none", use_dictionary=False)


def _damaged(data: bytes, seed: int) -> bytes:
    """Bits flipped, eight bytes overwritten, or the end cut off, by the seed."""
    draw, broken = random.Random(seed), bytearray(data)
    if seed % 4 == 3:
        return bytes(broken[: draw.randrange(1, len(broken))])
    if seed % 4 == 2:
        place = draw.randrange(len(broken) - 8)
        broken[place : place + 8] = draw.randbytes(8)
        return bytes(broken)
    for _ in range(draw.choice([1, 2, 8])):
        broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
    return bytes(broken)


def _ended(work: Callable[[], None]) -> int:
    """The wait status of a child process that does `work`: a damaged file may kill the process that reads it."""
    child = os.fork()
    if child == 0:
        code = TRACEBACK
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.arrow", _write_file), ("b.arrow", _write_stream), ("c.parquet", _write_parquet)],
    ids=["file", "stream", "parquet"],
)
def test_flipped_bytes_never_end_the_process(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    assert len(list(read(str(path)))) == 200
    diagnostics = tmp_path / "faults"

    def work() -> None:
        refused = 0
        for seed in range(NUM_DAMAGED):
            path.write_bytes(_damaged(whole, seed))
            try:
                list(read(str(path), on_bad_row="skip").rows())
            except DataError as error:
                refused += len(str(error).splitlines()) <= 2
        diagnostics.write_text(str(refused))

    assert _ended(work) == 0
    assert int(diagnostics.read_text()) > NUM_DAMAGED // 4


def test_a_damaged_save_to_disk_folder_is_a_diagnostic(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": [f"film {i}" for i in range(200)], "label": [0, 1] * 100}).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    whole = file.read_bytes()
    # The offsets of the texts: "film 0" ends at byte 6, "film 1" at 12.
    place = whole.index((6).to_bytes(4, "little") + (12).to_bytes(4, "little"))
    file.write_bytes(whole[: place + 4] + (1 << 30).to_bytes(4, "little") + whole[place + 8 :])

    def work() -> None:
        with pytest.raises(DataError, match=r"saved: save_to_disk: got what can't be read as save_to_disk"):
            list(read(str(folder)))

    assert _ended(work) == 0
