"""Keys and values of the tokens so far, and the attention over them.

Enters: transformers' query, key and value of the tokens that are new. Leaves: the attention output; the new keys and
values are kept, each row's at its own columns from 0, so that no row has pads. Left out: which row holds which prompt
(`rows.py`).
Letters: R rows that the cache has room for, B rows that decode, K key-value heads, H query heads, r = H / K, D head
size, C columns of room, S columns in use, T tokens of a packed row, n new tokens of a row, m = columns before + n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from loopos.functional.packing import PackedLayout
from loopos.models.attention import packed_attention

IMPLEMENTATION = "loopos_cached"
# Columns are attended to in groups: shapes that stay for a while let the kernels be found again.
GROUP = 32
# From so many matrices of keys on, two batched products are faster than the fused kernel of a CPU (measured: 1.35 and
# 0.82 ms a layer at 192 matrices of 96 columns; at 3 matrices 0.05 and 0.12).
_PRODUCTS_FROM = 32
_NEVER = float("-inf")


class KeyValueCache:
    """Keys and values `[R, K, C, D]` of every attention layer. Layers appear when they first write."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.num_rows, self.num_columns = num_rows, _up(num_columns)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer; `like` `[1, K, T, D]` gives a new layer its sizes."""
        if index not in self.layers:
            shape = (self.num_rows, like.shape[1], self.num_columns, like.shape[3])
            # Zeros, since a masked column still takes part as 0 · value.
            self.layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[index]

    def make_room(self, num_columns: int) -> None:
        """Room for at least so many columns a row; grows by half or more."""
        if num_columns <= self.num_columns:
            return
        added = _up(max(num_columns, self.num_columns * 3 // 2)) - self.num_columns
        self.num_columns += added
        for index, (keys, values) in self.layers.items():
            self.layers[index] = (F.pad(keys, (0, 0, 0, added)), F.pad(values, (0, 0, 0, added)))

    def copy(self, source: int, target: int, columns: slice) -> None:
        """Columns of one row over those of another."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :, columns] = buffer[source, :, columns]

    def select(self, sources: Sequence[int], columns: slice) -> None:
        """Row i gets these columns of row sources[i], all at once."""
        targets = [target for target, source in enumerate(sources) if source != target]
        if not targets:
            return
        taken = torch.tensor([sources[target] for target in targets])
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[targets, :, columns] = buffer[:, :, columns][taken.to(buffer.device)]


def _up(columns: int) -> int:
    return -(-columns // GROUP) * GROUP


@dataclass(frozen=True)
class PromptPass:
    """One forward over new tokens of several rows, packed without pads.

    `layout`: how many new tokens each sequence has; `rows`: the cache row it goes to; `starts`: the columns that the
    row holds already.
    """

    cache: KeyValueCache
    layout: PackedLayout
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    _kept: dict[object, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def positions(self) -> Tensor:
        """`[T]`: the column of every new token."""
        places = zip(self.starts, self.layout.lengths, strict=True)
        return torch.cat([torch.arange(start, start + length) for start, length in places]).to(self.layout.device)

    def _slots(self, num_heads: int) -> Tensor:
        """Places of the new tokens in a buffer of `[R · K · C, D]`, `[K · T]`."""
        if ("slots", num_heads) not in self._kept:
            lengths = self.layout.lengths_tensor()
            rows = torch.tensor(self.rows, device=lengths.device).repeat_interleave(lengths)
            heads = torch.arange(num_heads, device=lengths.device)[:, None]
            slots = (rows[None] * num_heads + heads) * self.cache.num_columns + self.positions()[None]
            self._kept["slots", num_heads] = slots.reshape(-1)
        return self._kept["slots", num_heads]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value `[1, K, T, D]` into the layer's buffers, which it returns."""
        buffers = self.cache.layer(layer, key)
        slots = self._slots(key.shape[1])
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, slots, new.reshape(-1, new.shape[-1]))
        return buffers

    def continued(
        self, query: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attention of new tokens over their row's columns, sequence by sequence. query `[H, T, D]` → `[T, H, D]`."""
        outputs, first = [], 0
        for row, start, length in zip(self.rows, self.starts, self.layout.lengths, strict=True):
            end = start + length
            mask = self._band(start, length, window, query.dtype)
            attended = _attend(
                query[None, :, first : first + length], keys[row, None, :, :end], values[row, None, :, :end], mask,
                scale=scale, softcap=softcap,
            )  # fmt: skip
            outputs.append(attended[0].transpose(0, 1))
            first += length
        return torch.cat(outputs)

    def _band(self, start: int, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask `[1, 1, n, m]`: no later column, and none `window` or more columns back."""
        key = ("band", start, length, window, dtype)
        if key not in self._kept:
            device = self.layout.device
            queries = torch.arange(start, start + length, device=device)[:, None]
            columns = torch.arange(start + length, device=device)[None]
            hidden = columns > queries
            if window is not None:
                hidden |= columns <= queries - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, _NEVER)
            self._kept[key] = mask[None, None]
        return self._kept[key]


@dataclass(frozen=True)
class TokenPass:
    """One forward over one new token in each of the first B rows. `columns` `[B]`: where it goes; `span`: the columns
    in use, the new ones included.
    """

    cache: KeyValueCache
    columns: Tensor
    span: int
    _kept: dict[object, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query `[B, H, 1, D]`, key and value `[B, K, 1, D]` → `[B, 1, H, D]`."""
        buffers = self.cache.layer(layer, key)
        slots = self._slots(key.shape[1])
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, slots, new.reshape(-1, new.shape[-1]))
        keys, values = (buffer[: len(query), :, : self.span] for buffer in buffers)
        attended = _attend(query, keys, values, self._mask(window, query.dtype), scale=scale, softcap=softcap)
        return attended.transpose(1, 2)

    def _slots(self, num_heads: int) -> Tensor:
        if ("slots", num_heads) not in self._kept:
            rows = torch.arange(len(self.columns) * num_heads, device=self.columns.device).view(-1, num_heads)
            slots = rows * self.cache.num_columns + self.columns[:, None]
            self._kept["slots", num_heads] = slots.reshape(-1)
        return self._kept["slots", num_heads]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask `[B, 1, 1, S]`."""
        key = ("mask", window, dtype)
        if key not in self._kept:
            last = self.columns[:, None]
            columns = torch.arange(self.span, device=last.device)[None]
            hidden = columns > last
            if window is not None:
                hidden |= columns <= last - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=last.device).masked_fill_(hidden, _NEVER)
            self._kept[key] = mask[:, None, None]
        return self._kept[key]


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """softmax(scale · QKᵀ + mask) · V with grouped heads; with a soft cap c the scores are c · tanh(scores / c) first.

    query `[B, H, n, D]`, keys and values `[B, K, m, D]`, mask `[B or 1, 1, n, m]` → `[B, H, n, D]`. The r query heads
    of a group are folded into rows `[B, K, r·n, D]`, so that grouped keys are never repeated.
    """
    groups = keys.shape[1]
    rows = query.reshape(len(query), groups, -1, query.shape[-1])
    if query.shape[2] > 1:
        mask = mask.repeat(1, 1, query.shape[1] // groups, 1)
    if softcap is None and (keys.device.type != "cpu" or len(keys) * groups < _PRODUCTS_FROM):
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    else:
        # Keys come first, since the kernel reorders the second factor, which here is the small one.
        scores = torch.bmm(keys.flatten(0, 1), rows.flatten(0, 1).transpose(1, 2)).transpose(1, 2)
        if softcap is not None:
            scores = torch.tanh(scores * (scale / softcap)) * (softcap / scale)
        scores = torch.add(mask, scores.view(*rows.shape[:3], -1), alpha=scale)
        attended = torch.bmm(torch.softmax(scores, -1).flatten(0, 1), values.flatten(0, 1))
    return attended.reshape(*query.shape[:3], values.shape[-1])


def cached_attention(
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
    cached_pass: PromptPass | TokenPass | None = None,
    **asked: object,
) -> tuple[Tensor, None]:
    """Attention of new tokens over a row's cache and themselves; the signature is transformers' `AttentionInterface`.

    A pass over tokens packed as `[1, H, T, D]`, or over one token a row, `[B, H, 1, D]` → `[1, T, H, D]` or
    `[B, 1, H, D]`. Raises `PackedUnsupported` where the model asks for more than causal softmax attention.
    """
    assert cached_pass is not None, "the cached attention was called without cached_pass"
    layer = getattr(module, "layer_idx", None)
    assert isinstance(layer, int), "an attention layer without its number"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(cached_pass, TokenPass):
        return cached_pass.attend(layer, query, key, value, scale=scale, window=sliding_window, softcap=softcap), None
    keys, values = cached_pass.write(layer, key, value)
    if any(cached_pass.starts):
        out = cached_pass.continued(query[0], keys, values, scale=scale, window=sliding_window, softcap=softcap)
        return out[None], None
    return packed_attention(
        module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, is_causal,
        packed_layout=cached_pass.layout, **asked,
    )  # fmt: skip


def _no_mask(*_arguments: object, **_named: object) -> None:
    """The pass knows the columns of every row, so no mask is built."""


AttentionInterface.register(IMPLEMENTATION, cached_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
