"""A linear layer's weight in the blocks that oneDNN multiplies by.

Enters: linear layers with bf16 weights on a CPU. Leaves: their product, alone or with what follows it in one kernel,
and the weights back where they were, bit for bit. Left out: which layers (`kernel_layout.py`).
Letters: K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class PackedWeight:
    """The weight of one layer, or of several that read one input, `[N₁ + N₂ + …, K]`: a product of few rows costs a
    fixed time beside that of its weights.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, below: Tensor | None = None, moved: bool = True) -> None:
        """below: more rows under those of the layers, `[n, K]`. moved: the layers' own memory is given back, and
        reading their weights gives NaN; otherwise this is a copy, of one layer.
        """
        assert moved or len(layers) == 1, "a copy is of one layer"
        self._layers, self._moved = layers, moved
        self._owns = [layer.weight.data for layer in layers]
        reorder: Callable[..., Tensor] = torch.ops.mkldnn._reorder_linear_weight
        # The number of rows is a hint alone: measured, the layout is the same for 1 to 400.
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
        """The layers' weights are where and what they were."""
        if not self._moved:
            return
        parts = self._packed.to_dense()
        first = 0
        for layer, own in zip(self._layers, self._owns, strict=True):
            count = layer.out_features
            own.untyped_storage().resize_(own.numel() * own.element_size())
            layer.weight.data = own.copy_(parts[first : first + count])
            first += count
