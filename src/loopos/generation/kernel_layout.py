"""Weights in the layout of the CPU's matrix kernels, for as long as generation lasts.

Enters: a model whose linear layers hold bf16 weights on a CPU. Leaves: the same layers, with each weight moved into
the blocks that oneDNN multiplies by, instead of being reordered anew in every product; query, key and value as one
product, and gated units with fewer kernels. Afterwards the weights are bit for bit what and where they were. A weight's
memory is given back as it is moved, so that there is one copy at any time; only an output layer that is tied to the
embedding, whose rows are still looked up, is copied for as long. Weights in codes are written out beside their codes,
and forgotten afterwards. Left out: when it pays, and whether the logits stay the same (`road.py`).
Letters: K input features, N output features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from loopos.models.quantized import QuantizedLinear


@contextmanager
def kernel_layout(model: nn.Module) -> Iterator[None]:
    """Within, linear layers multiply by weights in the kernel's layout, and reading such a weight gives NaN.

    Layers stay as they are where there is nothing to gain (another format or device) or the weight is not theirs alone:
    shared with another layer than an embedding, part of a larger storage, or mapped from a file. Moving there and back
    takes 0.1 s for 106 M parameters on two cores. Within a `kernel_layout` of the same model nothing is done.
    """
    changed: list[_Packed | _PackedTogether | _WrittenOut | _Replaced] = []
    try:
        # Tensors made in inference mode could never train again.
        with torch.inference_mode(False), torch.no_grad():
            alone, shared = _packable(model)
            for layers in _reading_together(model, alone):
                changed.append(_PackedTogether(layers))
                alone.difference_update(layers)
            packed: dict[nn.Module, _Packed] = {}
            for layer in (*alone, *shared):
                packed[layer] = _Packed(layer, moved=layer in alone)
                changed.append(packed[layer])
            for module in model.modules():
                unit = _gated_unit(module, packed)
                if unit is not None:
                    changed.append(_Replaced(module, unit))
            for codes in _writable(model):
                changed.append(_WrittenOut(codes))
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for one in reversed(changed):
                one.back()


class _Replaced:
    """A module that runs another function; an instance's own `forward` comes before its class's."""

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self._module = module
        module.forward = forward

    def back(self) -> None:
        del self._module.forward


class _Packed:
    """A linear layer whose weight `[N, K]` is in the kernel's layout: `moved` there, or copied."""

    def __init__(self, layer: nn.Linear, moved: bool) -> None:
        self._layer, self._own, self._moved = layer, layer.weight.data, moved
        self._packed = _packed(self._own)
        if moved:
            _release(layer, self._own)
        self._forward = _Replaced(layer, self.product)

    def product(self, input: Tensor, then: str = "none", variant: str = "") -> Tensor:
        """f(x Wᵀ + b), `[..., K]` → `[..., N]`, with the function f that follows the product, or none."""
        return _product(input, self._packed, self._layer.bias, then, variant)

    def product_times(self, input: Tensor, factor: Tensor) -> Tensor:
        """(x Wᵀ + b) ⊙ factor; factor `[..., N]`."""
        multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary
        return multiply(input, factor, self._packed, self._layer.bias, "mul")

    def back(self) -> None:
        self._forward.back()
        if self._moved:
            _restore(self._layer, self._own, self._packed.to_dense())


class _PackedTogether:
    """Linear layers that read one input, moved into one weight `[N₁ + N₂ + …, K]`: a product of few rows costs a fixed
    time beside that of its weights. The first layer to be given an input multiplies for all.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers, self._owns = layers, [layer.weight.data for layer in layers]
        self._packed = _packed(torch.cat(self._owns))
        biases = [layer.bias for layer in layers]
        self._bias = None if biases[0] is None else torch.cat(biases)
        for layer, own in zip(layers, self._owns, strict=True):
            _release(layer, own)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []
        self._forwards = [_Replaced(layer, partial(self._product, number)) for number, layer in enumerate(layers)]

    def _product(self, number: int, input: Tensor) -> Tensor:
        if input is not self._input or self._outputs[number] is None:
            together = _product(input, self._packed, self._bias)
            self._input, self._outputs = input, [*together.split([len(own) for own in self._owns], -1)]
        output, self._outputs[number] = self._outputs[number], None
        if not any(held is not None for held in self._outputs):
            self._input = None
        assert output is not None
        return output

    def back(self) -> None:
        for forward in self._forwards:
            forward.back()
        parts = self._packed.to_dense().split([len(own) for own in self._owns])
        for layer, own, part in zip(self._layers, self._owns, parts, strict=True):
            _restore(layer, own, part)


def _packed(weight: Tensor) -> Tensor:
    # The number of rows is a hint alone: measured, the layout is the same for 1 to 400.
    reorder: Callable[..., Tensor] = torch.ops.mkldnn._reorder_linear_weight
    return reorder(weight, None)


def _product(input: Tensor, packed: Tensor, bias: Tensor | None, then: str = "none", variant: str = "") -> Tensor:
    multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    return multiply(input, packed, bias, then, [], variant)


def _release(layer: nn.Linear, own: Tensor) -> None:
    shape = own.shape
    own.untyped_storage().resize_(0)
    layer.weight.data = own.new_full((1, 1), float("nan")).expand(shape)


def _restore(layer: nn.Linear, own: Tensor, values: Tensor) -> None:
    own.untyped_storage().resize_(own.numel() * own.element_size())
    layer.weight.data = own.copy_(values)


# The function between a gated unit's products, as oneDNN names it, with its variant.
_ACTIVATIONS: dict[str, tuple[str, str]] = {
    "SiLU": ("swish", ""), "SiLUActivation": ("swish", ""), "GELUTanh": ("gelu", "tanh"),
}  # fmt: skip


def _gated_unit(module: nn.Module, packed: Mapping[nn.Module, _Packed]) -> Callable[[Tensor], Tensor] | None:
    """W_down (f(W_gate x) ⊙ W_up x) in three kernels instead of five (Shazeer 2020), where `module` is such a unit by
    transformers' names.
    """
    gate, up, down = (packed.get(getattr(module, name, module)) for name in ("gate_proj", "up_proj", "down_proj"))
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    if gate is None or up is None or down is None or activation is None or len(list(module.children())) != 4:
        return None

    def forward(input: Tensor) -> Tensor:
        return down.product(up.product_times(input, gate.product(input, *activation)))

    return forward


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


def _reading_together(model: nn.Module, among: Set[nn.Linear]) -> list[list[nn.Linear]]:
    """Query, key and value of every attention layer, by transformers' names."""
    groups = []
    for module in model.modules():
        layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        linear = [layer for layer in layers if isinstance(layer, nn.Linear) and layer in among]
        if len(linear) == 3 and len({(layer.in_features, layer.bias is None) for layer in linear}) == 1:
            groups.append(linear)
    return groups


def _has_its_own_memory(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or type(weight.data) is not Tensor:
        return False
    storage = weight.untyped_storage()
    return storage.resizable() and storage.nbytes() == weight.numel() * weight.element_size() and weight.is_contiguous()
