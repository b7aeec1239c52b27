"""A decoder layer of the Llama kind in few kernels: a step of few rows spends a third of its time between products.

Enters: a layer of a model whose attention is our cache's, and its weights, packed. Leaves: what the layer's own
forward gives, up to rounding in bf16. Left out: packing (`packed_weight.py`); all other kinds of layers, which run as
transformers writes them.
Letters: B rows, T new tokens of each, H query heads, K key-value heads, D head size, d hidden features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopos.generation.adapted_weight import AdaptedWeight, own_layer
from loopos.generation.cache import PromptPass, TokenPass, cached_attention
from loopos.generation.packed_weight import PackedWeight

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
