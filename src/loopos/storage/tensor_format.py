"""The safetensors format: what tensors are (number format, shape), and the bytes of a file that holds them.

Enters: specs and tensors by name, or the beginning of a file. Leaves: the bytes of a file, a piece at a time, or where
in a file each tensor lies. The safetensors package's own writer keeps host copies of all device and non-contiguous
tensors at once and hides the operating system's error number; this one holds one tensor at a time and lets `OSError`
through. Left out: files (`tensor_files.py`); complex, sparse and distributed tensors, and tied tensors (each name is
written by itself). Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

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
                raise ValueError(f"{name} is of the format {entry['dtype']}, wanted one of {', '.join(_DTYPES)}")
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
