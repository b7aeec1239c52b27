"""Read and write safetensors files one tensor at a time, as single files or shards with an index.

The safetensors package's writer keeps host copies of all device and non-contiguous tensors at once and hides the
system's error number; this writer holds one tensor at a time and lets `OSError` through. Files are read in chunks
instead of mapped, because mapped pages count as memory of the process. Complex, sparse and distributed tensors are not
supported; tied tensors are written once per name. Format: https://github.com/huggingface/safetensors#format
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
_CHUNK_BYTES = 4 * 2**20
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
    """Total bytes of all elements, without headers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def in_file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names in file order: wide elements first, so that tensors are aligned to their element size; then by name."""
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def safetensors_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file with `tensors`, exact in dtype, shape and bits, and `metadata`.

    A chunk is valid until the next one is requested. Tensors may be on any device and be views of one another.
    """
    specs = {name: _spec(name, tensor) for name, tensor in tensors.items()}
    return stream_chunks(specs, tensors.__getitem__, metadata)


def stream_chunks(
    specs: Mapping[str, TensorSpec],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file whose tensors are produced on demand.

    `tensor_of` is called once per name, in file order, and returns a tensor of that spec; the previous tensor is then
    released.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    names = in_file_order(specs)
    yield _header(specs, names, metadata)
    for name in names:
        tensor = tensor_of(name)
        assert TensorSpec.of(tensor) == specs[name], f"{name}: got {TensorSpec.of(tensor)}; expected {specs[name]}"
        yield from _tensor_chunks(tensor)
        del tensor


def read_header(stream: BinaryIO, size: int) -> dict[str, tuple[TensorSpec, int]]:
    """Spec and start byte of each tensor; `size` is the file size in bytes.

    Raises `ValueError` if the file is not a complete safetensors file or has an unknown number format.
    """
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
        raise ValueError("its first bytes are not a header length")
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
                raise ValueError(f"{name} has the format {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
            spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            start, end = entry["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*spec.shape, start, end)):
                raise ValueError(f"{name} has an invalid shape or offset")
            if end - start != spec.num_bytes or not end <= size - 8 - length:
                raise ValueError(f"{name} does not fit its offsets in the file (truncated?)")
            found[name] = (spec, 8 + length + start)
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"its header is incomplete: {problem}") from problem
    _check_layout(found, 8 + length, size)
    return found


def _check_layout(found: Mapping[str, tuple[TensorSpec, int]], start: int, size: int) -> None:
    """Raise `ValueError` unless the tensors fill the bytes from `start` to `size` without overlap or gap.

    The format requires this; gaps could hide data.
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
    """The header of a file with these tensors in the order of `names`."""
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


def _tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    # No copy of a contiguous tensor in host memory; otherwise one copy, released before the next tensor.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data
    for start in range(0, len(content), _CHUNK_BYTES):
        yield content[start : start + _CHUNK_BYTES]


CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMED_WEIGHTS = "transformers_weights"
"""The config key that names another weights file or index of the folder."""
_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: its spec and start byte."""

    file: Path
    spec: TensorSpec
    start: int

    def read(self) -> Tensor:
        """Read the tensor into new memory. Raises `UserError` if the file is missing or truncated."""
        flat = torch.empty(self.spec.num_elements, dtype=self.spec.dtype)
        if flat.numel():
            buffer = flat.view(torch.uint8).numpy().data
            try:
                with self.file.open("rb", buffering=0) as file:
                    file.seek(self.start)
                    num_read = 0
                    while num_read < len(buffer) and (count := file.readinto(buffer[num_read:])):
                        num_read += count
            except OSError as problem:
                raise UserError(f"{self.file}: cannot be read: {problem.strerror}") from problem
            if num_read < len(buffer):
                raise UserError(f"{self.file}: truncated: {num_read:,} of {len(buffer):,} bytes of a tensor")
        return flat.view(self.spec.shape)


def check_readable(file: Path) -> None:
    """Raise `UserError` if a file cannot be opened; libraries report an unreadable file as missing."""
    try:
        file.open("rb").close()
    except PermissionError as problem:
        raise UserError(f"{file}: not readable by this user; ask its owner for: chmod a+r {file.name}") from problem
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {problem.strerror}") from problem


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by name; only headers are read.

    Raises `UserError` for a file that is not safetensors or is truncated, and for a tensor in two files.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                header = read_header(stream, file.stat().st_size)
        except OSError as problem:
            raise UserError(f"{file}: cannot be read: {problem.strerror}") from problem
        except ValueError as problem:
            raise UserError(f"{file}: not a complete safetensors file: {problem}") from problem
        for name, (spec, start) in header.items():
            if name in found:
                raise UserError(f"{file}: {name} is also in {found[name].file.name}; expected each tensor once")
            found[name] = StoredTensor(file, spec, start)
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a small file. Raises `UserError` as `stored_tensors`."""
    return {name: stored.read() for name, stored in stored_tensors([file]).items()}


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise `UserError` for NaN or infinity: a model with such weights is never saved or exported."""
    if not tensor.is_floating_point():
        return
    # torch has no isfinite for 8-bit floats.
    if bad := int((~torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)).sum()):
        raise UserError(
            f"{name}: {bad:,} of {tensor.numel():,} numbers are not finite (nan or infinite); expected a model whose "
            "weights are finite: use a checkpoint from before the divergence"
        )


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in memory to a new file and fsync it.

    Raises `UserError` for numbers that are not finite, `OSError` if the disk is full.
    """
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    write_new(file, safetensors_chunks(tensors))


def weights_entry(folder: Path) -> Path | None:
    """The weights file or index that transformers opens in a folder; None if there is none.

    In this order: the one that config.json names (transformers_weights), model.safetensors, its index,
    pytorch_model.bin, its index.
    """
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    named = config.get(NAMED_WEIGHTS)
    names = [named] if isinstance(named, str) else [WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def weight_files(folder: Path) -> list[Path]:
    """The weights files of a model folder, by the rule of `weights_entry`; empty if there are none.

    Raises `UserError` for a broken index, or one that names a file that is missing or outside the folder.
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
            raise UserError(f"{entry}: names {file}, which is outside the folder; expected files next to the index")
        if not (folder / file).is_file():
            raise UserError(f"{folder}: {file}, named by {entry.name}, is missing")
    return [folder / file for file in files]


def _weight_map(index: Path) -> dict[str, str]:
    """Name of each tensor → its file. Raises `UserError` for an index without them."""
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f"{index}: broken: it has no weight_map from tensors to files")
    return named


