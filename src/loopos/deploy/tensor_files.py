"""Tensors of safetensors files, one at a time: read without mapping a file into memory, written as shards.

Enters: files, or the names, formats and shapes of what will come, then the tensors. Leaves: tensors, or files with an
index that is right. A mapped file counts as memory of the process as soon as it is read, so files are read piece by
piece instead. Left out: what the tensors mean.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loopos.config.faults import UserError
from loopos.functional.tensor_file import header

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = "model.safetensors.index.json"
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Number format and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def described(self) -> Tensor:
        """A tensor of this kind without content."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: its spec, and the byte at which it begins."""

    file: Path
    spec: TensorSpec
    start: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Raises `UserError` where the file is gone or cut short."""
        flat = torch.empty(self.spec.num_elements, dtype=self.spec.dtype)
        if flat.numel():
            buffer = flat.view(torch.uint8).numpy().data
            try:
                with self.file.open("rb", buffering=0) as file:
                    file.seek(self.start)
                    done = 0
                    while done < len(buffer) and (count := file.readinto(buffer[done:])):
                        done += count
            except OSError as problem:
                raise UserError(f"{self.file}: cannot be read: {problem.strerror}") from problem
            if done < len(buffer):
                raise UserError(f"{self.file}: cut short: {done:,} of {len(buffer):,} bytes of a tensor")
        return flat.view(self.spec.shape)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by name; headers alone are read. Raises `UserError` for a file that is none, is
    cut short, or has formats that nothing here computes with.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in _header(file):
            if name in found:
                raise UserError(f"{file}: {name} is in {found[name].file.name} too; wanted each tensor once")
            found[name] = stored
    return found


def _header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError("its first bytes tell no length of a header")
            entries = json.loads(stream.read(length))
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of the format {entry['dtype']}, wanted one of {', '.join(DTYPES)}")
            spec = TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            start, end = entry["data_offsets"]
            if end - start != spec.num_bytes or not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"{name} has no place of its size in the file (cut short?)")
            yield name, StoredTensor(file, spec, 8 + length + start)
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {problem.strerror}") from problem
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{file}: no whole safetensors file: {problem}") from problem


def write_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    most_bytes: float,
) -> None:
    """Writes `tensors`, which come as `in_file_order(specs)` says, to model.safetensors in `folder`, or where they are
    more than `most_bytes` to numbered shards and their index. One tensor is held at a time; each is of its spec.
    """
    shards = _shards(specs, most_bytes)
    names = _shard_names(len(shards))
    source = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        with (folder / file).open("xb") as stream:
            stream.write(header({name: specs[name].described() for name in shard}))
            for name in shard:
                came, tensor = next(source)
                assert came == name, f"{came} came in the place of {name}"
                assert TensorSpec(tensor.dtype, tuple(tensor.shape)) == specs[name], name
                if tensor.numel():
                    stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                del tensor
    assert next(source, None) is None, "more tensors than were announced"
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def in_file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names as their tensors are written: wide elements first, so that each begins at a multiple of its element's
    size; then by name.
    """
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def _shards(specs: Mapping[str, TensorSpec], most_bytes: float) -> list[list[str]]:
    """The names in file order, cut where a file would grow over `most_bytes`; a larger tensor has a file for itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in in_file_order(specs):
        size = specs[name].num_bytes
        if shards[-1] and filled + size > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_names(number: int) -> Sequence[str]:
    if number == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]
