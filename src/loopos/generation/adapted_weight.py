"""A packed weight with low-rank changes beside it: W + s·B·A (Hu et al. 2021), in three products and no other kernels.

Enters: linear layers, plain or under peft's LoRA, and the packed weight of their own. Leaves: what `PackedWeight`
gives, with the change of the active adapter. The change is not added to the weight: in bf16 most of it would be rounded
away. Left out: packing, and which layers (`kernel_layout.py`).
Letters: K input features, N output features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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


def adapted(packed: PackedWeight, layers: Sequence[nn.Module]) -> PackedWeight | AdaptedWeight:
    """The packed weight of these layers with their active adapters' changes; itself where they have none."""
    changed = any(type(layer) is not nn.Linear and _active(layer) for layer in layers)
    return AdaptedWeight(packed, layers) if changed else packed


class AdaptedWeight:
    """Several layers that read one input, as in `PackedWeight`: their A one over the other, `[Σr, K]`, and their s·B as
    blocks of one matrix `[ΣN, Σr]`.
    """

    def __init__(self, packed: PackedWeight, layers: Sequence[Any]) -> None:
        self._packed = packed
        downs, ups = [], []
        for layer in layers:
            names = [] if type(layer) is nn.Linear else _active(layer)
            down = [layer.lora_A[name].weight.data for name in names]
            up = [layer.lora_B[name].weight.data.float().mul(layer.scaling[name]) for name in names]
            downs += down
            ups.append(up[0] if up else torch.zeros(layer.out_features, 0))
        self._down = _copied(torch.cat(downs))
        blocks: Callable[..., Tensor] = torch.block_diag
        self._up = _copied(blocks(*ups))

    def product(self, input: Tensor, then: str = "none") -> Tensor:
        """f(x (W + s·B·A)ᵀ + b), `[..., K]` → `[..., N]`; f: "none" or "swish"."""
        found = self._packed.product_with(input, self._up.product(self._down.product(input)), "add")
        return F.silu(found, inplace=True) if then == "swish" else found

    def product_with(self, input: Tensor, other: Tensor, operation: str) -> Tensor:
        """(x (W + s·B·A)ᵀ + b) ∘ other, `[..., N]`; operation: "add" or "mul"."""
        if operation == "mul":
            return self.product(input).mul_(other)
        changed = self._up.product_with(self._down.product(input), other, "add")
        return self._packed.product_with(input, changed, "add")


def _copied(weight: Tensor) -> PackedWeight:
    """A matrix `[N, K]` as a packed weight of its own, in bf16."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    return PackedWeight([layer], moved=False)
