"""Tensors of safetensors files, one at a time: read without mapping a file into memory, written as shards.

Enters: files, or a folder of a model; or the specs of what will come, then the tensors. Leaves: tensors, or files with
an index that is right. A mapped file counts as memory of the process as soon as it is read, so files are read piece by
piece instead. Left out: what the tensors mean; the bytes themselves (`tensor_format.py`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loopos.config.faults import UserError
from loopos.storage.durable import write_new
from loopos.storage.json_files import read_object, save_json
from loopos.storage.manifest import check_manifest
from loopos.storage.tensor_format import TensorSpec, in_file_order, read_header, safetensors_pieces, streamed_pieces

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMED_WEIGHTS = "transformers_weights"
"""The key of a config that names another file, or index, of its folder."""
_INDEX_SUFFIX = ".index.json"


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


def check_readable(file: Path) -> None:
    """Raises `UserError` for a file that cannot be opened. Libraries say of one that may not be read that it is not
    there.
    """
    try:
        file.open("rb").close()
    except PermissionError as problem:
        raise UserError(f"{file}: may not be read by this user; ask its owner for: chmod a+r {file.name}") from problem
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {problem.strerror}") from problem


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


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises `UserError` for a tensor with numbers that are none: no model with such weights is saved or shipped."""
    if not tensor.is_floating_point():
        return
    # Floats of 8 bits have no comparison in torch.
    if bad := int((~torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)).sum()):
        raise UserError(
            f"{name}: {bad:,} of {tensor.numel():,} numbers are not finite (nan or infinite); expected a model whose "
            "weights are numbers: go back to a checkpoint before it diverged"
        )


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a new file of a model's tensors that are in memory, and fsyncs it. Raises `UserError` for numbers that are
    not finite, `OSError` when the disk is full.
    """
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    write_new(file, safetensors_pieces(tensors))


def weights_entry(folder: Path) -> Path | None:
    """The file of weights, or the index of several, that transformers opens in a folder: one that config.json names
    (transformers_weights), then model.safetensors, its index, pytorch_model.bin, its index. None where there is none.
    """
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    named = config.get(NAMED_WEIGHTS)
    names = [named] if isinstance(named, str) else [WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model's folder, by the rule of `weights_entry`; none where it has none.
    Raises `UserError` for a broken index, and one that names a file which is missing or outside the folder.
    """
    entry = weights_entry(folder)
    if entry is None:
        return []
    if not entry.name.endswith(_INDEX_SUFFIX):
        return [entry]
    files = sorted(set(_weight_map(entry).values()))
    root = folder.absolute()
    for file in files:
        if not Path(os.path.abspath(root / file)).is_relative_to(root):
            raise UserError(f"{entry}: names {file}, which is outside of the folder; expected files beside the index")
        if not (folder / file).is_file():
            raise UserError(f"{folder}: {file} is missing, which {entry.name} names")
    return [folder / file for file in files]


def _weight_map(index: Path) -> dict[str, str]:
    """Name of each tensor → its file. Raises `UserError` for an index without them."""
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f"{index}: broken: it has no weight_map of tensors' files")
    return named


def holds_weights(folder: Path) -> bool:
    """Whether the weights that transformers opens in a folder are safetensors."""
    entry = weights_entry(folder)
    return entry is not None and entry.name.endswith((".safetensors", f".safetensors{_INDEX_SUFFIX}"))


def folder_tensors(folder: Path, *, verify: bool = True) -> dict[str, StoredTensor]:
    """The tensors of a model's folder by name, from the files that transformers opens. Raises `UserError` for a folder
    without safetensors, a file that is missing, broken or not what was saved, and an index that names what is in no
    file. verify: whether the files are compared with the folder's manifest, which is left to a caller that does so.
    """
    if verify:
        check_manifest(folder)
    entry = weights_entry(folder)
    if entry is None or not holds_weights(folder):
        raise UserError(f"{folder}: no {WEIGHTS} here; expected weights as safetensors")
    found = stored_tensors(weight_files(folder))
    if entry.name.endswith(_INDEX_SUFFIX) and (nowhere := sorted(set(_weight_map(entry)) - set(found))):
        raise UserError(f"{entry}: names the tensor {nowhere[0]}, which is in no file")
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
