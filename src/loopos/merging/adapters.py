"""Adapters in a merge: one over its base as a model, or several summed into one adapter.

Plain LoRA is read a tensor at a time; peft first folds an adapter of another kind into its base, and the changed
weights stay in a scratch folder until they are read. Letters: r rank, A `[r, in]`, B `[out, r]`, s = alpha/r (with
rslora alpha/√r).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.merging.sources import Change, LowRank, Replaced, Source, open_source
from loopos.models.adapter_folder import PREFIX, AdapterFolder, open_adapter_folder
from loopos.models.folders import save_pretrained
from loopos.models.load import load_adapted
from loopos.models.resolve import ModelRef, resolve_trained
from loopos.storage.tensor_files import StoredTensor

_Pairs = Mapping[str, tuple[StoredTensor, StoredTensor, float]]
# The keys that the summed adapter takes from the first one's config; the others depend on that adapter's own weights.
_COPIED_KEYS = ("task_type", "peft_type", "peft_version", "base_model_name_or_path", "fan_in_fan_out", "lora_dropout")


def open_summable(source: str) -> AdapterFolder:
    """The adapter in a folder. Raises `UserError` for one that is broken, or whose change is not only scale·B·A."""
    adapter = open_adapter_folder(source)
    if beyond := adapter.beyond_lora:
        raise UserError(
            f"{source}: an adapter with {', '.join(beyond[:3])}; expected plain LoRA on linear layers: to merge it "
            "as a model, remove "
            '"result": "adapter"'
        )
    return adapter


def adapted_source(ref: ModelRef, base: ModelRef | None, scratch: Callable[[], Path]) -> Source:
    """An adapter over `base`, or by default over the model that it names, as a model. scratch: makes an empty folder
    that exists until the source has been read. Raises `UserError`.
    """
    adapter = open_adapter_folder(ref.name)
    if base is None and adapter.base is None:
        raise UserError(f"{ref.name}: an adapter that names no base model; set base")
    under = base or resolve_trained(str(adapter.base))
    if adapter.beyond_lora or under.storage == "adapter":
        return _folded_source(ref, adapter, under, scratch())
    return _low_rank_source(ref, adapter, open_source(under))


def _folded_source(ref: ModelRef, adapter: AdapterFolder, base: ModelRef, scratch: Path) -> Source:
    """An adapter of any kind over its base; unchanged weights keep the base's number format."""
    folded = load_adapted(adapter, base=base)
    save_pretrained(scratch, folded.model, folded.tokenizer)
    whole = open_source(str(scratch))
    if base.storage == "adapter":
        return replace(whole, ref=ref)
    under, stored, changes = open_source(base), dict[str, StoredTensor](), dict[str, Change]()
    for name, tensor in whole.stored.items():
        own = under.stored.get(name)
        if own is None or own.spec.shape != tensor.spec.shape:
            stored[name] = tensor
            continue
        stored[name] = own
        if not torch.equal(own.read().to(tensor.spec.dtype), tensor.read()):
            changes[name] = Replaced(tensor)
    return replace(whole, ref=ref, stored=stored, changes=changes)


def _low_rank_source(ref: ModelRef, adapter: AdapterFolder, under: Source) -> Source:
    """Plain LoRA over a base, read a tensor at a time."""
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    changes: dict[str, Change] = {}
    wrong = []
    for module, (down, up, scale) in adapter.lora_pairs().items():
        name = _name_in(under, f"{module}.weight")
        shape = (up.spec.shape[0], down.spec.shape[1])
        expected = shape[::-1] if transposed else shape
        if name is None:
            wrong.append(f"the base has no layer {module}")
        elif under.stored[name].spec.shape != expected:
            wrong.append(f"{name} is {list(under.stored[name].spec.shape)}, the adapter's change {list(expected)}")
        else:
            changes[name] = LowRank(down, up, scale, transposed)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{adapter.source}: does not fit {under.location}: {'; '.join(wrong[:3])}{more}")
    return replace(under, ref=ref, changes=changes)


def _name_in(source: Source, name: str) -> str | None:
    """The name of an adapter's layer in a model with or without the base model's prefix."""
    candidates = [name, *(f"{prefix}{name}" for prefix in _prefixes(source))]
    candidates += [name.removeprefix(f"{name.partition('.')[0]}.")]
    return next((each for each in candidates if each in source.stored), None)


def _prefixes(source: Source) -> list[str]:
    parts = source.stack.split(".")
    return [".".join(parts[:end]) + "." for end in range(1, len(parts))]


def check_summable(adapters: Sequence[AdapterFolder]) -> list[str]:
    """Why adapters cannot be summed: different bases, or layers of different shapes; all reasons."""
    diagnostics = []
    shapes = [{name: _shape(pair) for name, pair in adapter.lora_pairs().items()} for adapter in adapters]
    first = adapters[0]
    for other, own in zip(adapters[1:], shapes[1:], strict=True):
        if other.base != first.base:
            diagnostics.append(f"{other.source} was trained on {other.base}, {first.source} on {first.base}")
        if bool(other.config.get("fan_in_fan_out")) != bool(first.config.get("fan_in_fan_out")):
            diagnostics.append(
                f"{other.source} and {first.source}: one stores its weights transposed, the other does not"
            )
        diagnostics += [
            f"{name}: {first.source} changes {list(shapes[0][name])}, {other.source} {list(shape)}"
            for name, shape in own.items()
            if name in shapes[0] and shapes[0][name] != shape
        ]
    return diagnostics


def _shape(pair: tuple[StoredTensor, StoredTensor, float]) -> tuple[int, int]:
    """Outputs and inputs of the layer that a pair changes."""
    down, up, _ = pair
    return up.spec.shape[0], down.spec.shape[1]


def summed(adapters: Sequence[AdapterFolder], weights: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of the adapter with ΔW = Σ w_i s_i B_i A_i: the A_i stacked, the B_i, each times w_i s_i, side
    by side. Its rank is the sum of the ranks, its scale 1; an adapter without a layer adds zeros there.
    """
    parts: list[_Pairs] = [adapter.lora_pairs() for adapter in adapters]
    names = list(dict.fromkeys(name for pairs in parts for name in pairs))
    ranks = [max(down.spec.shape[0] for down, _, _ in pairs.values()) for pairs in parts]
    tensors: dict[str, Tensor] = {}
    for name in names:
        downs, ups = [], []
        outputs, inputs = next(_shape(pairs[name]) for pairs in parts if name in pairs)
        for pairs, weight, rank in zip(parts, weights, ranks, strict=True):
            down, up = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
            if name in pairs:
                stored_down, stored_up, scale = pairs[name]
                own = stored_down.spec.shape[0]
                down[:own] = stored_down.read().float()
                up[:, :own] = stored_up.read().float() * (weight * scale)
            downs.append(down)
            ups.append(up)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.cat(downs)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.cat(ups, dim=1)
    config = {key: adapters[0].config[key] for key in _COPIED_KEYS if key in adapters[0].config}
    # Full names: the last part of a name may also be that of another layer, which no adapter changes.
    return tensors, {**config, "r": sum(ranks), "lora_alpha": sum(ranks), "target_modules": sorted(names)}
