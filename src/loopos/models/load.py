"""Pretrained models in, from every kind of source, and out again.

Enters: a `WeightsSource`, and the sizes of `model` where the source has no config. Leaves: a headless model in fp32
and its tokenizer. Left out: heads, adapters.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loopos.config.faults import UserError
from loopos.models.gguf import converted_folder
from loopos.models.sources import WeightsSource, weights_source

# The config's names of sizes → transformers'.
_SIZES = {
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class Sizes:
    """The sizes under `model`; None where the config is silent. `max_length` is the longest sequence a new model
    has positions for.
    """

    d_model: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    num_layers: int | None = None
    d_ff: int | None = None
    vocab_size: int | None = None
    max_length: int = 2048

    def given(self) -> dict[str, int]:
        """transformers' name → size, of those that were given."""
        return {theirs: getattr(self, ours) for ours, theirs in _SIZES.items() if getattr(self, ours) is not None}


@dataclass(frozen=True)
class Pretrained:
    """A headless model in fp32 on CPU, its tokenizer, and `said`: what was loaded, in words."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    said: str


def load_pretrained(
    given: str, *, sizes: Sizes = Sizes(), tokenizer: str | None = None, trust_remote_code: bool = False
) -> Pretrained:
    """Loads what `data.pretrained_weights` names.

    Raises `UserError` for a missing or broken source, a file that wants to run code, tensors that are missing or of
    other shapes than the config says, sizes that
    disagree with the weights, and encoder-decoder models.
    """
    source = weights_source(given)
    folder = converted_folder(source.path) if source.kind == "gguf" and source.path else source.path
    config = _config(source, folder, sizes, trust_remote_code)
    _check_config(config, sizes, given)
    opened = _tokenizer(source, folder, tokenizer, trust_remote_code)
    if len(opened) > config.get_text_config().vocab_size:
        raise UserError(
            f"the tokenizer has {len(opened)} tokens but the model of {given} only {config.get_text_config().vocab_size} embeddings: "
            "name the tokenizer that belongs to the weights in data.tokenizer"
        )
    if source.kind == "new":
        model = AutoModel.from_config(config, dtype=torch.float32)
    elif source.kind in ("safetensors", "torch"):
        assert source.path is not None
        model = AutoModel.from_config(config, dtype=torch.float32)
        _fill(model, read_tensors(source), given)
    else:
        model = _from_pretrained(str(folder or given), config, trust_remote_code)
    parameters = sum(p.numel() for p in model.parameters())
    return Pretrained(model, opened, f"{given}: {type(model).__name__}, {parameters:,} parameters")


def load_config(given: str, *, sizes: Sizes = Sizes(), trust_remote_code: bool = False) -> PreTrainedConfig:
    """The architecture alone, without weights: what a dry run needs."""
    source = weights_source(given)
    folder = converted_folder(source.path) if source.kind == "gguf" and source.path else source.path
    config = _config(source, folder, sizes, trust_remote_code)
    _check_config(config, sizes, given)
    return config


def _config(source: WeightsSource, folder: Path | None, sizes: Sizes, trust_remote_code: bool) -> PreTrainedConfig:
    if source.kind == "new":
        return _new_config(sizes)
    if source.kind in ("safetensors", "torch"):
        assert source.path is not None
        beside = source.path.parent / "config.json"
        if not beside.is_file():
            return _new_config(sizes)
        folder = source.path.parent
    try:
        return AutoConfig.from_pretrained(str(folder or source.given), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as problem:
        raise UserError(_why(source, problem)) from problem


def _new_config(sizes: Sizes) -> LlamaConfig:
    """A Llama-style decoder of the guide's sizes, with tied embeddings."""
    missing = [ours for ours in _SIZES if ours != "num_key_value_heads" and getattr(sizes, ours) is None]
    if missing:
        raise UserError(
            f"model: {', '.join(missing)} missing; a new model, or a weights file without config.json beside it, needs all of them"
        )
    assert sizes.d_model is not None and sizes.num_heads is not None
    return LlamaConfig(
        **{"num_key_value_heads": sizes.num_heads, **sizes.given()},
        head_dim=sizes.d_model // sizes.num_heads,
        max_position_embeddings=sizes.max_length,
        tie_word_embeddings=True,
    )


