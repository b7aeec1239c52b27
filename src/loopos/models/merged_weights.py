"""The weights of a model under the names of its files, with the trained adapter merged, one tensor at a time.

For an engine that has no adapters. Apart from `saved_adapters`, whose merge changes the model: here it trains on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from loopos.models.active_adapters import ADAPTER
from loopos.storage.tensor_files import TensorSpec


def merged_weights(model: PreTrainedModel) -> tuple[dict[str, TensorSpec], Callable[[str], Tensor]]:
    """Name in the model's files → spec, and the function that returns the tensor of a name.

    Where the trained adapter changes a layer its weight is W' = W + s·B·A (Hu et al. 2021), or of DoRA m·W'/‖W'‖ by
    rows (Liu et al. 2024), in fp32 and rounded once to the format of W. Only one merged layer exists at a time, except
    for architectures whose files name or split tensors otherwise than the model does: they are merged as a whole.
    """
    sources = _sources(model)
    specs = {name: TensorSpec.of(weight) for name, (weight, _) in sources.items()}

    def tensor_of(name: str) -> Tensor:
        weight, layer = sources[name]
        return weight if layer is None else _merged(layer).to(weight.dtype)

    shapes = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    if set(revert_weight_conversion(model, shapes)) == set(specs):
        return specs, tensor_of
    as_stored: Mapping[str, Tensor] = revert_weight_conversion(model, {name: tensor_of(name) for name in specs})
    return {name: TensorSpec.of(weight) for name, weight in as_stored.items()}, as_stored.__getitem__


def _sources(model: PreTrainedModel) -> dict[str, tuple[Tensor, nn.Module | None]]:
    """Name without adapters → the parameter, and the layer whose adapter changes it."""
    modules, found = dict(model.named_modules()), {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        outer, _, part = name.rpartition(".base_layer.")
        adapted = modules[outer] if outer and part == "weight" else None
        assert ".base_layer" not in outer, f"{name}: adapters over adapters"
        found[name.replace(".base_layer.", ".")] = (parameter.detach(), adapted)
    return found


@torch.no_grad()
def _merged(layer: nn.Module) -> Tensor:
    """The weight of one layer with the trained adapter."""
    copied: Any = copy.deepcopy(layer).float()
    copied.merge(adapter_names=[ADAPTER])
    weight: Tensor = copied.get_base_layer().weight
    return weight.detach()
