"""Packed attention: many sequences in one flat row of tokens, without pads and without attention between sequences.

The row's `PackedLayout` passes through the model's forward as the argument `packed_layout`. `generation.cache` is the
attention over a key-value cache.
Letters: T tokens of the row, n tokens of a block, H query heads, K key-value heads, r = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from loopos.functional.packing import PackedLayout, additive_mask, allowed_pairs

IMPLEMENTATION = "loopos_packed"
# Above this length saving the probabilities (n² per head) costs more memory than the fused kernel's recomputation costs
# time.
FUSED_FROM = 1024
# Arguments that models pass to their attention and that do not change its result here.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "use_cache", "deterministic", "output_attentions", "output_hidden_states", "output_router_logits"}
    | {"cache_position"}
)


def prompt_runs_once(lengths: Iterable[int], *, on_cpu: bool) -> bool:
    """Whether a prompt runs once for all its responses, where the model allows it: on CPU, while no row is so long that
    the fused kernel takes it. lengths: tokens of each row, the prompt counted once.
    """
    return on_cpu and max(lengths, default=0) < FUSED_FROM


class PackedUnsupported(ValueError):
    """The model's attention needs something that the packed path does not support exactly."""


@dataclass(frozen=True)
class _Plan:
    """How one bundle runs in every layer.

    `query` and `key`: indices of the rows to gather in token-major `[T·H, D]` and `[T·K, D]`. `query_back` and
    `key_back`: rows of the results; pads go to an extra last row. `pads`: `[K·G·r·n, 1]`, True = pad; None without
    pads.
    """

    count: int
    query: Tensor
    key: Tensor
    query_back: Tensor
    key_back: Tensor
    pads: Tensor | None
    mask: Tensor | None


def _plans(
    layout: PackedLayout, groups: int, rows: int, causal: bool, window: int | None, dtype: torch.dtype
) -> list[_Plan]:
    plans = []
    for bundle in layout.bundles():
        query, key = bundle.row_index(groups, rows), bundle.row_index(groups, 1)
        real, key_real = bundle.is_token(groups, rows), bundle.is_token(groups, 1)
        behind, key_behind = layout.num_tokens * groups * rows, layout.num_tokens * groups
        mask = additive_mask(bundle, groups=groups, rows=rows, causal=causal, window=window, dtype=dtype)
        plans.append(
            _Plan(
                count=len(bundle.tokens),
                query=query,
                key=key,
                query_back=query if real is None else torch.where(real, query, behind),
                key_back=key if key_real is None else torch.where(key_real, key, key_behind),
                pads=None if real is None else ~real[:, None],
                mask=mask,
            )
        )
    return plans


def _token_major(heads_first: Tensor) -> Tensor:
    """`[H, T, D]` → `[T·H, D]`: a view if the memory is token-major already, as transformers leaves it."""
    return heads_first.transpose(0, 1).reshape(-1, heads_first.shape[-1])


class _BundledAttention(torch.autograd.Function):
    """softmax(scale·QKᵀ + mask)·V over bundles of sequences of similar length; saves the probabilities for the backward
    pass.

    On CPU this is faster than one fused kernel call per sequence, whose backward pass is slow for short sequences. The
    r query heads of a key-value head are folded into rows, so that grouped keys are not repeated. Pads exist only
    inside a bundle, are masked, and get no gradient.
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
        plans = layout.cached(
            ("plans", groups, rows, causal, window, query.dtype),
            lambda: _plans(layout, groups, rows, causal, window, query.dtype),
        )
        queries, keys, values = _token_major(query), _token_major(key), _token_major(value)
        out = query.new_empty(num_tokens * num_heads + 1, size)
        saved: list[Tensor] = []
        for plan in plans:
            batch = groups * plan.count
            q = queries.index_select(0, plan.query).view(batch, -1, size)
            k = keys.index_select(0, plan.key).view(batch, -1, size)
            v = values.index_select(0, plan.key).view(batch, -1, size)
            if plan.mask is None:
                scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
            else:
                scores = torch.baddbmm(plan.mask, q, k.transpose(1, 2), alpha=scale)
            probabilities = torch.softmax(scores, -1)
            out.index_copy_(0, plan.query_back, torch.bmm(probabilities, v).view(-1, size))
            saved += [q, k, v, probabilities]
        ctx.save_for_backward(*saved)
        ctx.plans, ctx.scale, ctx.shape = plans, scale, (num_heads, groups, num_tokens, size)
        return out[:-1].view(num_tokens, num_heads, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        num_heads, groups, num_tokens, size = ctx.shape
        saved = ctx.saved_tensors
        gradients = gradient.reshape(-1, size)
        d_query = gradient.new_empty(num_tokens * num_heads + 1, size)
        d_key = gradient.new_empty(num_tokens * groups + 1, size)
        d_value = torch.empty_like(d_key)
        for number, plan in enumerate(ctx.plans):
            q, k, v, probabilities = saved[4 * number : 4 * number + 4]
            d_out = gradients.index_select(0, plan.query)
            if plan.pads is not None:
                d_out.masked_fill_(plan.pads, 0.0)
            d_out = d_out.view(q.shape)
            d_scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(d_out, v.transpose(1, 2)), probabilities, -1, probabilities.dtype
            ).mul_(ctx.scale)
            d_value.index_copy_(0, plan.key_back, torch.bmm(probabilities.transpose(1, 2), d_out).view(-1, size))
            d_query.index_copy_(0, plan.query_back, torch.bmm(d_scores, k).view(-1, size))
            d_key.index_copy_(0, plan.key_back, torch.bmm(d_scores.transpose(1, 2), q).view(-1, size))
        heads_first = [flat[:-1].view(num_tokens, -1, size).transpose(0, 1) for flat in (d_query, d_key, d_value)]
        return *heads_first, None, None, None, None


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
    """Each sequence separately, `[T, H, D]`: for dropout, soft-capped scores, long sequences, and devices without a
    kernel for packed rows.
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
    **options: object,
) -> tuple[Tensor, None]:
    """Attention within each sequence of a packed row, with the signature of transformers' `AttentionInterface`.

    query `[1, H, T, D]`, key and value `[1, K, T, D]` → `[1, T, H, D]`. Raises `PackedUnsupported` if the model needs
    more than softmax attention with a causal or two-sided band (attention sinks, a bias, cross-attention …), so that
    the caller can use the padded path.
    """
    assert packed_layout is not None, "the packed attention was called without packed_layout"
    extra = sorted(name for name, value in options.items() if value is not None and name not in _WITHOUT_EFFECT)
    if extra or attention_mask is not None:
        raise PackedUnsupported(f"its attention needs {', '.join(extra) or 'an explicit mask'}")
    if query.shape[2] != packed_layout.num_tokens or key.shape[2] != packed_layout.num_tokens:
        raise PackedUnsupported("its attention is not over the tokens of the row")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query[0], key[0], value[0]
    plain = softcap is None and dropout == 0.0
    on_cpu = plain and q.device.type == "cpu" and max(packed_layout.lengths) < FUSED_FROM
    if packed_layout.segments is not None and not (on_cpu and causal and sliding_window is None):
        raise PackedUnsupported("continuations of a shared prefix need plain causal attention on CPU")
    if on_cpu:
        bundled: Callable[..., Tensor] = _BundledAttention.apply
        out = bundled(q, k, v, packed_layout, scale, causal, sliding_window)
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
