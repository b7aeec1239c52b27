"""Tensors of safetensors files, one at a time: read without mapping a file into memory, written as shards.

Enters: files, or a folder of a model; or the specs of what will come, then the tensors. Leaves: tensors, or files with
an index that is right. A mapped file counts as memory of the process as soon as it is read, so files are read piece by
piece instead. Left out: what the tensors mean; the bytes themselves (`tensor_format.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loopos.config.faults import UserError
from loopos.storage.durable import write_new
from loopos.storage.json_files import read_object, save_json
from loopos.storage.tensor_format import TensorSpec, in_file_order, read_header, safetensors_pieces, streamed_pieces

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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
    cut short, or holds a tensor that another one holds too.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                places = read_header(stream, file.stat().st_size)
        except OSError as problem:
            raise UserError(f"{file}: cannot be read: {problem.strerror}") from problem
        except ValueError as problem:
            raise UserError(f"{file}: no whole safetensors file: {problem}") from problem
        for name, (spec, start) in places.items():
            if name in found:
                raise UserError(f"{file}: {name} is in {found[name].file.name} too; wanted each tensor once")
            found[name] = StoredTensor(file, spec, start)
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a small file. Raises `UserError` as `stored_tensors`."""
    return {name: stored.read() for name, stored in stored_tensors([file]).items()}


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a new file of tensors that are in memory, and fsyncs it. Raises `OSError` when the disk is full."""
    write_new(file, safetensors_pieces(tensors))


def holds_weights(folder: Path) -> bool:
    """Whether a model's folder has its weights as safetensors."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model's folder by name, by its index where there is one. Raises `UserError` for a folder without
    safetensors, a file that is missing or broken, and an index that names what is in no file.
    """
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder}: no {WEIGHTS} here; wanted weights as safetensors")
        return stored_tensors([folder / WEIGHTS])
    named = read_object(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f"{folder / INDEX}: broken: it has no weight_map of tensors' files")
    files = sorted(set(named.values()))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{folder}: {absent[0]} is missing, which {INDEX} names")
    found = stored_tensors(folder / file for file in files)
    if nowhere := sorted(set(named) - set(found)):
        raise UserError(f"{folder / INDEX}: names the tensor {nowhere[0]}, which is in no file")
    return found


def usual_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The number format of most elements."""
    counts: Counter[torch.dtype] = Counter()
    for stored in tensors.values():
        counts[stored.spec.dtype] += stored.spec.num_elements
    return counts.most_common(1)[0][0]


def write_tensors(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensor_of: Callable[[str], Tensor],
    *,
    most_bytes: float = math.inf,
) -> None:
    """Writes tensors to model.safetensors in `folder`, or where they are more than `most_bytes` to numbered shards and
    their index, all fsynced. tensor_of: as `streamed_pieces` asks it. Raises `OSError` when the disk is full.
    """
    shards = _shards(specs, most_bytes)
    names = _shard_names(len(shards))
    for file, shard in zip(names, shards, strict=True):
        write_new(folder / file, streamed_pieces({name: specs[name] for name in shard}, tensor_of))
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        save_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


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
        return [WEIGHTS]
    return [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]
