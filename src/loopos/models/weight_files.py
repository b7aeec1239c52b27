"""Loads weights from files into models and checks them: every tensor present, of its shape, and none left over."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loopos.config.diagnostics import SettingError, UserError
from loopos.config.paths import NEW_WEIGHTS
from loopos.models.broken_files import BROKEN, reason_of
from loopos.models.quiet import quiet_libraries
from loopos.models.resolve import ModelRef
from loopos.storage.tensor_files import (
    NAMED_WEIGHTS,
    check_readable,
    folder_tensors,
    holds_weights,
    stored_tensors,
    weight_files,
)

_UNSUPPORTED = {"reformer": "it trains on rows of one fixed length only"}
_STACKED = re.compile(r"(.*?\.)(\d+)\.")
_KEY = "data.pretrained_weights"
# A model may have slightly more parameters than its file, because of names, index and tied copies.
_MOST_NUMBERS_A_BYTE, _SLACK = 2, 10_000_000
# Number of tensors assumed for a pickle that is not an archive; `read_tensors` refuses it.
_OLD_PICKLE = 1_000_000
_PICKLE_REFUSED = "refused, since opening it would run code"


def model_class(config: PreTrainedConfig, *, causal: bool) -> Any:
    """The class that opens a headless model, or a causal language model with its output embedding. Raises `UserError`
    for an architecture without such a class.
    """
    if reason := _UNSUPPORTED.get(config.model_type):
        raise UserError(f"data.pretrained_weights: {config.model_type} is not supported: {reason}")
    if causal and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in _remote(config):
        raise SettingError(
            _KEY,
            f"{config.model_type} is not a causal language model; expected one that predicts the next token, such as a "
            "Llama, Qwen, Gemma or GPT-2",
        )
    return AutoModelForCausalLM if causal else AutoModel


def _remote(config: PreTrainedConfig) -> Collection[str]:
    return getattr(config, "auto_map", None) or ()


def new_model(config: PreTrainedConfig, *, causal: bool) -> PreTrainedModel:
    """A model with new weights, fp32, drawn from torch's generator."""
    opener = model_class(config, causal=causal)
    source_name = config.name_or_path or NEW_WEIGHTS
    try:
        model = opener.from_config(config, dtype=torch.float32)
    except BROKEN as problem:
        diagnostic = f"{source_name}: no {config.model_type} can be built of its config: {reason_of(problem)}"
        raise SettingError(_KEY, diagnostic) from problem
    assert isinstance(model, PreTrainedModel)
    return model


def check_sizes(
    source_name: str, config: PreTrainedConfig, *, causal: bool = False, num_tensors: int, num_bytes: int
) -> None:
    """Raises `UserError` if a config describes far more layers or parameters than the weight files contain; building
    such a model would take time and memory before a missing tensor is found. num_bytes: of the files; a parameter takes
    at least half a byte. Packed weights of other programs are not checked.
    """
    diagnostic = f"{source_name}: its config.json describes"
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > num_tensors:
        raise SettingError(_KEY, f"{diagnostic} {layers:,} layers, but its weights are {num_tensors:,} tensors")
    if getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in new_model(config, causal=causal).parameters())
    if numbers > _MOST_NUMBERS_A_BYTE * num_bytes + _SLACK:
        raise SettingError(_KEY, f"{diagnostic} {numbers:,} numbers, but its weights are {num_bytes:,} bytes")


def _num_tensors(file: Path) -> int:
    """Upper bound on the tensors of a torch file: each has an entry in its archive."""
    if not zipfile.is_zipfile(file):
        return _OLD_PICKLE
    with zipfile.ZipFile(file) as archive:
        return len(archive.namelist())


def _check_folder(folder: Path, config: PreTrainedConfig, *, causal: bool) -> None:
    """Raises `UserError` for weights in a folder that cannot be read, are broken, or do not fit the config."""
    files = weight_files(folder)
    for file in files:
        check_readable(file)
    if files:
        safe = holds_weights(folder)
        num_tensors = len(folder_tensors(folder, verify=False)) if safe else sum(_num_tensors(file) for file in files)
        num_bytes = sum(file.stat().st_size for file in files)
        check_sizes(str(folder), config, causal=causal, num_tensors=num_tensors, num_bytes=num_bytes)


def from_folder(
    source: str, config: PreTrainedConfig, *, causal: bool = False, trust_remote_code: bool
) -> PreTrainedModel:
    """The headless model, or the causal language model, in a folder or at a hub id. Raises `UserError` for weights that
    cannot be read or do not fill the model.
    """
    opener = model_class(config, causal=causal)
    if Path(source).is_dir():
        _check_folder(Path(source), config, causal=causal)
    try:
        with quiet_libraries():
            model, info = opener.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except pickle.UnpicklingError as problem:
        raise SettingError(_KEY, f"{source}: {_PICKLE_REFUSED}; save it as .safetensors") from problem
    except BROKEN as problem:
        raise SettingError(_KEY, f"cannot load {source}: {reason_of(problem)}") from problem
    mismatched = [name if isinstance(name, str) else str(name[0]) for name in info["mismatched_keys"]]
    # Names of unexpected tensors keep the prefix of a model with a head.
    left_over = {name.removeprefix(model.base_model_prefix + ".") for name in info["unexpected_keys"]}
    _refuse(source, model, missing=info["missing_keys"], mismatched=mismatched, left_over=left_over)
    assert isinstance(model, PreTrainedModel)
    if hasattr(model.config, NAMED_WEIGHTS):
        # It names a file of this folder; saved copies use the usual name.
        delattr(model.config, NAMED_WEIGHTS)
    return model


