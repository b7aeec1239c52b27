"""Opens GGUF files: metadata, tokenizer, and a one-time conversion to a model folder in the user's cache.

transformers dequantizes a GGUF file in pure Python, which takes about 20 s even for a small model, three times (config,
tokenizer, weights). The converted folder (safetensors in fp32, exactly the dequantized values) opens in under a second.
Its name contains the file's SHA-256 and the version of the conversion.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
    """The key-value metadata of a GGUF file, version 2 or 3, little-endian. Much faster than the package gguf, which
    takes about 10 s for a vocabulary of 50,000 tokens. Raises `ValueError` for another file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        try:
            version, _, num_keys = _numbers(stream, "IQQ")
            if version not in (2, 3):
                raise ValueError(f"its version is {version}; expected 2 or 3")
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
        raise ValueError(f"it has a value of unknown type {kind}")
    inner, number = _numbers(stream, "IQ")
    if number > size:
        raise ValueError("it declares more values than it has bytes")
    if inner == _STRING:
        return [_string(stream, size) for _ in range(number)]
    if inner not in _NUMBERS:
        raise ValueError(f"it has a list of unknown type {inner}")
    return list(_numbers(stream, f"{number}{_NUMBERS[inner]}"))


def _string(stream: BinaryIO, size: int) -> str:
    (length,) = _numbers(stream, "Q")
    if length > size:
        raise ValueError("it declares a text longer than the file")
    content = stream.read(length)
    if len(content) < length:
        raise ValueError("it is cut short")
    return content.decode("utf-8")


def _numbers(stream: BinaryIO, kinds: str) -> tuple[Any, ...]:
    layout = struct.Struct(f"<{kinds}")
    return layout.unpack(stream.read(layout.size))


# GGUF's token types.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
SPLITS = {
    f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2",
    f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
}
"""The regular expression that splits text → llama.cpp's name of it."""
WHOLE_WORDS = frozenset({"llama-bpe"})
"""Pre-tokenizers for which llama.cpp looks up whole words in the vocabulary before it merges."""
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def unused_name(row: int) -> str:
    """The name of an embedding row beyond the vocabulary; GGUF requires one."""
    return f"[PAD{row}]"


def gguf_tokenizer(summary: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a GGUF file with a byte-level BPE vocabulary, from its metadata; None for another kind of
    vocabulary or an unknown pre-tokenizer.

    transformers' own reader chooses the pre-tokenizer by architecture instead of by the file, and adds a token
    <|endoftext|> without an embedding.
    """
    fields = {key.removeprefix("tokenizer."): value for key, value in summary.items() if key.startswith("tokenizer.")}
    steps = _pre_tokenizer(fields.get("ggml.pre"))
    if fields.get("ggml.model") != "gpt2" or steps is None:
        return None
    tokens = fields["ggml.tokens"]
    types = fields.get("ggml.token_type") or [NORMAL] * len(tokens)
    rows = [(row, token, kind) for row, (token, kind) in enumerate(zip(tokens, types, strict=True))]
    # llama.cpp also marks padding rows as unused.
    rows = [(row, token, kind) for row, token, kind in rows if (token, kind) != (unused_name(row), UNUSED)]
    described = {
        "version": "1.0",
        "added_tokens": [_added(row, token, kind) for row, token, kind in rows if kind in (CONTROL, USER_DEFINED)],
        "normalizer": {"type": "NFC"} if fields["ggml.pre"] == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "post_processor": _post_processor(fields, tokens),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "vocab": {token: row for row, token, _ in rows},
            "merges": [merge.split(" ") for merge in fields.get("ggml.merges", ())],
            "ignore_merges": fields["ggml.pre"] in WHOLE_WORDS,
        },
    }
    special = {name: fields.get(f"ggml.{key}_token_id") for key, name in _ROLES.items()}
    found: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        clean_up_tokenization_spaces=False,
        **{name: tokens[row] for name, row in special.items() if row is not None and row < len(tokens)},
    )
    found.chat_template = fields.get("chat_template")
    return found


def _pre_tokenizer(name: object) -> list[Mapping[str, Any]] | None:
    """The pre-tokenizer for llama.cpp's name of it."""
    if name == "gpt-2":
        return [_byte_level(use_regex=True)]
    if name == "smollm":
        return [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
    pattern = next((pattern for pattern, each in SPLITS.items() if each == name), None)
    if pattern is None:
        return None
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


def _byte_level(*, use_regex: bool) -> Mapping[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _added(row: int, token: str, kind: int) -> Mapping[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": row, "content": token, "special": kind == CONTROL, **plain}


def _post_processor(fields: Mapping[str, Any], tokens: list[str]) -> Mapping[str, Any] | None:
    """Adds begin and end tokens to a text."""
    added = [key for key in ("bos", "eos") if fields.get(f"ggml.add_{key}_token")]
    around = {key: int(fields[name]) for key in added if (name := f"ggml.{key}_token_id") in fields}
    if not around:
        return None

    def framed(*names: str) -> list[Mapping[str, Any]]:
        parts: list[Mapping[str, Any]] = []
        for index, name in enumerate(names):
            ends = {key: [{"SpecialToken": {"id": tokens[row], "type_id": index}}] for key, row in around.items()}
            parts += [*ends.get("bos", ()), {"Sequence": {"id": name, "type_id": index}}, *ends.get("eos", ())]
        return parts

    special = {tokens[row]: {"id": tokens[row], "ids": [row], "tokens": [tokens[row]]} for row in around.values()}
    return {"type": "TemplateProcessing", "single": framed("A"), "pair": framed("A", "B"), "special_tokens": special}


_VERSION = 2
"""Version of the conversion's output. 2: the tokenizer comes from the file (`gguf_tokenizer`)."""


def cache_folder() -> Path:
    """`$LOOPOS_CACHE`, else `$XDG_CACHE_HOME/loopos`, else `~/.cache/loopos`."""
    named = os.environ.get("LOOPOS_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopos"


def converted_folder(file: Path) -> Path:
    """The model folder of a GGUF file, converted on first use.

    Raises `MissingRequirement` if `gguf` is not installed, and `UserError` if the file is broken or transformers cannot
    read its architecture.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{digest[:32]}-{_VERSION}"
    if (folder / "config.json").is_file():
        return folder
    # If another process finishes first, its folder has the same bytes and may already be open.
    with whole_folder(folder, replaces=folder.exists()) as partial:
        convert(file, partial)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Converts a GGUF file into an empty folder. Raises as `converted_folder` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loopos.models.broken_files import broken_as_user_error

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
    # The dequantized model is an ordinary one; with these attributes transformers refuses to save it.
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
    """Raises `ValueError` for an impossible number of layers, before time is spent on building them."""
    key = f"{summary['general.architecture']}.block_count"
    if not (type(summary[key]) is int and 1 <= summary[key] <= MOST_LAYERS):
        raise ValueError(f"{key}: expected a whole number from 1 to {MOST_LAYERS:,}, got {summary[key]}")


def _config(file: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for opening the file if transformers' own reader loses the head size: it assumes 128 for Qwen3. Empty
    for other architectures.
    """
    if summary["general.architecture"] != "qwen3":
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.head_dim = int(summary["qwen3.attention.key_length"])
    return {"config": config}
