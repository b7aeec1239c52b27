"""Weights in the layout of the CPU's matrix kernels, for as long as generation lasts.

Enters: a model whose linear layers hold bf16 weights on a CPU. Leaves: the same layers, with each weight moved into
the blocks that oneDNN multiplies by, instead of being reordered anew in every product. Afterwards the weights are bit
for bit what and where they were. There is one copy at any time: a weight's memory is given back as it is moved. Weights
in codes are written out beside their codes, and forgotten afterwards. Left out: when it pays (`engine.py`).
Letters: K input features, N output features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loopos.models.quantized import QuantizedLinear


@contextmanager
def kernel_layout(model: nn.Module) -> Iterator[None]:
    """Within, linear layers multiply by weights in the kernel's layout, and reading such a weight gives NaN.

    Layers stay as they are where there is nothing to gain (another format or device) or the weight is not theirs alone:
    tied to an embedding, part of a larger storage, or mapped from a file. Moving there and back takes 0.1 s for
    106 M parameters on two cores. Within a `kernel_layout` of the same model nothing is done.
    """
    moved: list[_Moved | _WrittenOut] = []
    try:
        # Tensors made in inference mode could never train again.
        with torch.inference_mode(False), torch.no_grad():
            for layer in _movable(model):
                moved.append(_Moved(layer))
            for codes in _writable(model):
                moved.append(_WrittenOut(codes))
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for one in moved:
                one.back()


class _Moved:
    """A linear layer whose weight `[N, K]` is in the kernel's layout."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer, self._own = layer, layer.weight.data
        # The number of rows is a hint alone: measured, the layout is the same for 1 to 400.
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self._own, None)
        self._own.untyped_storage().resize_(0)
        layer.weight.data = self._own.new_full((1, 1), float("nan")).expand(self._own.shape)
        # An instance's own `forward` comes before its class's.
        layer.forward = self._multiply  # type: ignore[method-assign]

    def _multiply(self, input: Tensor) -> Tensor:
        """x Wᵀ + b, `[..., K]` → `[..., N]`."""
        multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        return multiply(input, self._packed, self._layer.bias, "none", [], "")

    def back(self) -> None:
        self._own.untyped_storage().resize_(self._own.numel() * self._own.element_size())
        self._layer.weight.data = self._own.copy_(self._packed.to_dense())
        del self._layer.forward


class _WrittenOut:
    """A layer whose codes are written out, as bf16 weights in the kernel's layout: beyond a few rows a product with
    them is faster than one with codes, and no slower than with the weights before they were quantized.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        self._layer = layer
        layer.written_out = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to(torch.bfloat16), None)

    def back(self) -> None:
        self._layer.written_out = None


def _writable(model: nn.Module) -> list[QuantizedLinear]:
    """Layers in codes on a CPU that run in bf16 and do not multiply whole numbers."""
    if not _has_bf16_kernels():
        return []
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, QuantizedLinear)
        and not layer.rounds_activations
        and layer.written_out is None
        and layer._weight_qdata.device.type == "cpu"
        and layer._weight_scale.dtype is torch.bfloat16
    ]


def _has_bf16_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


def _movable(model: nn.Module) -> list[nn.Linear]:
    """Plain linear layers, each with a weight of its own."""
    if not _has_bf16_kernels():
        return []
    users = Counter(id(own) for module in model.modules() for own in vars(module)["_parameters"].values())
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and users[id(layer.weight)] == 1
        and _has_its_own_memory(layer.weight)
    ]


def _has_its_own_memory(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or type(weight.data) is not Tensor:
        return False
    storage = weight.untyped_storage()
    return storage.resizable() and storage.nbytes() == weight.numel() * weight.element_size() and weight.is_contiguous()
