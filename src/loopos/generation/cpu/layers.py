"""A decoder layer of the Llama kind in few kernels: a step of few rows spends a third of its time between products.

Enters: a layer of a model whose attention is our cache's, and its weights, packed. Leaves: what the layer's own
forward gives, up to rounding in bf16. Left out: packing (`packed_weight.py`); all other kinds of layers, which run as
transformers writes them.
Letters: B rows, T new tokens of each, H query heads, K key-value heads, D head size, d hidden features.

Weights in the layout of the CPU's matrix kernels, for as long as generation lasts.

Enters: a model whose linear layers hold bf16 weights on a CPU. Leaves: the same layers, with each weight moved into
the blocks that oneDNN multiplies by, instead of being reordered anew in every product, and decoder layers of the Llama
kind in fewer kernels. Afterwards the weights are bit for bit what and where they were. A weight's memory is given back
as it is moved, so that there is one copy at any time; only an output layer that is tied to the embedding, whose rows
are still looked up, is copied for as long. Weights in codes are written out beside their codes, and forgotten
afterwards. Left out: when it pays, and whether the logits stay the same (`decode_path.py`).
Letters: K input features, N output features.
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

# Layers of transformers that are, in this order: norm, attention with rotary positions, residual, norm, gated unit,
# residual. Others may have the same parts and other formulas between them.
_CLASSES = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_SWISH = frozenset({"SiLU", "SiLUActivation"})
_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def linear_layers(module: nn.Module) -> list[list[nn.Module]]:
    """The layers whose weights a `DecoderLayer` of this module takes, in its order, plain or under LoRA; of another
    kind of module none.
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

    `together`: the weights of query, key and value; `gated`: of gate and up.
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
        """`[B, T, d]` → `[B, T, d]`; cosine and sine of the positions `[B, T, D]`."""
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
    """Mistral's layers have one window, in the config; Qwen's have each its own; Llama's none."""
    by_config = type(layer).__name__ == "MistralDecoderLayer"
    window: int | None = getattr(layer.self_attn.config if by_config else layer.self_attn, "sliding_window", None)
    return window


def _rotated(heads: Tensor, position_embeddings: tuple[Tensor, Tensor], cached_pass: PromptPass | TokenPass) -> Tensor:
    """x ⊙ cos + (−x₂, x₁) ⊙ sin, x₁ and x₂ the halves of a head (Su et al. 2021). heads `[B, heads, T, D]`."""
    cosine, sine = position_embeddings
    half = heads.shape[-1] // 2

    def signed() -> Tensor:
        return torch.cat((-sine[..., :half], sine[..., half:]), -1)[:, None]

    swapped = torch.cat((heads[..., half:], heads[..., :half]), -1)
    signed_sine = cached_pass.kept_for_layers("signed sine", signed)
    return torch.addcmul(heads * cosine[:, None], swapped, signed_sine)


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