def from_file(source: ModelRef, config: PreTrainedConfig, *, causal: bool = False) -> PreTrainedModel:
    """The headless model, or the causal language model, of `config` with the tensors of one file, by name, with or
    without the base model's prefix. A headless model ignores language-model heads. Raises `UserError` as `from_folder`
    does.
    """
    assert source.path is not None
    tensors, num_bytes = read_tensors(source), source.path.stat().st_size
    check_sizes(source.name, config, causal=causal, num_tensors=len(tensors), num_bytes=num_bytes)
    model = new_model(config, causal=causal)
    fill(source.name, model, tensors)
    model.tie_weights()
    return model


def fill(source_name: str, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into a model by name, with or without the base model's prefix. Raises `UserError` unless they fill
    it; tied weights may be missing.
    """
    prefix = model.base_model_prefix + "."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    expected = {name.removeprefix(prefix): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    mismatched = [
        f"{name} {list(found[name].shape)} (expected {list(tensor.shape)})"
        for name, (_, tensor) in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    # Tied weights are often saved once.
    twins = {name.removeprefix(prefix) for name in getattr(model, "all_tied_weights_keys", None) or ()}
    there = {id(tensor) for name, (_, tensor) in expected.items() if name in found}
    twins |= {name for name, (_, tensor) in expected.items() if id(tensor) in there}
    missing, left_over = set(expected) - set(found) - twins, set(found) - set(expected)
    _refuse(source_name, model, missing=missing, mismatched=mismatched, left_over=left_over)
    full_names = {full: found[name] for name, (full, _) in expected.items() if name in found}
    model.load_state_dict(full_names, strict=False)


def read_tensors(source: ModelRef) -> dict[str, Tensor]:
    """The tensors of a .safetensors or zip-format torch file. Raises `UserError` for a pickle that would run code."""
    assert source.path is not None
    check_readable(source.path)
    try:
        if source.storage == "safetensors" or _holds_safetensors(source.path):
            stored_tensors([source.path])
            return load_file(source.path)
        if not zipfile.is_zipfile(source.path):
            raise UserError(
                f"{source.path}: not a whole zip-format torch file (an old pickle, a file cut short, or no weights at "
                "all); save it again as .safetensors"
            )
        loaded = torch.load(source.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise UserError(f"{source.path}: {_PICKLE_REFUSED}; save it as .safetensors") from problem
    except BROKEN as problem:
        raise UserError(f"{source.path}: cannot be read as weights: {reason_of(problem)}") from problem
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{source.path}: expected a dictionary of tensors by name, found {type(loaded).__name__}")
    return tensors


def _holds_safetensors(path: Path) -> bool:
    """Whether a file named .bin contains safetensors: the length of a header, and a header that starts as JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _refuse(
    source_name: str,
    model: PreTrainedModel,
    *,
    missing: Iterable[str],
    mismatched: Iterable[str],
    left_over: Collection[str],
) -> None:
    """Raises `UserError` unless the weights fill the model and the model has all of their layers. Names come without
    the base model's prefix.
    """
    problems: list[str] = []
    # A missing pooler is not used: LoopOS pools itself.
    if absent := sorted(name for name in missing if not name.startswith("pooler.")):
        problems.append(f"missing: {_some(absent)}")
    if wrong := sorted(mismatched):
        problems.append(f"of another shape: {_some(wrong)}")
    prefix = f"{model.base_model_prefix}."
    expected = {name.removeprefix(prefix) for name in model.state_dict()}
    if surplus := _surplus_layers(expected, left_over):
        problems.append(f"layers that the model does not have: {_some(surplus)}")
    if problems:
        raise SettingError(
            _KEY,
            f"{source_name} does not fill {type(model).__name__}: {'; '.join(problems)}; expected weights of these "
            "sizes: correct the sizes under model or in config.json, or choose other weights",
        )


def _surplus_layers(expected: Collection[str], left_over: Collection[str]) -> list[str]:
    """Layers beyond the end of the model's stacks. Heads and buffers that a headless model lacks do not count."""
    layers = {match[0] for name in expected if (match := _STACKED.match(name))}
    stacks = {match[1] for name in expected if (match := _STACKED.match(name))}
    found = {match[0] for name in left_over if (match := _STACKED.match(name)) and match[1] in stacks}
    return sorted(layer.rstrip(".") for layer in found - layers)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
