"""The kernel layout of a model's weights on a CPU, and a decoder layer of the Llama kind with fewer kernels.

In the kernel layout, bf16 weights are stored in the blocks that oneDNN multiplies by, instead of being reordered in
every product. A step with few rows otherwise spends a third of its time between products. Weights are restored bit for
bit. Each weight's memory is freed as it moves, so there is one copy at any time, except for an output layer that is
tied to the embedding. `decoders.py` checks that the logits stay equal.
Letters: B rows, T new tokens of each, H query heads, K key-value heads, D head size, d hidden features.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopos.generation.cache import PromptPass, TokenPass, cached_attention
from loopos.generation.cpu.weights import AdaptedWeight, PackedWeight, low_rank_layers, own_layer, packed
from loopos.models.quantized import QuantizedLinear

# transformers' layers that are, in this order: norm, attention with rotary positions, residual, norm, gated unit,
# residual. Other classes may combine the same parts differently.
_CLASSES = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_SWISH = frozenset({"SiLU", "SiLUActivation"})
_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def linear_layers(module: nn.Module) -> list[list[nn.Module]]:
    """The linear layers whose weights a `DecoderLayer` of this module uses, in its order, plain or under LoRA; empty
    for other kinds of modules.
    """
    if type(module).__name__ not in _CLASSES or type(module.get_submodule("mlp.act_fn")).__name__ not in _SWISH:
        return []
    layers = [module.get_submodule(name) for name in _LINEAR]
    plain = [own for own in map(own_layer, layers) if own is not None]
    if len(plain) < len(layers) or any(len({own.bias is None for own in each}) > 1 for each in (plain[:3], plain[4:6])):
        return []
    return [layers[:3], layers[3:4], layers[4:6], layers[6:]]


@dataclass(frozen=True)
class DecoderLayer:
    """x + O·attention(norm x), then that + W_down (swish(W_gate y) ⊙ W_up y), y its norm (Touvron et al. 2023).

    `together`: the weights of query, key and value. `gated`: of gate and up.
    """

    layer: Any
    together: PackedWeight | AdaptedWeight
    output: PackedWeight | AdaptedWeight
    gated: PackedWeight | AdaptedWeight
    down: PackedWeight | AdaptedWeight

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        cached_pass: PromptPass | TokenPass,
        **_of_other_attentions: object,
    ) -> Tensor:
        """`[B, T, d]` → `[B, T, d]`. position_embeddings: cosine and sine of the positions `[B, T, D]`."""
        attended = self._attended(self.layer.input_layernorm(hidden_states), position_embeddings, cached_pass)
        hidden_states = self.output.product_with(attended, hidden_states)
        gate, up = self.gated.product(self.layer.post_attention_layernorm(hidden_states)).chunk(2, -1)
        return self.down.product_with(F.silu(gate).mul_(up), hidden_states)

    def _attended(
        self, normed: Tensor, position_embeddings: tuple[Tensor, Tensor], cached_pass: PromptPass | TokenPass
    ) -> Tensor:
        """`[B, T, d]` → `[B, T, H·D]`."""
        attention = self.layer.self_attn
        heads = self.together.product(normed).view(*normed.shape[:-1], -1, attention.head_dim).transpose(1, 2)
        num_query = attention.o_proj.in_features // attention.head_dim
        num_rotated = (heads.shape[1] + num_query) // 2
        turned = heads[:, :num_rotated]
        if hasattr(attention, "q_norm"):
            turned = torch.cat((attention.q_norm(heads[:, :num_query]), attention.k_norm(turned[:, num_query:])), 1)
        turned = _rotated(turned, position_embeddings, cached_pass)
        attended, _ = cached_attention(
            attention, turned[:, :num_query], turned[:, num_query:], heads[:, num_rotated:], None, attention.scaling,
            sliding_window=_window(self.layer), cached_pass=cached_pass,
        )  # fmt: skip
        return attended.flatten(-2)


def _window(layer: Any) -> int | None:
    """Mistral's layers take the window from the config, Qwen's have their own, Llama's have none."""
    by_config = type(layer).__name__ == "MistralDecoderLayer"
    window: int | None = getattr(layer.self_attn.config if by_config else layer.self_attn, "sliding_window", None)
    return window


