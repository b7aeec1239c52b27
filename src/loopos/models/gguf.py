"""GGUF files: their metadata, and their conversion to an ordinary model folder in the user's cache.

The package gguf takes ten seconds to read the metadata of a vocabulary of 50,000 tokens, because it makes an array of
every string, and transformers reads them twice: the metadata are read here, without the tensors. transformers also
dequantizes in pure Python, twenty seconds even for a small model, for config, tokenizer and weights each. The converted
folder (safetensors in fp32, the dequantized values exactly) opens in under a second. Its name is the file's SHA-256 and
the version of the conversion.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from loopos.config.diagnostics import MissingRequirement
from loopos.models.config_check import MOST_LAYERS
from loopos.models.quiet import quiet_libraries
from loopos.storage.whole_folder import whole_folder

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


_VERSION = 2
"""Of what a conversion writes; 2: the tokenizer is the file's own (`gguf_tokenizer.py`)."""


def cache_folder() -> Path:
    """`$LOOPOS_CACHE`, else `$XDG_CACHE_HOME/loopos`, else `~/.cache/loopos`."""
    named = os.environ.get("LOOPOS_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopos"


def converted_folder(file: Path) -> Path:
    """The model folder of a GGUF file, made on first use.

    Raises `MissingRequirement` when `gguf` is not installed, `UserError` when the file is broken or of an architecture
    that transformers cannot read.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{digest[:32]}-{_VERSION}"
    if (folder / "config.json").is_file():
        return folder
    # Where another process finishes the same conversion first, its folder holds the same bytes and may be open by now.
    with whole_folder(folder, replaces=folder.exists()) as partial:
        convert(file, partial)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file into an empty folder. Raises as `converted_folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loopos.models.broken_files import broken_as_user_error
    from loopos.models.gguf_tokenizer import gguf_tokenizer

    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as problem:
        raise MissingRequirement(f"{file.name}: reading GGUF needs the package gguf; run pip install gguf") from problem
    with broken_as_user_error(f"{file}: cannot be read as GGUF"), quiet_libraries(bars_of_its_own=True):
        summary = read_metadata(file)
        _check_layers(summary)
        named = _config(file, summary)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **named)
        tokenizer = gguf_tokenizer(summary) or AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = loaded.config
    # The dequantised model is an ordinary one; left in, these marks make transformers refuse to save it.
    for mark in ("quantization_config", "_name_or_path"):
        if hasattr(config, mark):
            delattr(config, mark)
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    assert plain.dtype == torch.float32
    with quiet_libraries():
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_layers(summary: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a number of layers that no model has: each takes time to build, before its tensors are
    looked for.
    """
    key = f"{summary['general.architecture']}.block_count"
    if not (type(summary[key]) is int and 1 <= summary[key] <= MOST_LAYERS):
        raise ValueError(f"{key}: expected a whole number from 1 to {MOST_LAYERS:,}, got {summary[key]}")


def _config(file: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The config to open a file with, where transformers' own reader would leave out the size of a head: it takes
    a Qwen3's for 128. Nothing for other architectures, whose config it reads whole.
    """
    if summary["general.architecture"] != "qwen3":
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.head_dim = int(summary["qwen3.attention.key_length"])
    return {"config": config}
