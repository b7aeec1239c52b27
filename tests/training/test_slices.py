"""Sliced tensors, and checkpoints that are written in the background."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from loopos.training import checkpoint, checkpoint_files
from loopos.training.checkpoint_files import CheckpointError, Records, folder_name, seal_folder, write_group
from loopos.training.sharding import Rows
from loopos.training.slices import SlicedTensors, rows_of, slice_name

MATRIX = torch.arange(15.0).view(5, 3)
WIDE = torch.arange(20.0).view(5, 4)
# Of three processes: the rows of a matrix of five, of a vector of two (none is left for the third).
PARTS = [(Rows(0, 2, (5, 3)), Rows(0, 1, (2,))), (Rows(2, 2, (5, 3)), Rows(1, 1, (2,))),
          (Rows(4, 1, (5, 3)), Rows(2, 0, (2,)))]  # fmt: skip


def written(folder: Path, *, leave_out: int | None = None) -> Path:
    """The folder of a checkpoint whose weights three processes wrote, or all but one of them."""
    path = folder / folder_name(7)
    path.mkdir()
    records: Records = {}
    for number, (matrix, vector) in enumerate(PARTS):
        members = {"matrix": matrix.of(MATRIX), "vector": vector.of(torch.tensor([8.0, 9.0]))}
        if number == 0:
            members["count"] = torch.tensor(4)
        if number != leave_out:
            file = slice_name("weights", number, 3)
            records |= write_group(path, file, members, {"matrix": matrix, "vector": vector})
    seal_folder(path, records, b"{}", {"step": 7, "metric": None, "is_best": False})
    return path


def test_slices_are_read_as_whole_tensors(tmp_path: Path) -> None:
    found = checkpoint.load(written(tmp_path)).tensors["weights"]
    assert set(found) == {"matrix", "vector", "count"}
    assert len(found) == 3
    assert torch.equal(found["matrix"], MATRIX)
    assert found["vector"].tolist() == [8.0, 9.0]
    assert found["count"].item() == 4


@pytest.mark.parametrize(("first", "count"), [(0, 5), (1, 2), (2, 2), (3, 2), (4, 1), (5, 0)])
def test_any_rows_are_had_from_slices_and_from_whole_tensors(tmp_path: Path, first: int, count: int) -> None:
    found = checkpoint.load(written(tmp_path)).tensors["weights"]
    assert isinstance(found, SlicedTensors)
    rows = Rows(first, count, (5, 3))
    for tensors in (found, {"matrix": MATRIX}):
        assert torch.equal(rows_of(tensors, "matrix", rows), MATRIX[first : first + count])
    with pytest.raises(ValueError, match="another shape"):
        rows_of(found, "matrix", Rows(first, count, (5, 4)))
    # What is not in rows is the same for all.
    assert rows_of(found, "count", rows).item() == 4


def written_in_columns(folder: Path, leave_out: int | None = None) -> Path:
    """Of four processes, two by two: each has some rows of two of the four columns."""
    path = folder / folder_name(7)
    path.mkdir()
    records: Records = {}
    for number, (row, column) in enumerate(((0, 0), (0, 2), (3, 0), (3, 2))):
        rows = Rows(row, 3 if row == 0 else 2, (5, 4), (column, 2))
        members = {"wide": rows.of(WIDE).contiguous()}
        if number != leave_out:
            records |= write_group(path, slice_name("weights", number, 4), members, {"wide": rows})
    seal_folder(path, records, b"{}", {"step": 7, "metric": None, "is_best": False})
    return path


@pytest.mark.parametrize("columns", [None, (0, 2), (2, 2), (1, 2), (0, 4), (3, 1)])
@pytest.mark.parametrize(("first", "count"), [(0, 5), (1, 3), (3, 2), (5, 0)])
def test_rows_of_columns_are_had_from_slices_of_columns(
    tmp_path: Path, first: int, count: int, columns: tuple[int, int] | None
) -> None:
    found = checkpoint.load(written_in_columns(tmp_path)).tensors["weights"]
    rows = Rows(first, count, (5, 4), columns)
    for tensors in (found, {"wide": WIDE}):
        assert torch.equal(rows_of(tensors, "wide", rows), rows.of(WIDE))
    assert torch.equal(found["wide"], WIDE)


@pytest.mark.parametrize(("number", "what"), [(0, "rows from 0 on"), (1, "rows from 0 on"), (3, "rows from 3 on")])
def test_a_slice_of_columns_that_is_missing_is_no_checkpoint(tmp_path: Path, number: int, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"{what} of wide are in no file"):
        checkpoint.load(written_in_columns(tmp_path, leave_out=number))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_slice_that_is_missing_is_no_checkpoint(tmp_path: Path, number: int) -> None:
    path = written(tmp_path, leave_out=number)
    with pytest.raises(CheckpointError, match=r"rows from \d on of matrix are in no file"):
        checkpoint.load(path)
    assert checkpoint.newest_whole(tmp_path)[0] is None


def test_a_checkpoint_is_there_when_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, writing = threading.Event(), threading.Event()

    def slowly(folder: Path, group: str, *arguments: object) -> Records:
        writing.set()
        assert go_on.wait(10)
        return write_group(folder, group, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_files, "write_group", slowly)
    weights = {"matrix": MATRIX}
    save = checkpoint.Save(tmp_path, 3, {"weights": weights}, {"seen": 1}, weights)
    save.begin(in_background=True)
    assert writing.wait(10)
    assert checkpoint.newest_whole(tmp_path)[0] is None
    go_on.set()
    assert save.finish() == tmp_path / "step-00000003"
    found, summary = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert (found.step, found.state, summary) == (3, {"seen": 1}, [])


def test_an_error_in_the_writing_thread_is_raised_by_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> Records:
        raise PermissionError("not here")

    monkeypatch.setattr(checkpoint_files, "write_group", fails)
    save = checkpoint.Save(tmp_path, 3, {"weights": {}}, {}, {})
    save.begin(in_background=True)
    with pytest.raises(PermissionError, match="not here"):
        save.finish()
    assert list(tmp_path.iterdir()) == []