def _check_config(config: PreTrainedConfig, sizes: Sizes, given: str) -> None:
    if config.is_encoder_decoder:
        raise UserError(
            f"{given} is an encoder-decoder model ({config.model_type}); wanted a causal language model or an encoder"
        )
    text = config.get_text_config()
    ours = {theirs: name for name, theirs in _SIZES.items()}
    wrong = [
        f"model.{ours[theirs]}: given {size}, but the weights have {getattr(text, theirs)}"
        for theirs, size in sizes.given().items()
        if getattr(text, theirs, size) != size
    ]
    if wrong:
        raise UserError(
            "\n".join([*wrong, f"remove these keys (the weights of {given} say them) or name other weights"])
        )


def _tokenizer(
    source: WeightsSource, folder: Path | None, named: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    place = named
    if named is not None:
        tokenizer_source = weights_source(named)
        place = (
            str(converted_folder(tokenizer_source.path))
            if tokenizer_source.kind == "gguf" and tokenizer_source.path
            else str(tokenizer_source.path or named)
        )
    elif source.kind in ("safetensors", "torch"):
        assert source.path is not None
        place = str(source.path.parent)
    elif source.kind != "new":
        place = str(folder or source.given)
    if place is None:
        raise UserError(
            f'data.tokenizer is missing: a new model needs one; name a folder with tokenizer.json or "{"smollm2-135m"}"'
        )
    try:
        opened = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(
            f"no tokenizer in {place}: {str(problem).splitlines()[0]}; put tokenizer.json there or name one in data.tokenizer"
        ) from problem
    assert isinstance(opened, PreTrainedTokenizerBase)
    return opened


def _from_pretrained(place: str, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    try:
        model, info = AutoModel.from_pretrained(
            place, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as problem:
        raise UserError(f"data.pretrained_weights: cannot load {place}: {str(problem).splitlines()[0]}") from problem
    # A pooler that a checkpoint lacks is never read: pooling is ours.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        names = missing or sorted(str(entry) for entry in info["mismatched_keys"])
        raise UserError(
            f"data.pretrained_weights: {place} does not fill {type(model).__name__}: {_some(names)} missing or of another shape"
        )
    assert isinstance(model, PreTrainedModel)
    return model


def read_tensors(source: WeightsSource) -> dict[str, Tensor]:
    """The tensors of a .safetensors or zip-format torch file. A pickle that wants to run code is refused, with the
    reason.
    """
    assert source.path is not None
    try:
        if source.kind == "safetensors":
            from safetensors.torch import load_file

            return load_file(source.path)
        if not zipfile.is_zipfile(source.path):
            raise UserError(
                f"{source.path}: not a zip-format torch file (an old pickle, or not weights at all); save it again as .safetensors"
            )
        loaded = torch.load(source.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise UserError(
            f"{source.path}: refused, since opening it would run code: {str(problem).splitlines()[0]}; save it as .safetensors"
        ) from problem
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as problem:
        raise UserError(f"{source.path}: cannot be read as weights: {str(problem).splitlines()[0]}") from problem
    except Exception as problem:
        if type(problem).__name__ != "SafetensorError":
            raise
        raise UserError(f"{source.path}: broken safetensors file: {problem}") from problem
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{source.path}: wanted a dictionary of tensors by name, found {type(loaded).__name__}")
    return tensors


def _fill(model: PreTrainedModel, tensors: dict[str, Tensor], given: str) -> None:
    """Copies tensors in by name, with or without the base model's prefix; language-model heads are left aside."""
    prefix = model.base_model_prefix + "."
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(bare))
    wrong = sorted(
        f"{name} {tuple(bare[name].shape)} (wanted {tuple(wanted[name].shape)})"
        for name in set(wanted) & set(bare)
        if bare[name].shape != wanted[name].shape
    )
    if missing or wrong:
        raise UserError(
            f"data.pretrained_weights: {given} does not fill {type(model).__name__}: {_some(missing or wrong)} missing or of another shape"
        )
    model.load_state_dict({name: bare[name].float() for name in wanted})


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _why(source: WeightsSource, problem: Exception) -> str:
    first = str(problem).splitlines()[0]
    if source.kind == "hub":
        return (
            f"data.pretrained_weights: {source.given} is neither a file or folder here nor reachable on a hub: {first}\n"
            'use the embedded model ("smollm2-135m"), a local folder, or set HF_TOKEN for a private model'
        )
    return f"data.pretrained_weights: cannot read the config of {source.given}: {first}"


def save_json(path: Path, content: object) -> None:
    """Writes JSON with sorted keys, readable, with a last line end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
