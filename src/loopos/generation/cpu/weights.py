"""A linear layer's weight in oneDNN's blocks, also with LoRA beside it: W + s·B·A in two products (Hu et al. 2021).

The LoRA change is not added to the weight, because bf16 would round most of it away. `layers.py` chooses the layers.
Letters: K input features, N output features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PackedWeight:
    """The weight of one layer, or of several layers with the same input, `[N₁ + N₂ + …, K]`: combining them saves the
    fixed cost of a product with few rows.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, below: Tensor | None = None, moved: bool = True) -> None:
        """below: additional rows under those of the layers, `[n, K]`. moved: the layers' own memory is freed and
        reading their weights gives NaN; otherwise this is a copy of one layer.
        """
        assert moved or len(layers) == 1, "a copy is of one layer"
        self._layers, self._moved = layers, moved
        self._owns = [layer.weight.data for layer in layers]
        reorder: Callable[..., Tensor] = torch.ops.mkldnn._reorder_linear_weight
        # The number of rows is only a hint: the layout is the same for 1 to 400 rows (measured).
        rows = [*self._owns] if below is None else [*self._owns, below]
        self._packed = reorder(rows[0] if len(rows) == 1 else torch.cat(rows), None)
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers)), "all layers have a bias or none"
        if biases and below is not None:
            biases.append(biases[0].new_zeros(len(below)))
        self._bias = torch.cat(biases) if biases else None
        if moved:
            for layer, own in zip(layers, self._owns, strict=True):
                shape = own.shape
                own.untyped_storage().resize_(0)
                layer.weight.data = own.new_full((1, 1), float("nan")).expand(shape)

    def product(self, input: Tensor) -> Tensor:
        """x Wᵀ + b, `[..., K]` → `[..., N]`."""
        multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        return multiply(input, self._packed, self._bias, "none", [], "")

    def product_with(self, input: Tensor, other: Tensor) -> Tensor:
        """x Wᵀ + b + other, `[..., N]`."""
        multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary
        return multiply(input, other, self._packed, self._bias, "add")

    def back(self) -> None:
        """Restores the layers' weights."""
        if not self._moved:
            return
        parts = self._packed.to_dense()
        first = 0
        for layer, own in zip(self._layers, self._owns, strict=True):
            count = layer.out_features
            own.untyped_storage().resize_(own.numel() * own.element_size())
            layer.weight.data = own.copy_(parts[first : first + count])
            first += count


def own_layer(layer: nn.Module) -> nn.Linear | None:
    """The plain layer itself, or the one under its adapter; None if the adapter is more than plain LoRA."""
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
    """The active adapters of the layer."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def low_rank_layers(module: nn.Module) -> list[nn.Linear]:
    """A and B of every adapter of a layer; empty for a module without adapters."""
    pairs = [one for name in ("lora_A", "lora_B") for one in getattr(module, name, nn.ModuleDict()).children()]
    return [each for each in pairs if isinstance(each, nn.Linear)]


def packed(layers: Sequence[nn.Module]) -> PackedWeight | AdaptedWeight:
    """The packed weight of these layers, with their active adapters, if any."""
    plain = [own for own in map(own_layer, layers) if own is not None]
    changed = any(type(layer) is not nn.Linear and _active(layer) for layer in layers)
    return AdaptedWeight(plain, layers) if changed else PackedWeight(plain)


class AdaptedWeight:
    """Several layers with the same input, as in `PackedWeight`. Their A are rows below their weights, `[ΣN + Σr, K]`,
    so that one product gives W x and A x; their s·B are blocks of one matrix `[ΣN, Σr]`.
    """

    def __init__(self, plain: Sequence[nn.Linear], layers: Sequence[Any]) -> None:
        """plain: the layers under the adapters of `layers`."""
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
        """Restores the layers' weights."""
        self._together.back()


def _copied(weight: Tensor) -> PackedWeight:
    """A matrix `[N, K]` as its own packed weight, in bf16."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    return PackedWeight([layer], moved=False)