def _rotated(heads: Tensor, position_embeddings: tuple[Tensor, Tensor], cached_pass: PromptPass | TokenPass) -> Tensor:
    """x ⊙ cos + (−x₂, x₁) ⊙ sin, where x₁ and x₂ are the halves of a head (Su et al. 2021). heads `[B, heads, T,
    D]`.
    """
    cosine, sine = position_embeddings
    half = heads.shape[-1] // 2

    def signed() -> Tensor:
        return torch.cat((-sine[..., :half], sine[..., half:]), -1)[:, None]

    swapped = torch.cat((heads[..., half:], heads[..., :half]), -1)
    signed_sine = cached_pass.kept_for_layers("signed sine", signed)
    return torch.addcmul(heads * cosine[:, None], swapped, signed_sine)


@contextmanager
def kernel_layout(model: nn.Module) -> Iterator[None]:
    """Within the context linear layers use weights in the kernel layout, and reading such a weight gives NaN.

    A layer is left unchanged if its format or device does not benefit, or if its weight is shared with a layer other
    than an embedding, part of a larger storage, or mapped from a file. Moving all weights there and back takes 0.1 s
    for 106 M parameters on two cores. A nested `kernel_layout` of the same model does nothing.
    """
    changed: list[PackedWeight | AdaptedWeight | _WrittenOut | _Replaced] = []
    try:
        # Tensors created in inference mode could not be trained later.
        with torch.inference_mode(False), torch.no_grad():
            exclusive, shared = _packable(model)
            # Small, and `AdaptedWeight` reads them.
            exclusive.difference_update(*map(low_rank_layers, model.modules()))
            for module in model.modules():
                groups = linear_layers(module)
                plain_layers = {layer for layer in map(own_layer, itertools.chain(*groups)) if layer is not None}
                if not groups or not exclusive.issuperset(plain_layers):
                    continue
                weights = []
                for group in groups:
                    weights.append(packed(group))
                    changed.append(weights[-1])
                exclusive -= plain_layers
                changed.append(_Replaced(module, DecoderLayer(module, *weights).forward))
            for layer in (*exclusive, *shared):
                weight = PackedWeight([layer], moved=layer in exclusive)
                changed += [weight, _Replaced(layer, weight.product)]
            for codes in _writable(model):
                changed.append(_WrittenOut(codes))
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for one in reversed(changed):
                one.back()


class _Replaced:
    """A module with another forward function: an instance's own `forward` takes precedence over its class's."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._module = module
        module.forward = forward

    def back(self) -> None:
        del self._module.forward


class _WrittenOut:
    """A quantized layer with its weight dequantized to bf16 in the kernel layout. Beyond a few rows this is faster than
    a product with codes, and as fast as the weights before quantization.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        self._layer = layer
        layer.written_out = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to(torch.bfloat16), None)

    def back(self) -> None:
        self._layer.written_out = None


def _writable(model: nn.Module) -> list[QuantizedLinear]:
    """Quantized layers on a CPU that run in bf16 and do not multiply integers."""
    if not has_bf16_kernels():
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


def has_bf16_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


def _packable(model: nn.Module) -> tuple[set[nn.Linear], set[nn.Linear]]:
    """Plain linear layers with a weight of their own, and those that share theirs only with an embedding."""
    exclusive: set[nn.Linear] = set()
    shared: set[nn.Linear] = set()
    if not has_bf16_kernels():
        return exclusive, shared
    users = Counter(id(own) for module in model.modules() for own in vars(module)["_parameters"].values())
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for layer in model.modules():
        if type(layer) is not nn.Linear or "forward" in vars(layer) or not _has_its_own_memory(layer.weight):
            continue
        if users[id(layer.weight)] == 1:
            exclusive.add(layer)
        elif users[id(layer.weight)] == 2 and id(layer.weight) in looked_up:
            shared.add(layer)
    return exclusive, shared


def _has_its_own_memory(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or type(weight.data) is not Tensor:
        return False
    storage = weight.untyped_storage()
    return storage.resizable() and storage.nbytes() == weight.numel() * weight.element_size() and weight.is_contiguous()
