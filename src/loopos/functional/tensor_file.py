"""Tensors enter by name and leave as the bytes of one safetensors file, a piece at a time.

The safetensors package's own writer keeps host copies of all device and non-contiguous tensors at once and hides the
operating system's error number; this one holds one tensor at a time and lets `OSError` through. Reading stays with
the package. Left out: complex, sparse and distributed tensors, and tied tensors (each name is written by itself).
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping

import torch

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

_PIECE_BYTES = 4 * 2**20


def num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of all elements together, headers left out."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def safetensors_pieces(
    tensors: Mapping[str, torch.Tensor], described: Mapping[str, torch.Tensor] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file that holds `tensors`, exact in dtype, shape and bits.

    A piece is valid until the next one is asked for. Tensors may lie on any device and be views of one another.
    described: tensors of the same dtypes and shapes, which may lie on the device meta. With them the header is written
    without a look at `tensors`, so that a mapping which reads a tensor when it is asked for one reads each once.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    described = tensors if described is None else described
    # Wide elements first, so that every tensor starts at a multiple of its element's size.
    names = sorted(described, key=lambda name: (-described[name].element_size(), name))
    yield header({name: described[name] for name in names})
    for name in names:
        yield from _tensor_pieces(tensors[name])


def header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """What a file begins with that holds tensors like these, in their order; they may lie on the device meta."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        assert name != "__metadata__", "a tensor cannot be called __metadata__"
        assert tensor.layout == torch.strided, f"{name}: a {tensor.layout} tensor cannot be saved"
        assert tensor.dtype in DTYPE_NAMES, f"{name}: {tensor.dtype} cannot be saved"
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    # No copy for a contiguous tensor in host memory; otherwise one copy, gone when the next tensor's turn comes.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]
