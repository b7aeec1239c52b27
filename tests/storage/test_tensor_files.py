"""Tensors come back as they were written, one at a time, and files that are not whole are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.storage.tensor_files import TensorSpec, folder_tensors, stored_tensors, usual_dtype, write_tensors

TENSORS: dict[str, Tensor] = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.arange(4, dtype=torch.int8),
    "c": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "d": torch.arange(6.0).view(2, 3).t(),
}


def written(folder: Path, *, most_bytes: float) -> list[str]:
    """Writes `TENSORS`; the names in the order of the requests."""
    folder.mkdir()
    requests: list[str] = []

    def tensor_of(name: str) -> Tensor:
        requests.append(name)
        return TENSORS[name]

    specs = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    write_tensors(folder, specs, tensor_of, most_bytes=most_bytes)
    return requests


@pytest.mark.parametrize(("most_bytes", "files"), [(1e9, 1), (28.0, 3), (1.0, 5)])
def test_tensors_come_back_from_one_file_and_from_shards(tmp_path: Path, most_bytes: float, files: int) -> None:
    # Wide elements first, then by name: 4, 2 and 1 bytes.
    assert written(tmp_path / "out", most_bytes=most_bytes) == ["b", "d", "empty", "c", "a"]
    stored = folder_tensors(tmp_path / "out")
    assert set(stored) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(stored[name].read(), tensor)
        assert stored[name].spec == TensorSpec.of(tensor)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == files
    from_library = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    assert all(torch.equal(from_library[name], tensor) for name, tensor in TENSORS.items())
    assert usual_dtype(stored) == torch.float32


def test_a_tensor_that_differs_from_its_spec_is_an_assertion(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected"):
        write_tensors(tmp_path, {"a": TensorSpec(torch.float32, (2,))}, lambda name: torch.zeros(3))


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        content["weight_map"] = change(content["weight_map"])
        file.write_text(json.dumps(content))

    return edit


def twice(folder: Path) -> None:
    save_file({"b": torch.zeros(1), "a": TENSORS["a"]}, sorted(folder.glob("*.safetensors"))[-1])


BROKEN = {
    "shard missing": (without_a_shard, "is missing"),
    "shard cut": (cut_short, "not a complete safetensors file: b does not fit"),
    "index names nothing": (index(lambda starts: {**starts, "e": starts["a"]}), "names the tensor e"),
    "index without a map": (index(lambda starts: list(starts)), "no weight_map"),
    "index with a number": (index(lambda starts: {**starts, "a": 1}), "no weight_map"),
    "twice": (twice, "b is also in model-00001-of-00003.safetensors;"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_named(tmp_path: Path, name: str) -> None:
    harm, summary = BROKEN[name]
    written(tmp_path / "out", most_bytes=28.0)
    harm(tmp_path / "out")
    with pytest.raises(UserError, match=summary):
        folder_tensors(tmp_path / "out")


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    written(tmp_path / "out", most_bytes=1e9)
    stored = folder_tensors(tmp_path / "out")
    cut_short(tmp_path / "out")
    with pytest.raises(UserError, match="truncated: 3 of 4 bytes"):
        stored["a"].read()


def header_of(shape: list[int], offsets: list[float]) -> bytes:
    """A file of four bytes of tensors, whose header describes one."""
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


@pytest.mark.parametrize(
    ("content", "summary"),
    [
        (b"", "not a header length"),
        (b"\xff" * 40, "not a header length"),
        ((4).to_bytes(8, "little") + b"[1] ", "is incomplete"),
        ((16).to_bytes(8, "little") + b'{"a":{"dtype":1}', "not a complete"),
        ((40).to_bytes(8, "little") + b'{"a":{"dtype":"F4","shape":[1]}}'.ljust(40), "format F4"),
        ((40).to_bytes(8, "little") + b'{"a":{"shape":[1]}}'.ljust(40), "is incomplete"),
        (header_of([-1, -1], [0, 4]), "invalid shape or offset"),
        (header_of([1], [0.0, 4.0]), "invalid shape or offset"),
        (header_of([1], [-4, 0]), "invalid shape or offset"),
        (header_of([2], [0, 4]), "does not fit its offsets"),
        (header_of([2], [0, 8]), "does not fit its offsets"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, summary: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=summary):
        stored_tensors([tmp_path / "model.safetensors"])
