"""What a GGUF file says of itself, read without its tensors.

Enters: a GGUF file. Leaves: key → value. The package gguf reads the same in some ten seconds for a vocabulary of 50,000
tokens, since it makes arrays of every string; transformers does so twice. Left out: tensors.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

_MAGIC = b"GGUF"
_NUMBERS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


def read_metadata(file: Path) -> dict[str, Any]:
    """The keys of a GGUF file, version 2 or 3, little-endian. Raises `ValueError` for a file that is none."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        try:
            version, _, num_keys = _numbers(stream, "IQQ")
            if version not in (2, 3):
                raise ValueError(f"it is of version {version}; expected 2 or 3")
            found: dict[str, Any] = {}
            for _ in range(num_keys):
                key = _string(stream, size)
                (kind,) = _numbers(stream, "I")
                found[key] = _value(stream, kind, size)
        except struct.error as problem:
            raise ValueError("it is cut short") from problem
    return found


def _value(stream: BinaryIO, kind: int, size: int) -> Any:
    if kind == _STRING:
        return _string(stream, size)
    if kind in _NUMBERS:
        return _numbers(stream, _NUMBERS[kind])[0]
    if kind != _ARRAY:
        raise ValueError(f"it holds a value of the unknown kind {kind}")
    inner, number = _numbers(stream, "IQ")
    if number > size:
        raise ValueError("it announces more values than it has bytes")
    if inner == _STRING:
        return [_string(stream, size) for _ in range(number)]
    if inner not in _NUMBERS:
        raise ValueError(f"it holds a list of the kind {inner}")
    return list(_numbers(stream, f"{number}{_NUMBERS[inner]}"))


def _string(stream: BinaryIO, size: int) -> str:
    (length,) = _numbers(stream, "Q")
    if length > size:
        raise ValueError("it announces a text longer than itself")
    content = stream.read(length)
    if len(content) < length:
        raise ValueError("it is cut short")
    return content.decode("utf-8")


def _numbers(stream: BinaryIO, kinds: str) -> tuple[Any, ...]:
    layout = struct.Struct(f"<{kinds}")
    return layout.unpack(stream.read(layout.size))
