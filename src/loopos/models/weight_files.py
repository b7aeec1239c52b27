"""Weights from files into models, checked: every tensor there, of its shape, and none left over.

Enters: a weights file or a folder that transformers opens. Leaves: a model with its weights in fp32. Left out: what
architecture it is (`load.py`).
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from loopos.config.faults import UserError
from loopos.models.sources import WeightsSource

_STACKED = re.compile(r"(.*?\.)(\d+)\.")
_PICKLE_REFUSED = "refused, since opening it would run code"


def from_folder(place: str, config: PreTrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """The headless model in a folder or at a hub id. Raises `UserError` for weights that cannot be read or that do
    not fill the model.
    """
    try:
        model, info = AutoModel.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except pickle.UnpicklingError as problem:
        raise UserError(f"data.pretrained_weights: {place}: {_PICKLE_REFUSED}; save it as .safetensors") from problem
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as problem:
        raise UserError(f"data.pretrained_weights: cannot load {place}: {_first_line(problem)}") from problem
    mismatched = [name if isinstance(name, str) else str(name[0]) for name in info["mismatched_keys"]]
    # Names of tensors without a place keep the prefix that they have in a model with its head.
    left_over = {name.removeprefix(model.base_model_prefix + ".") for name in info["unexpected_keys"]}
    _refuse(place, model, missing=info["missing_keys"], mismatched=mismatched, left_over=left_over)
    assert isinstance(model, PreTrainedModel)
    return model


def from_file(source: WeightsSource, config: PreTrainedConfig) -> PreTrainedModel:
    """The headless model of `config` with the tensors of one file, by name, with or without the base model's prefix.
    Language-model heads are left aside. Raises `UserError` as `from_folder` does.
    """
    tensors = read_tensors(source)
    model = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    prefix = model.base_model_prefix + "."
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    wanted = model.state_dict()
    mismatched = [
        f"{name} {list(bare[name].shape)} (wanted {list(tensor.shape)})"
        for name, tensor in wanted.items()
        if name in bare and bare[name].shape != tensor.shape
    ]
    _refuse(
        source.given, model, missing=set(wanted) - set(bare), mismatched=mismatched, left_over=set(bare) - set(wanted)
    )
    model.load_state_dict({name: bare[name] for name in wanted if name in bare}, strict=False)
    return model


def read_tensors(source: WeightsSource) -> dict[str, Tensor]:
    """The tensors of a .safetensors or zip-format torch file. A pickle that wants to run code is refused, with the
    reason.
    """
    assert source.path is not None
    try:
        if source.kind == "safetensors" or _holds_safetensors(source.path):
            return load_file(source.path)
        if not zipfile.is_zipfile(source.path):
            raise UserError(
                f"{source.path}: not a whole zip-format torch file (an old pickle, a file cut short, or no weights at "
                "all); save it again as .safetensors"
            )
        loaded = torch.load(source.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise UserError(f"{source.path}: {_PICKLE_REFUSED}; save it as .safetensors") from problem
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as problem:
        raise UserError(f"{source.path}: cannot be read as weights: {_first_line(problem)}") from problem
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{source.path}: wanted a dictionary of tensors by name, found {type(loaded).__name__}")
    return tensors


def _holds_safetensors(path: Path) -> bool:
    """Whether a file named .bin holds safetensors: the length of a header, and a header that begins as JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _refuse(
    given: str,
    model: torch.nn.Module,
    *,
    missing: Iterable[str],
    mismatched: Iterable[str],
    left_over: Collection[str],
) -> None:
    """Raises `UserError` unless the weights fill the model and the model has a place for each of their layers."""
    told: list[str] = []
    # A pooler that a checkpoint lacks is never read: pooling is ours.
    if absent := sorted(name for name in missing if not name.startswith("pooler.")):
        told.append(f"missing: {_some(absent)}")
    if wrong := sorted(mismatched):
        told.append(f"of another shape: {_some(wrong)}")
    if surplus := _surplus_layers(set(model.state_dict()), left_over):
        told.append(f"layers that the model has no place for: {_some(surplus)}")
    if told:
        raise UserError(
            f"data.pretrained_weights: {given} does not fill {type(model).__name__}: {'; '.join(told)}; wanted weights "
            "of these sizes: correct the sizes under model or in config.json, or name other weights"
        )


def _surplus_layers(wanted: Collection[str], left_over: Collection[str]) -> list[str]:
    """Layers of a stack that the model has, but fewer of. Heads and buffers that a headless model lacks are none."""
    layers = {match[0] for name in wanted if (match := _STACKED.match(name))}
    stacks = {match[1] for name in wanted if (match := _STACKED.match(name))}
    found = {match[0] for name in left_over if (match := _STACKED.match(name)) and match[1] in stacks}
    return sorted(layer.rstrip(".") for layer in found - layers)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]
