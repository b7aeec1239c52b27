"""LoRA layers that compute in fewer passes than peft's, and DoRA layers that compute norms in fp32.

Apart from `adapters`, which decides what has adapters: here are only the products of one layer.
Letters: T tokens, K inputs, N outputs, r rank, s = alpha / r.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def make_lean(model: nn.Module) -> None:
    """Makes peft's LoRA layers over linear layers compute in fewer passes, and its DoRA norms in fp32, in place."""
    replaced = {own.__bases__[0]: own for own in (_lean_linear(), _exact_dora())}
    for module in model.modules():
        if (own := replaced.get(type(module))) is not None:
            module.__class__ = own


@cache
def _lean_linear() -> type[nn.Module]:
    """peft's LoRA over a linear layer, with s applied to the r numbers of a row instead of its N, and the change added
    within its own product: one pass over `[..., N]` instead of three.
    """
    from peft.tuners.lora.layer import Linear

    class LeanLinear(Linear):
        def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
            layer: Any = self
            name = _single_lora(layer, x)
            if name is None or others or named:
                answer: Tensor = super().forward(x, *others, **named)
                return answer
            low = layer.lora_A[name](layer.lora_dropout[name](x)).mul(layer.scaling[name])
            product: Tensor = layer.base_layer(x)
            product.flatten(0, -2).addmm_(low.flatten(0, -2), layer.lora_B[name].weight.t())
            return product

    return LeanLinear


def _single_lora(layer: Any, x: Tensor) -> str | None:
    """The single active adapter of a layer if it is plain LoRA in the format of weights and input; otherwise None."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or type(layer.base_layer) is not nn.Linear:
        return None
    up = layer.lora_B[active[0]]
    # Other tensor types, such as a sharded tensor, need the layer's own forward.
    bare = all(type(each.weight) is nn.Parameter for each in (layer.base_layer, up))
    plain = active[0] not in layer.lora_variant and up.bias is None and x.dim() > 1 and bare
    same = x.dtype == up.weight.dtype == layer.base_layer.weight.dtype
    return active[0] if plain and same and not torch.is_autocast_enabled(x.device.type) else None


@cache
def _exact_dora() -> type[nn.Module]:
    """peft's DoRA over a linear layer (Liu et al. 2024), m·(W + s·B·A) / ‖W + s·B·A‖ by rows, with the norms in fp32.

    In bf16 a norm is wrong by up to 2⁻⁹, so that adapters that change nothing would scale every output.
    """
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.utils.other import transpose

    class ExactDora(DoraLinearLayer):
        def forward(self, x: Tensor, **parts: Any) -> Tensor:
            layer: Any = self
            down, up, base, scaling = (parts[name] for name in ("lora_A", "lora_B", "base_layer", "scaling"))
            weight = transpose(base.weight, layer.fan_in_fan_out)
            with torch.no_grad():
                # The norm is a constant to the gradient, as in section 4.3 of the paper.
                change = up.weight.float() @ down.weight.float()
                norm = torch.linalg.vector_norm(change.mul_(scaling).add_(weight), dim=1)
            ratio = layer.weight.float() / norm
            own = parts["base_result"]
            if own is None:
                # peft drops inputs out here, so that the base's product is another one.
                own = nn.functional.linear(x, weight)
            elif base.bias is not None:
                own = own - base.bias
            scaled: Tensor = (ratio - 1) * own + ratio * up(down(x)).mul(scaling)
            return scaled.to(x.dtype)

    return ExactDora
