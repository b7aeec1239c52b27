"""The safetensors format: what tensors are (number format, shape), and the bytes of a file that holds them.

Enters: specs and tensors by name, or the beginning of a file. Leaves: the bytes of a file, a piece at a time, or where
in a file each tensor lies. The safetensors package's own writer keeps host copies of all device and non-contiguous
tensors at once and hides the operating system's error number; this one holds one tensor at a time and lets `OSError`
through. Left out: files (`tensor_files.py`); complex, sparse and distributed tensors, and tied tensors (each name is
written by itself). Format: https://github.com/huggingface/safetensors#format

Tensors of safetensors files, one at a time: read without mapping a file into memory, written as shards.

Enters: files, or a folder of a model; or the specs of what will come, then the tensors. Leaves: tensors, or files with
an index that is right. A mapped file counts as memory of the process as soon as it is read, so files are read piece by
piece instead. Left out: what the tensors mean; the bytes themselves (`tensor_format.py`).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.storage.durable import write_new
from loopos.storage.json_files import read_object, save_json
from loopos.storage.manifest import check_manifest

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_METADATA = "__metadata__"
_PIECE_BYTES = 4 * 2**20
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Number format and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all elements together, headers left out."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def in_file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names as their tensors are written: wide elements first, so that each begins at a multiple of its element's
    size; then by name.
    """
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def safetensors_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file that holds `tensors`, exact in dtype, shape and bits, and says `metadata`.

    A piece is valid until the next one is asked for. Tensors may lie on any device and be views of one another.
    """
    specs = {name: _spec(name, tensor) for name, tensor in tensors.items()}
    return streamed_pieces(specs, tensors.__getitem__, metadata)


def streamed_pieces(
    specs: Mapping[str, TensorSpec],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of tensors that are yet to come. tensor_of: is asked for each name once, in file
    order, and gives a tensor of its spec; the one before is then let go.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    names = in_file_order(specs)
    yield _header(specs, names, metadata)
    for name in names:
        tensor = tensor_of(name)
        assert TensorSpec.of(tensor) == specs[name], f"{name}: {TensorSpec.of(tensor)} came, announced {specs[name]}"
        yield from _tensor_pieces(tensor)
        del tensor


def read_header(stream: BinaryIO, size: int) -> dict[str, tuple[TensorSpec, int]]:
    """Spec of each tensor, and the byte of the file at which it begins. size: bytes of the file. Raises `ValueError`
    for a file that is no whole safetensors file, or has number formats that are not known here.
    """
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
        raise ValueError("its first bytes tell no length of a header")
    try:
        entries = json.loads(stream.read(length))
    except RecursionError as problem:
        raise ValueError("its header is nested too deeply") from problem
    found: dict[str, tuple[TensorSpec, int]] = {}
    try:
        for name, entry in entries.items():
            if name == _METADATA:
                continue
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is of the format {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
            spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            start, end = entry["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*spec.shape, start, end)):
                raise ValueError(f"{name} has a shape or a place that is none")
            if end - start != spec.num_bytes or not end <= size - 8 - length:
                raise ValueError(f"{name} has no place of its size in the file (cut short?)")
            found[name] = (spec, 8 + length + start)
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"its header does not say what it must: {problem}") from problem
    _check_layout(found, 8 + length, size)
    return found


def _check_layout(found: Mapping[str, tuple[TensorSpec, int]], start: int, size: int) -> None:
    """Raises `ValueError` unless the tensors fill the bytes from `start` to `size`, one after another, as the format
    demands: those of two tensors could overlap otherwise, and bytes be hidden between them.
    """
    end, before = start, ""
    for name, (spec, begin) in sorted(found.items(), key=lambda item: (item[1][1], item[1][0].num_bytes)):
        if begin < end:
            raise ValueError(f"{name} overlaps {before}")
        if begin > end:
            raise ValueError(f"{begin - end:,} bytes before {name} belong to no tensor")
        end, before = begin + spec.num_bytes, name
    if end != size:
        raise ValueError(f"{size - end:,} bytes after the last tensor belong to none")


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    assert tensor.layout == torch.strided, f"{name}: a {tensor.layout} tensor cannot be saved"
    return TensorSpec.of(tensor)


def _header(specs: Mapping[str, TensorSpec], names: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with that holds such tensors in the order of `names`."""
    entries: dict[str, object] = {_METADATA: {"format": "pt", **metadata}}
    offset = 0
    for name in names:
        spec = specs[name]
        assert name != _METADATA, f"a tensor cannot be called {_METADATA}"
        assert spec.dtype in DTYPE_NAMES, f"{name}: {spec.dtype} cannot be saved"
        end = offset + spec.num_bytes
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor_pieces(tensor: Tensor) -> Iterator[memoryview]:
    # No copy for a contiguous tensor in host memory; otherwise one copy, gone when the next tensor's turn comes.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


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
                raise UserError(f"{file}: {name} is in {found[name].file.name} too; expected each tensor once")
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
