"""Packed attention: many sequences in one flat row of tokens, no pads, no cross-talk.

Enters: transformers' query, key and value `[1, H, T, D]` and the `PackedLayout` of the row, which travels as the
keyword `packed_layout` through the model's forward. Leaves: the attention output `[1, T, H, D]`. Left out: attention
over a key-value cache.
Letters: T tokens of the row, n tokens of a block, H query heads, K key-value heads, r = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from loopos.functional.packing import PackedLayout, allowed_pairs

IMPLEMENTATION = "loopos_packed"
# Above this length the saved probabilities (n² a head) cost more memory than the fused kernel's recomputation costs
# time.
FUSED_FROM = 1024
# Keywords that models hand to their attention and that do not change its result here.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "use_cache", "deterministic", "output_attentions", "output_hidden_states", "cache_position"}
)


class PackedUnsupported(ValueError):
    """The model asks its attention for something that the packed path cannot serve exactly."""


class _BlockAttention(torch.autograd.Function):
    """softmax(scale·QKᵀ + mask)·V of every block, keeping the probabilities for the backward pass.

    On CPU this is faster than one fused kernel call a sequence, whose backward is slow for short rows. The r query
    heads that share a key-value head are folded into rows, so that grouped keys are never repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackedLayout,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        num_heads, num_tokens, size = query.shape
        groups = key.shape[0]
        rows = num_heads // groups
        out = torch.empty(num_tokens, num_heads, size, dtype=query.dtype, device=query.device)
        kept: list[Tensor] = []
        for start, lengths in layout.blocks():
            n = sum(lengths)
            place = slice(start, start + n)
            q = query[:, place].reshape(groups, rows * n, size)
            k, v = key[:, place].contiguous(), value[:, place].contiguous()
            mask = layout.mask(lengths, causal=causal, window=window, rows=rows, dtype=query.dtype)
            scores = (
                torch.bmm(q, k.transpose(1, 2)).mul_(scale)
                if mask is None
                else torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
            )
            probabilities = torch.softmax(scores, -1)
            out[place].view(n, groups, rows, size).copy_(
                torch.bmm(probabilities, v).view(groups, rows, n, size).permute(2, 0, 1, 3)
            )
            kept += [q, k, v, probabilities]
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale, ctx.shape = layout, scale, (num_heads, groups, num_tokens, size)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        num_heads, groups, num_tokens, size = ctx.shape
        rows = num_heads // groups
        kept = ctx.saved_tensors
        d_query = torch.empty(num_heads, num_tokens, size, dtype=gradient.dtype, device=gradient.device)
        d_key = torch.empty(groups, num_tokens, size, dtype=gradient.dtype, device=gradient.device)
        d_value = torch.empty_like(d_key)
        for index, (start, lengths) in enumerate(ctx.layout.blocks()):
            n = sum(lengths)
            place = slice(start, start + n)
            q, k, v, probabilities = kept[4 * index : 4 * index + 4]
            d_out = gradient[place].view(n, groups, rows, size).permute(1, 2, 0, 3).reshape(groups, rows * n, size)
            d_scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(d_out, v.transpose(1, 2)), probabilities, -1, probabilities.dtype
            )
            d_value[:, place] = torch.bmm(probabilities.transpose(1, 2), d_out)
            d_query[:, place] = torch.bmm(d_scores, k).mul_(ctx.scale).view(num_heads, n, size)
            d_key[:, place] = torch.bmm(d_scores.transpose(1, 2), q).mul_(ctx.scale)
        return d_query, d_key, d_value, None, None, None, None


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Every sequence by itself, `[T, H, D]`: the road of dropout, soft-capped scores, long sequences and devices
    without a kernel for packed rows.
    """
    outputs = []
    rows = query.shape[0] // key.shape[0]
    for start, length in zip(layout.starts().tolist(), layout.lengths, strict=True):
        q, k, v = (tensor[:, start : start + length] for tensor in (query, key, value))
        if softcap is None:
            mask = (
                allowed_pairs((length,), causal=causal, window=window, device=q.device)
                if window is not None and window < length
                else None
            )
            attended = F.scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                attn_mask=mask,
                is_causal=causal and mask is None,
                scale=scale,
                dropout_p=dropout,
                enable_gqa=rows > 1,
            )[0]
        else:
            allowed = allowed_pairs((length,), causal=causal, window=window, device=q.device)
            scores = torch.tanh(q @ k.repeat_interleave(rows, 0).transpose(1, 2) * (scale / softcap)) * softcap
            probabilities = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1, dtype=torch.float32).to(
                q.dtype
            )
            attended = F.dropout(probabilities, dropout) @ v.repeat_interleave(rows, 0)
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, *, scale: float, causal: bool, window: int | None
) -> Tensor:
    """Torch's variable-length flash kernel on CUDA in half precision, `[T, H, D]`."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    boundaries, longest = layout.boundaries(), max(layout.lengths)
    attended = varlen_attn(
        query.transpose(0, 1).contiguous(),
        key.transpose(0, 1).contiguous(),
        value.transpose(0, 1).contiguous(),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scale,
        window_size=(left, 0 if causal else left),
        enable_gqa=query.shape[0] != key.shape[0],
    )
    assert isinstance(attended, Tensor)
    return attended


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    packed_layout: PackedLayout | None = None,
    **asked: object,
) -> tuple[Tensor, None]:
    """Attention within each sequence of a packed row; the signature is transformers' `AttentionInterface`.

    query `[1, H, T, D]`, key and value `[1, K, T, D]` → `[1, T, H, D]`. Raises `PackedUnsupported` where the model
    asks for more than softmax attention with a causal or two-sided band (attention sinks, a bias, cross-attention …),
    so that a caller can take the padded path.
    """
    assert packed_layout is not None, "the packed attention was called without packed_layout"
    extra = sorted(name for name, value in asked.items() if value is not None and name not in _WITHOUT_EFFECT)
    if extra or attention_mask is not None:
        raise PackedUnsupported(f"its attention needs {', '.join(extra) or 'an explicit mask'}")
    if query.shape[2] != packed_layout.num_tokens or key.shape[2] != packed_layout.num_tokens:
        raise PackedUnsupported("its attention is not over the tokens of the row")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query[0], key[0], value[0]
    plain = softcap is None and dropout == 0.0
    if plain and q.device.type == "cpu" and max(packed_layout.lengths) < FUSED_FROM:
        blocks: Callable[..., Tensor] = _BlockAttention.apply
        out = blocks(q, k, v, packed_layout, scale, causal, sliding_window)
    elif plain and q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        out = _variable_length(q, k, v, packed_layout, scale=scale, causal=causal, window=sliding_window)
    else:
        out = _one_by_one(
            q, k, v, packed_layout, scale=scale, causal=causal, window=sliding_window, softcap=softcap, dropout=dropout
        )
    return out[None], None


def _no_mask(*_arguments: object, **_named: object) -> None:
    """Packed attention knows its sequences from the layout, so no mask is built."""


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
