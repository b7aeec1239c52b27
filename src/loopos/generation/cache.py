"""The key-value cache, and attention over it. Each row's keys and values start at column 0, so no row has pads.

Letters: R rows of the cache, B rows that decode, K key-value heads, H query heads, r = H / K, D head size, C columns of
capacity, S columns in use, T new tokens, n new tokens of one row, m = earlier columns + n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from loopos.functional.packing import PackedLayout
from loopos.models.attention import packed_attention

IMPLEMENTATION = "loopos_cached"
# Capacity grows by this many columns: each growth copies the cache; the products below read whole buffers without a
# copy.
GROUP = 32
# From this many key matrices on, two batched products are faster than the CPU's fused kernel (measured at 96
# columns: 192 matrices 0.82 and 1.35 ms a layer, 48 matrices 0.30 and 0.34, 12 matrices 0.17 and 0.09).
_PRODUCTS_FROM = 32
_NEVER = float("-inf")


class KeyValueCache:
    """Keys and values `[R, K, C, D]` of every attention layer. A layer is allocated at its first write."""

    def __init__(self) -> None:
        self.num_rows, self.num_columns = 0, 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer; `like` `[·, K, ·, D]` gives the sizes of a new layer."""
        if index not in self.layers:
            shape = (self.num_rows, like.shape[1], self.num_columns, like.shape[3])
            # Zeros, because a masked column still contributes 0 · value.
            self.layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[index]

    def make_room(self, num_rows: int, num_columns: int) -> None:
        """Grows the buffers to at least this many rows and columns."""
        more_rows = max(0, num_rows - self.num_rows)
        more_columns = max(0, -(-num_columns // GROUP) * GROUP - self.num_columns)
        if not more_rows and not more_columns:
            return
        self.num_rows, self.num_columns = self.num_rows + more_rows, self.num_columns + more_columns
        added = (0, 0, 0, more_columns, 0, 0, 0, more_rows)
        for index, (keys, values) in self.layers.items():
            self.layers[index] = (F.pad(keys, added), F.pad(values, added))

    def copy(self, source: int, target: int, columns: slice) -> None:
        """Copies columns of one row to another."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :, columns] = buffer[source, :, columns]

    def select(self, sources: Sequence[int], columns: slice) -> None:
        """Row i gets these columns of row sources[i], all at once."""
        targets = [target for target, source in enumerate(sources) if source != target]
        taken = [sources[target] for target in targets]
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[targets, :, columns] = buffer[taken, :, columns]


@dataclass(frozen=True)
class Scoring:
    """scale · QKᵀ, then with a `softcap` c: c · tanh(scores / c); columns `window` or more back are masked."""

    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class _Pass:
    """One forward over new tokens. `rows`, `columns` `[T]`: cache position of each."""

    cache: KeyValueCache
    rows: Tensor
    columns: Tensor
    _shared: dict[object, Tensor] = field(default_factory=dict, repr=False, compare=False, init=False)

    def kept_for_layers(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """The result of `make`, computed once per forward and shared by all layers."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def slots(self, num_heads: int) -> Tensor:
        """Index of every new token and head in a buffer of `[R · K · C, D]`, `[T, K]`."""
        heads = torch.arange(num_heads, device=self.rows.device)[None]
        return (self.rows[:, None] * num_heads + heads) * self.cache.num_columns + self.columns[:, None]

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new tokens' heads, in the order of `slots`, to the layer's buffers and returns the buffers."""
        buffers = self.cache.layer(layer, key)
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, slots, new.reshape(-1, new.shape[-1]))
        return buffers


@dataclass(frozen=True)
class PromptPass(_Pass):
    """One forward over new tokens of several rows, packed without pads.

    `layout`: number of new tokens of each sequence. `targets`: its row. `starts`: columns that the row already has.
    """

    layout: PackedLayout
    targets: tuple[int, ...]
    starts: tuple[int, ...]

    @staticmethod
    def of(cache: KeyValueCache, layout: PackedLayout, targets: Sequence[int], starts: Sequence[int]) -> PromptPass:
        lengths = layout.lengths_tensor()
        rows, first = (torch.tensor(values, device=layout.device) for values in (targets, starts))
        columns = layout.positions() + first.repeat_interleave(lengths)
        return PromptPass(cache, rows.repeat_interleave(lengths), columns, layout, tuple(targets), tuple(starts))

    def keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes key and value `[1, K, T, D]` to the cache; returns the layer's buffers."""
        groups = key.shape[1]
        slots = self.kept_for_layers(("slots", groups), lambda: self.slots(groups).t().reshape(-1))
        return self.write(layer, key, value, slots)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        """Attention of each row's new tokens over its columns, row by row. query `[1, H, T, D]` → `[1, T, H, D]`."""
        outputs, first = [], 0
        for row, start, length in zip(self.targets, self.starts, self.layout.lengths, strict=True):
            heads = query[:, :, first : first + length]
            row_keys, row_values = (buffer[row, None, :, : start + length] for buffer in (keys, values))
            outputs.append(self._attend_row(heads, row_keys, row_values, scoring, start).transpose(1, 2))
            first += length
        return torch.cat(outputs, 1)

    def _attend_row(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, start: int) -> Tensor:
        groups, length = keys.shape[1], query.shape[2]
        rows = query.reshape(1, groups, -1, query.shape[-1])
        repeats = query.shape[1] // groups

        def mask() -> Tensor:
            columns = torch.arange(start + length, device=query.device)
            band = _mask(columns[start:], columns, scoring.window, query.dtype)
            return band.repeat(repeats, 1)[None, None]

        band_mask = self.kept_for_layers((start, length, scoring.window, repeats, query.dtype), mask)
        if scoring.softcap is None:
            return _fused(rows, keys, values, band_mask, scoring.scale).view(query.shape)
        return _products(rows, keys, values, _bias(band_mask, groups, rows.shape[2]), scoring).view(query.shape)


@dataclass(frozen=True)
class TokenPass(_Pass):
    """One forward over one new token in each of the first B rows. `span`: columns in use, including the new ones."""

    span: int

    @staticmethod
    def of(cache: KeyValueCache, columns: Tensor, longest: int) -> TokenPass:
        """`columns` `[B]`: columns of the new tokens. `longest`: the maximum number of columns of a row after the
        pass.
        """
        rows = torch.arange(len(columns), device=columns.device)
        return TokenPass(cache, rows, columns, min(cache.num_columns, -(-longest // GROUP) * GROUP))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query `[B, H, 1, D]`, key and value `[B, K, 1, D]` → `[B, 1, H, D]`."""
        num_rows, groups = key.shape[:2]
        slots = self.kept_for_layers(("slots", groups), lambda: self.slots(groups).view(-1))
        keys, values = (buffer[:num_rows, :, : self.span] for buffer in self.write(layer, key, value, slots))
        rows = query.view(num_rows, groups, -1, query.shape[-1])
        if scoring.softcap is None and (query.device.type != "cpu" or num_rows * groups < _PRODUCTS_FROM):
            out = _fused(rows, keys, values, self._hidden(scoring.window, query.dtype), scoring.scale)
        else:
            bias = self.kept_for_layers(
                ("bias", groups, rows.shape[2], scoring.window, query.dtype),
                lambda: _bias(self._hidden(scoring.window, query.dtype), groups, rows.shape[2]),
            )
            out = _products(rows, keys, values, bias, scoring)
        return out.reshape(num_rows, 1, query.shape[1], values.shape[-1])

    def _hidden(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask `[B, 1, 1, S]`."""

        def mask() -> Tensor:
            columns = torch.arange(self.span, device=self.columns.device)
            return _mask(self.columns, columns, window, dtype)[:, None, None]

        return self.kept_for_layers(("mask", window, dtype), mask)


def _mask(positions: Tensor, columns: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask `[positions, columns]`: −inf for later columns, and for those `window` or more back."""
    hidden = columns[None] > positions[:, None]
    if window is not None:
        hidden |= columns[None] <= positions[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, _NEVER)


def _bias(mask: Tensor, groups: int, num_rows: int) -> Tensor:
    """A mask `[B, 1, M or 1, m]` in the shape that `_products` adds, `[B · K, m, M]`."""
    count, columns = mask.shape[0], mask.shape[-1]
    return mask.transpose(2, 3).expand(count, groups, columns, num_rows).reshape(-1, columns, num_rows)


def _fused(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale · QKᵀ + mask) · V. Query heads that share keys are rows `[B, K, M, D]`, so that no key is repeated;
    keys and values `[B, K, m, D]` → `[B, K, M, D]`.
    """
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)


def _products(rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scoring: Scoring) -> Tensor:
    """The same as `_fused` with two batched products and an optional soft cap. bias `[B · K, m, M]`."""
    # Keys come first: oneDNN reorders the second factor, which should be the small one.
    large, small = keys.flatten(0, 1), rows.flatten(0, 1).transpose(1, 2)
    if scoring.softcap is None:
        scores = torch.baddbmm(bias, large, small, alpha=scoring.scale)
    else:
        scores = torch.tanh(torch.bmm(large, small) * (scoring.scale / scoring.softcap)) * scoring.softcap + bias
    attended = torch.bmm(torch.softmax(scores.transpose(1, 2), -1), values.flatten(0, 1))
    return attended.view(*rows.shape[:3], values.shape[-1])


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
    **extra: object,
) -> tuple[Tensor, None]:
    """Attention of new tokens over a row's cache and themselves, with the signature of transformers'
    `AttentionInterface`.

    Packed tokens `[1, H, T, D]` → `[1, T, H, D]`, or one token per row `[B, H, 1, D]` → `[B, 1, H, D]`. Raises
    `PackedUnsupported` if the model needs more than causal softmax attention.
    """
    assert cached_pass is not None, "the cached attention was called without cached_pass"
    layer = getattr(module, "layer_idx", None)
    assert isinstance(layer, int), "an attention layer without layer_idx"
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    if isinstance(cached_pass, TokenPass):
        return cached_pass.attend(layer, query, key, value, scoring), None
    keys, values = cached_pass.keep(layer, key, value)
    if any(cached_pass.starts):
        return cached_pass.attend(query, keys, values, scoring), None
    return packed_attention(
        module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, is_causal,
        packed_layout=cached_pass.layout, **extra,
    )  # fmt: skip


def _no_mask(*_arguments: object, **_named: object) -> None:
    """The pass knows the columns of every row, so no mask is built."""


AttentionInterface.register(IMPLEMENTATION, cached_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
