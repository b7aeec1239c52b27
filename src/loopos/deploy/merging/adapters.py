"""LoRA adapters in a merge: one over its base as a model, or several summed into one adapter.

Enters: PEFT adapter folders. Leaves: a `Source` whose tensors hold the adapter's change, or the tensors and config of
an adapter whose change is exactly the weighted sum of the others'. Left out: adapters of other kinds than LoRA on
linear layers, which are refused with the reason.
Letters: r rank, A `[r, in]`, B `[out, r]`, s = alpha/r (with rslora alpha/√r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopos.config.faults import UserError
from loopos.deploy.merging.sources import LowRank, Source, open_source
from loopos.models.found_model import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loopos.storage.json_files import read_object
from loopos.storage.tensor_files import StoredTensor, stored_tensors

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """`layers`: module name → (A, B, s); `base`: the model that it says it was trained on."""

    place: str
    folder: Path
    config: Mapping[str, Any]
    layers: Mapping[str, tuple[StoredTensor, StoredTensor, float]]

    @property
    def base(self) -> str | None:
        named = self.config.get("base_model_name_or_path")
        return str(named) if named else None


def is_adapter(place: str) -> bool:
    """Whether a place is a folder of a PEFT adapter."""
    return (Path(place) / ADAPTER_CONFIG).is_file()


def open_adapter(place: str) -> Adapter:
    """The adapter in a folder. Raises `UserError` for one that is broken, or whose change is not scale·B·A alone."""
    folder = Path(place)
    config = read_object(folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{place}: no {ADAPTER_WEIGHTS}; wanted an adapter saved as safetensors")
    refused = {
        f"peft_type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "use_dora": config.get("use_dora"),
        f"bias {config.get('bias')}": config.get("bias", "none") != "none",
        "modules_to_save": config.get("modules_to_save"),
        "trainable_token_indices": config.get("trainable_token_indices"),
    }
    found = [reason for reason, is_so in refused.items() if is_so]
    parts: dict[str, dict[str, StoredTensor]] = {}
    for key, stored in stored_tensors([folder / ADAPTER_WEIGHTS]).items():
        match = _KEY.fullmatch(key)
        if match is None or len(stored.spec.shape) != 2:
            found.append(f"the tensor {key}")
        else:
            parts.setdefault(match[1], {})[match[2]] = stored
    found += [f"{name} with one of its two matrices" for name, pair in parts.items() if len(pair) < 2]
    if found:
        raise UserError(
            f"{place}: an adapter with {', '.join(found[:3])}; wanted LoRA on linear layers alone (train it with "
            "LoopOS or peft and merge the model that it is folded into instead)"
        )
    return Adapter(place, folder, config, {name: _layer(name, pair, config) for name, pair in parts.items()})


def _layer(
    name: str, pair: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[StoredTensor, StoredTensor, float]:
    rank = pair["A"].spec.shape[0]
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), config["lora_alpha"]
    )
    return pair["A"], pair["B"], float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapted_source(place: str, base: str | None) -> Source:
    """An adapter over `base`, or without one over the model that it names, as a model. Raises `UserError`."""
    adapter = open_adapter(place)
    named = base or adapter.base
    if named is None:
        raise UserError(f"{place}: an adapter that names no base model; name one in base")
    under = open_source(named)
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    changes, wrong = {}, []
    for module, (down, up, scale) in adapter.layers.items():
        name = _name_in(under, f"{module}.weight")
        shape = (up.spec.shape[0], down.spec.shape[1])
        wanted = shape[::-1] if transposed else shape
        if name is None:
            wrong.append(f"{module} is no layer of it")
        elif under.stored[name].spec.shape != wanted:
            wrong.append(f"{name} is {list(under.stored[name].spec.shape)}, the adapter's change {list(wanted)}")
        else:
            changes[name] = LowRank(down, up, scale, transposed)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{place}: an adapter of another model than {named}: {'; '.join(wrong[:3])}{more}")
    return replace(under, place=place, changes=changes)


def _name_in(source: Source, name: str) -> str | None:
    """The name of an adapter's layer in a model that has, or lacks, the base model's prefix."""
    candidates = [name, *(f"{prefix}{name}" for prefix in _prefixes(source))]
    candidates += [name.removeprefix(f"{name.partition('.')[0]}.")]
    return next((each for each in candidates if each in source.stored), None)


def _prefixes(source: Source) -> list[str]:
    parts = source.stack.split(".")
    return [".".join(parts[:end]) + "." for end in range(1, len(parts))]


def check_summable(adapters: Sequence[Adapter]) -> list[str]:
    """What keeps adapters from being summed: other bases, layers of other shapes; every fault."""
    faults = []
    first = adapters[0]
    for other in adapters[1:]:
        if other.base != first.base:
            faults.append(f"{other.place} was trained on {other.base}, {first.place} on {first.base}")
        if bool(other.config.get("fan_in_fan_out")) != bool(first.config.get("fan_in_fan_out")):
            faults.append(f"{other.place} keeps its weights transposed, {first.place} does not, or the reverse")
        for name, (down, up, _) in other.layers.items():
            if name not in first.layers:
                continue
            own = (first.layers[name][1].spec.shape[0], first.layers[name][0].spec.shape[1])
            if own != (up.spec.shape[0], down.spec.shape[1]):
                faults.append(
                    f"{name}: {first.place} changes {list(own)}, {other.place} {[up.spec.shape[0], down.spec.shape[1]]}"
                )
    return faults


def summed(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of the adapter with ΔW = Σ w_i s_i B_i A_i: the A_i one over the other, the B_i, each times
    w_i s_i, side by side. Its rank is the sum of the ranks, its scale 1; an adapter that lacks a layer adds zeros.
    """
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.layers))
    ranks = [max(down.spec.shape[0] for down, _, _ in adapter.layers.values()) for adapter in adapters]
    tensors: dict[str, Tensor] = {}
    for name in names:
        downs, ups = [], []
        shape = next(
            (each.layers[name][0].spec.shape[1], each.layers[name][1].spec.shape[0])
            for each in adapters
            if name in each.layers
        )
        for adapter, weight, rank in zip(adapters, weights, ranks, strict=True):
            down, up = torch.zeros(rank, shape[0]), torch.zeros(shape[1], rank)
            if name in adapter.layers:
                stored_down, stored_up, scale = adapter.layers[name]
                own = stored_down.spec.shape[0]
                down[:own] = stored_down.read().float()
                up[:, :own] = stored_up.read().float() * (weight * scale)
            downs.append(down)
            ups.append(up)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat(downs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat(ups, dim=1)
    config = {
        **adapters[0].config,
        "r": sum(ranks),
        "lora_alpha": sum(ranks),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "target_modules": sorted({name.rpartition(".")[2] for name in names}),
    }
    return tensors, config
