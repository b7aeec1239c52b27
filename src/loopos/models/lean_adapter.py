"""peft's LoRA layers in fewer passes over their outputs.

Enters: a model under adapters. Leaves: the same, its adapters' plain cases computed by functions of ours. Left out:
putting adapters in (`adapters.py`), decoding (`generation/adapted_weight.py`).
Letters: T tokens, K inputs, N outputs, r rank, s = alpha / r.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def make_lean(model: nn.Module) -> None:
    """Lets peft's layers over linear ones compute in fewer passes, in place."""
    lean = _lean_linear()
    for module in model.modules():
        if type(module) is lean.__bases__[0]:
            module.__class__ = lean


@cache
def _lean_linear() -> type[nn.Module]:
    """peft's LoRA over a linear layer, with s scaling the r numbers of a row instead of its N, and the change added
    within its own product: of three passes over `[..., N]` one is left.
    """
    from peft.tuners.lora.layer import Linear

    class LeanLinear(Linear):
        def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
            layer: Any = self
            name = _alone(layer, x)
            if name is None or others or named:
                answer: Tensor = super().forward(x, *others, **named)
                return answer
            low = layer.lora_A[name](layer.lora_dropout[name](x)).mul(layer.scaling[name])
            product: Tensor = layer.base_layer(x)
            product.flatten(0, -2).addmm_(low.flatten(0, -2), layer.lora_B[name].weight.t())
            return product

    return LeanLinear


def _alone(layer: Any, x: Tensor) -> str | None:
    """The one active adapter of a layer, where it is plain LoRA in the format of weights and input."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or type(layer.base_layer) is not nn.Linear:
        return None
    up = layer.lora_B[active[0]]
    # A tensor of another kind, such as one of which each process holds a part, is for the layer's own call.
    bare = all(type(each.weight) is nn.Parameter for each in (layer.base_layer, up))
    plain = active[0] not in layer.lora_variant and up.bias is None and x.dim() > 1 and bare
    same = x.dtype == up.weight.dtype == layer.base_layer.weight.dtype
    return active[0] if plain and same and not torch.is_autocast_enabled(x.device.type) else None
