"""Checks a model's config.json, which anyone may have written, before a library builds anything from it. Does not
import torch.

transformers checks keys of single architectures; `weight_files.py` compares sizes with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.storage.json_files import read_object

OWN_MODEL_TYPE = "loopos_pooled"
"""The model_type of a head over a backbone that LoopOS writes (`modeling_loopos.py`)."""
MOST_LAYERS = 1_000
"""Ten times those of the deepest models; each takes time to build, before its weights are looked for."""
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_COUNTS = (
    *_LAYERS, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings", "n_embd", "n_head", "n_positions", "d_model", "num_heads", "d_ff", "d_kv",
)  # fmt: skip
_NUMBER_FORMATS = frozenset(
    {
        "auto", "float64", "double", "float32", "float", "float16", "half", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int8", "uint8",
    }
)  # fmt: skip
_OBJECTS = ("rope_scaling", "rope_parameters", "quantization_config")
_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")


def check_config(file: Path) -> None:
    """Raises `UserError` for a config.json that is broken or has values that no model can have."""
    wrong = [f"{file}: {diagnostic}" for diagnostic in _diagnostics(read_object(file))]
    if wrong:
        raise UserError("\n".join(wrong[:3]))


def _diagnostics(config: Mapping[str, Any], above: str = "") -> Iterator[str]:
    own = config.get("model_type") == OWN_MODEL_TYPE
    if own:
        # Its own counts are those that make other programs refuse it.
        if not isinstance(config.get("backbone_config"), dict) or not isinstance(config.get("backbone_type"), str):
            yield f"{above}backbone_config, backbone_type: expected an object and the name of an architecture"
            return
        yield from _diagnostics(config["backbone_config"], f"{above}backbone_config.")
    for key in () if own else _COUNTS:
        value = config.get(key)
        # Some architectures list a size a layer.
        for each in value if isinstance(value, list) else [value]:
            if each is not None and not _is_count(each):
                yield f"{above}{key}: expected a whole number from 1, got {_shown(each)}"
                break
            if key in _LAYERS and each is not None and each > MOST_LAYERS:
                yield f"{above}{key}: expected at most {MOST_LAYERS:,} layers, got {_shown(each)}"
    for key in _OBJECTS:
        if config.get(key) is not None and not isinstance(config[key], dict):
            yield f"{above}{key}: expected an object, got {_shown(config[key])}"
    for key in ("dtype", "torch_dtype"):
        # Of models of several parts an object gives that of each.
        value = config.get(key)
        if (
            value is not None
            and not isinstance(value, dict)
            and str(value).removeprefix("torch.") not in _NUMBER_FORMATS
        ):
            yield f"{above}{key}: expected a number format such as bfloat16, got {_shown(value)}"
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        yield f"{above}architectures: expected a list of class names, got {_shown(names)}"
    for key in _PARTS:
        if isinstance(config.get(key), dict):
            yield from _diagnostics(config[key], f"{above}{key}.")


def _is_count(value: object) -> bool:
    # A size is written as 32.0 by some programs.
    return type(value) in (int, float) and value == value and value >= 1 and value % 1 == 0  # type: ignore[operator]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