def holds_weights(folder: Path) -> bool:
    """Whether a folder's weights are safetensors files."""
    entry = weights_entry(folder)
    return entry is not None and entry.name.endswith((".safetensors", f".safetensors{_INDEX_SUFFIX}"))


def folder_tensors(folder: Path, *, verify: bool = True) -> dict[str, StoredTensor]:
    """The tensors of a model folder by name, from the files that transformers opens.

    `verify` compares the files with the manifest; pass False if the caller does that. Raises `UserError` for a folder
    without safetensors, a file that is missing, broken or changed, and an index entry that is in no file.
    """
    if verify:
        check_manifest(folder)
    entry = weights_entry(folder)
    if entry is None or not holds_weights(folder):
        raise UserError(f"{folder}: no {WEIGHTS} here; expected weights as safetensors")
    found = stored_tensors(weight_files(folder))
    if entry.name.endswith(_INDEX_SUFFIX) and (absent := sorted(set(_weight_map(entry)) - set(found))):
        raise UserError(f"{entry}: names the tensor {absent[0]}, which is in no file")
    return found


def usual_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The most common number format by elements."""
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
    """Write tensors to model.safetensors in `folder`, or to numbered shards with an index above `most_bytes`.

    Everything is fsynced; `tensor_of` is as in `stream_chunks`. Raises `OSError` if the disk is full.
    """
    shards = _shards(specs, most_bytes)
    names = _shard_names(len(shards))
    for file, shard in zip(names, shards, strict=True):
        write_new(folder / file, stream_chunks({name: specs[name] for name in shard}, tensor_of))
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        save_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _shards(specs: Mapping[str, TensorSpec], most_bytes: float) -> list[list[str]]:
    """The names in file order, split into files of at most `most_bytes`; a larger tensor has its own file."""
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
