"""Weights in the layout of the CPU's matrix kernels, for as long as generation lasts.

Enters: a model whose linear layers hold bf16 weights on a CPU. Leaves: the same layers, with each weight moved into
the blocks that oneDNN multiplies by, instead of being reordered anew in every product, and decoder layers of the Llama
kind in fewer kernels. Afterwards the weights are bit for bit what and where they were. A weight's memory is given back
as it is moved, so that there is one copy at any time; only an output layer that is tied to the embedding, whose rows
are still looked up, is copied for as long. Weights in codes are written out beside their codes, and forgotten
afterwards. Left out: when it pays, and whether the logits stay the same (`road.py`).
Letters: K input features, N output features.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loopos.generation.adapted_weight import AdaptedWeight, low_rank_layers, own_layer, packed
from loopos.generation.decoder_layer import DecoderLayer, linear_layers
from loopos.generation.packed_weight import PackedWeight
from loopos.models.quantized import QuantizedLinear


@contextmanager
def kernel_layout(model: nn.Module) -> Iterator[None]:
    """Within, linear layers multiply by weights in the kernel's layout, and reading such a weight gives NaN.

    Layers stay as they are where there is nothing to gain (another format or device) or the weight is not theirs alone:
    shared with another layer than an embedding, part of a larger storage, or mapped from a file. Moving there and back
    takes 0.1 s for 106 M parameters on two cores. Within a `kernel_layout` of the same model nothing is done.
    """
    changed: list[PackedWeight | AdaptedWeight | _WrittenOut | _Replaced] = []
    try:
        # Tensors made in inference mode could never train again.
        with torch.inference_mode(False), torch.no_grad():
            alone, shared = _packable(model)
            # Small, and read by what adds their product.
            alone.difference_update(*map(low_rank_layers, model.modules()))
            for module in model.modules():
                groups = linear_layers(module)
                own = {layer for layer in map(own_layer, itertools.chain(*groups)) if layer is not None}
                if not groups or not alone.issuperset(own):
                    continue
                weights = []
                for group in groups:
                    weights.append(packed(group))
                    changed.append(weights[-1])
                alone -= own
                changed.append(_Replaced(module, DecoderLayer(module, *weights).forward))
            for layer in (*alone, *shared):
                weight = PackedWeight([layer], moved=layer in alone)
                changed += [weight, _Replaced(layer, weight.product)]
            for codes in _writable(model):
                changed.append(_WrittenOut(codes))
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for one in reversed(changed):
                one.back()


class _Replaced:
    """A module that runs another function; an instance's own `forward` comes before its class's."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._module = module
        module.forward = forward

    def back(self) -> None:
        del self._module.forward


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


def _packable(model: nn.Module) -> tuple[set[nn.Linear], set[nn.Linear]]:
    """Plain linear layers with a weight of their own, and those that share theirs with an embedding alone."""
    alone: set[nn.Linear] = set()
    shared: set[nn.Linear] = set()
    if not _has_bf16_kernels():
        return alone, shared
    users = Counter(id(own) for module in model.modules() for own in vars(module)["_parameters"].values())
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for layer in model.modules():
        if type(layer) is not nn.Linear or "forward" in vars(layer) or not _has_its_own_memory(layer.weight):
            continue
        if users[id(layer.weight)] == 1:
            alone.add(layer)
        elif users[id(layer.weight)] == 2 and id(layer.weight) in looked_up:
            shared.add(layer)
    return alone, shared


def _has_its_own_memory(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or type(weight.data) is not Tensor:
        return False
    storage = weight.untyped_storage()
    return storage.resizable() and storage.nbytes() == weight.numel() * weight.element_size() and weight.is_contiguous()
