"""The layout of a packed row: where its sequences are, and which token attends to which.

A sequence may be a shared prefix with several continuations; each continuation attends to the prefix and itself only.
Letters: T tokens of the row, N sequences, H heads, K groups of r heads each that share a key and value; a bundle is G
sequences of similar length, each padded to n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Value = TypeVar("_Value")

# Attention scores that a bundle may waste on pads before a new one starts: another bundle costs about as much time in
# kernel launches as this many scores per head.
WASTED_SCORES = 4096


@dataclass(frozen=True)
class Bundle:
    """Sequences of similar length for one batched attention product, padded on the right to the longest.

    `tokens` `[G, n]`: index of each token in the row; pads repeat the sequence's last token. `real` `[G, n]` bool:
    True = a token, False = a pad; None if there are no pads. `continuation` `[G, n]`: number of each token's
    continuation, 0 = the shared prefix; None without continuations.
    """

    tokens: Tensor
    real: Tensor | None
    continuation: Tensor | None = None

    def row_index(self, groups: int, rows: int) -> Tensor:
        """Index into token-major rows `[T·H, D]` of every (group, sequence, head in group, token), `[K·G·r·n]`."""
        heads = torch.arange(groups * rows, device=self.tokens.device).view(groups, 1, rows, 1)
        return (self.tokens[None, :, None, :] * (groups * rows) + heads).reshape(-1)

    def is_token(self, groups: int, rows: int) -> Tensor | None:
        """Which entries of `row_index` are tokens, `[K·G·r·n]` bool; None if all are."""
        if self.real is None:
            return None
        return self.real[None, :, None, :].expand(groups, -1, rows, -1).reshape(-1)


@dataclass(frozen=True)
class PackedLayout:
    """Where each sequence of a flat row of tokens starts and ends.

    `lengths`: tokens of each sequence, in order, each >= 1. Their sum is T. `segments`: for each sequence the
    lengths of its shared prefix and of the continuations, each as if it followed the prefix directly; None if no
    sequence has a shared prefix.
    """

    lengths: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    segments: tuple[tuple[int, ...], ...] | None = None
    _cache: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.lengths, "a row without sequences"
        assert min(self.lengths) >= 1, self.lengths
        assert self.segments is None or tuple(map(sum, self.segments)) == self.lengths, self.segments

    @classmethod
    def of_shared_prefixes(cls, segments: Sequence[tuple[int, ...]], device: torch.device) -> PackedLayout:
        """Sequences of a shared prefix (the first length) and its continuations."""
        return cls(tuple(map(sum, segments)), device, tuple(segments))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def positions(self) -> Tensor:
        """Positions `[T]`; they restart at 0 in each sequence, and after the prefix in each continuation."""
        if self.segments is None:
            runs = [torch.arange(length) for length in self.lengths]
        else:
            runs = [
                torch.arange(first, first + length)
                for prefix, *rest in self.segments
                for first, length in ((0, prefix), *((prefix, continuation) for continuation in rest))
            ]
        return torch.cat(runs).to(self.device)

    def lengths_tensor(self) -> Tensor:
        """`[N]`, int64."""
        return torch.tensor(self.lengths, device=self.device)

    def ends(self) -> Tensor:
        """Index of the last token of each sequence, `[N]`."""
        return self.lengths_tensor().cumsum(0) - 1

    def last_tokens(self) -> Tensor:
        """Index of the last token of each sequence, or of each continuation if there are any, in order."""
        if self.segments is None:
            return self.ends()
        ends = torch.tensor([length for parts in self.segments for length in parts]).cumsum(0) - 1
        is_continuation = torch.tensor([index > 0 for parts in self.segments for index in range(len(parts))])
        return ends[is_continuation].to(self.device)

    def starts(self) -> Tensor:
        """Index of the first token of each sequence, `[N]`."""
        return self.ends() - self.lengths_tensor() + 1

    def boundaries(self) -> Tensor:
        """Cumulative lengths with a leading 0, `[N + 1]`, int32: what variable-length kernels call `cu_seqlens`."""
        return F.pad(self.lengths_tensor().cumsum(0), (1, 0)).to(torch.int32)

    def bundles(self) -> list[Bundle]:
        """Every sequence once, longest first, in bundles of similar length."""
        starts = self.starts().tolist()
        order = sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i))
        runs: list[list[int]] = []
        wasted = 0
        for i in order:
            longest = self.lengths[runs[-1][0]] if runs else 0
            wasted += longest**2 - self.lengths[i] ** 2
            if not runs or wasted > WASTED_SCORES:
                runs.append([])
                wasted = 0
            runs[-1].append(i)
        return [self._bundle(run, starts) for run in runs]

    def _bundle(self, run: Sequence[int], starts: Sequence[int]) -> Bundle:
        longest = self.lengths[run[0]]
        column = torch.arange(longest, device=self.device)
        lengths = torch.tensor([self.lengths[i] for i in run], device=self.device)[:, None]
        first = torch.tensor([starts[i] for i in run], device=self.device)[:, None]
        tokens = first + torch.minimum(column[None], lengths - 1)
        continuation = None
        if self.segments is not None:
            continuation = torch.stack([_continuation_numbers(self.segments[i], longest) for i in run]).to(self.device)
        return Bundle(tokens, None if self.lengths[run[-1]] == longest else column[None] < lengths, continuation)

    def cached(self, key: object, make: Callable[[], _Value]) -> _Value:
        """The result of `make`, computed once per row and reused by the other layers."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]  # type: ignore[return-value]


def _continuation_numbers(lengths: Sequence[int], longest: int) -> Tensor:
    """The continuation of each token of one sequence, 0 = the prefix, `[longest]`; pads repeat the last."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return F.pad(numbers, (0, longest - len(numbers)), value=len(lengths) - 1)


def additive_mask(
    bundle: Bundle, *, groups: int, rows: int, causal: bool, window: int | None, dtype: torch.dtype
) -> Tensor | None:
    """Mask added to a bundle's scores (0 = attends, −inf = does not), None if every pair attends.

    `[r·n, n]` if all its sequences have the same mask, else `[K·G, r·n, n]`. Pads are on the right, so that a causal
    mask hides them from every token.
    """
    count, length = bundle.tokens.shape
    allowed = allowed_pairs((length,), causal=causal, window=window, device=bundle.tokens.device)
    each: Tensor | None = None
    if bundle.continuation is not None:
        own, other = bundle.continuation[:, :, None], bundle.continuation[:, None, :]
        each = allowed[None] & ((own == other) | (other == 0))
    elif not causal and bundle.real is not None:
        # A pad attends to every token: a row that attends to nothing would be nan and break the gradient of the keys.
        each = (allowed[None] & bundle.real[:, None, :]) | ~bundle.real[:, :, None]
    if each is not None:
        mask = torch.zeros(each.shape, dtype=dtype, device=each.device).masked_fill_(~each, float("-inf"))
        return mask[None, :, None].expand(groups, -1, rows, -1, -1).reshape(groups * count, rows * length, length)
    if bool(allowed.all()):
        return None
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
    return mask.repeat(rows, 1)


def allowed_pairs(lengths: Sequence[int], *, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which query (row) may attend to which key (column), `[n, n]` bool: same sequence, not ahead if causal,
    |query − key| < window.
    """
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    position = torch.arange(len(sequence), device=device)
    distance = position[:, None] - position[None, :]
    allowed = sequence[:, None] == sequence[None, :]
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance.abs() < window
    return allowed
