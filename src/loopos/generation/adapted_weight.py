"""A packed weight with low-rank changes beside it: W + s·B·A (Hu et al. 2021), in two products.

Enters: linear layers under peft's LoRA, some of them plain. Leaves: what `PackedWeight` gives, with the change of the
active adapters. The change is not added to the weight: in bf16 most of it would be rounded away. Left out: packing,
and which layers (`kernel_layout.py`).
Letters: K input features, N output features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loopos.generation.packed_weight import PackedWeight


def own_layer(layer: nn.Module) -> nn.Linear | None:
    """The plain layer that this one is, or that its adapter stands over; None for what does more than LoRA says."""
    if type(layer) is nn.Linear:
        return layer
    base = getattr(layer, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(layer, "lora_A") or len(_active(layer)) > 1:
        return None
    adapted: Any = layer
    plain = not adapted.merged and not any(name in adapted.lora_variant for name in _active(layer))
    unbiased = all(adapted.lora_B[name].bias is None for name in _active(layer))
    rests = all(not dropout.training or not getattr(dropout, "p", 0.0) for dropout in adapted.lora_dropout.values())
    return base if plain and unbiased and rests else None


def _active(layer: Any) -> list[str]:
    """The adapters that the layer adds to its product."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def low_rank_layers(module: nn.Module) -> list[nn.Linear]:
    """A and B of every adapter of a layer; of a module without any none."""
    pairs = [one for name in ("lora_A", "lora_B") for one in getattr(module, name, nn.ModuleDict()).children()]
    return [each for each in pairs if isinstance(each, nn.Linear)]


def packed(layers: Sequence[nn.Module]) -> PackedWeight | AdaptedWeight:
    """The weight of these layers, which `own_layer` knows, with their active adapters' changes where they have any."""
    plain = [own for own in map(own_layer, layers) if own is not None]
    changed = any(type(layer) is not nn.Linear and _active(layer) for layer in layers)
    return AdaptedWeight(plain, layers) if changed else PackedWeight(plain)


class AdaptedWeight:
    """Several layers that read one input, as in `PackedWeight`: their A lie below their weights, `[ΣN + Σr, K]`, so
    that A x comes with W x, and their s·B are blocks of one matrix `[ΣN, Σr]`.
    """

    def __init__(self, plain: Sequence[nn.Linear], layers: Sequence[Any]) -> None:
        """plain: the layers that the adapters of `layers` stand over."""
        downs, ups = [], []
        for layer in layers:
            names = [] if type(layer) is nn.Linear else _active(layer)
            downs += [layer.lora_A[name].weight.data for name in names]
            up = [layer.lora_B[name].weight.data.float().mul(layer.scaling[name]) for name in names]
            ups.append(up[0] if up else torch.zeros(layer.out_features, 0))
        blocks: Callable[..., Tensor] = torch.block_diag
        self._num_features = sum(layer.out_features for layer in plain)
        self._up = _copied(blocks(*ups))
        self._together = PackedWeight(plain, below=torch.cat(downs).to(torch.bfloat16))

    def product(self, input: Tensor) -> Tensor:
        """x (W + s·B·A)ᵀ + b, `[..., K]` → `[..., N]`."""
        own, low = self._parts(input)
        return self._up.product_with(low, own)

    def product_with(self, input: Tensor, other: Tensor) -> Tensor:
        """x (W + s·B·A)ᵀ + b + other, `[..., N]`."""
        own, low = self._parts(input)
        return self._up.product_with(low, own + other)

    def _parts(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """x Wᵀ + b and x Aᵀ, `[..., N]` and `[..., Σr]`."""
        both = self._together.product(input)
        return both[..., : self._num_features], both[..., self._num_features :].contiguous()

    def back(self) -> None:
        """The layers' weights are where and what they were."""
        self._together.back()


def _copied(weight: Tensor) -> PackedWeight:
    """A matrix `[N, K]` as a packed weight of its own, in bf16."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    return PackedWeight([layer], moved=False)
