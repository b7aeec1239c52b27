"""GGUF files, converted once to an ordinary model folder in the user's cache.

transformers dequantises a GGUF by a pure-Python reader that takes some twenty seconds even for a small model, three
times over (config, tokenizer, weights). The folder (safetensors in fp32: the dequantised values exactly) then opens in
under a second. It is named by the file's SHA-256 and the version of the conversion, so that a changed file is
converted anew, and every file where the conversion itself has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopos.config.faults import EnvironmentFault
from loopos.models.config_check import MOST_LAYERS
from loopos.models.quiet import quiet_libraries
from loopos.storage.whole_folder import whole_folder

_VERSION = 2
"""Of what a conversion writes; 2: the tokenizer is the file's own (`gguf_tokenizer.py`)."""


def cache_folder() -> Path:
    """`$LOOPOS_CACHE`, else `$XDG_CACHE_HOME/loopos`, else `~/.cache/loopos`."""
    named = os.environ.get("LOOPOS_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopos"


def converted_folder(file: Path) -> Path:
    """The model folder of a GGUF file, made on first use.

    Raises `EnvironmentFault` when `gguf` is not installed, `UserError` when the file is broken or of an architecture
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
    from loopos.models.gguf_metadata import read_metadata
    from loopos.models.gguf_tokenizer import gguf_tokenizer

    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as problem:
        raise EnvironmentFault(f"{file.name}: reading GGUF needs the package gguf; run pip install gguf") from problem
    with broken_as_user_error(f"{file}: cannot be read as GGUF"), quiet_libraries(bars_of_its_own=True):
        said = read_metadata(file)
        _check_layers(said)
        named = _config(file, said)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **named)
        tokenizer = gguf_tokenizer(said) or AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
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


def _check_layers(said: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a number of layers that no model has: each takes time to build, before its tensors are
    looked for.
    """
    key = f"{said['general.architecture']}.block_count"
    if not (type(said[key]) is int and 1 <= said[key] <= MOST_LAYERS):
        raise ValueError(f"{key}: expected a whole number from 1 to {MOST_LAYERS:,}, got {said[key]}")


def _config(file: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The config to open a file with, where transformers' own reader would leave out the size of a head: it takes
    a Qwen3's for 128. Nothing for other architectures, whose config it reads whole.
    """
    if said["general.architecture"] != "qwen3":
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.head_dim = int(said["qwen3.attention.key_length"])
    return {"config": config}
