"""The layout of a packed row: where its sequences lie, and who may attend to whom.

Letters: T tokens of the row, N sequences, H heads, K groups of r heads each that share a key and value; a bundle is G
sequences of like length, each taken as n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Kept = TypeVar("_Kept")

# Scores that a bundle may waste on pads before its next sequence starts a new one: one more bundle costs about as much
# time in kernel launches as this many scores a head.
WASTED_SCORES = 4096


@dataclass(frozen=True)
class Bundle:
    """Sequences of like length that are attended to in one batched product, padded on the right to the longest.

    `tokens` `[G, n]`: index of each token in the row; pads repeat the sequence's last token. `real` `[G, n]` bool:
    True = a token, False = a pad; None where there are no pads. `branch` `[G, n]`: the branch of each token, 0 = the
    trunk; None without branches.
    """

    tokens: Tensor
    real: Tensor | None
    branch: Tensor | None = None

    def places(self, groups: int, rows: int) -> Tensor:
        """Index into token-major rows `[T·H, D]` of every (group, sequence, head in group, token): `[K·G·r·n]`."""
        heads = torch.arange(groups * rows, device=self.tokens.device).view(groups, 1, rows, 1)
        return (self.tokens[None, :, None, :] * (groups * rows) + heads).reshape(-1)

    def kept(self, groups: int, rows: int) -> Tensor | None:
        """Which of `places` are tokens, `[K·G·r·n]` bool; None where all are."""
        if self.real is None:
            return None
        return self.real[None, :, None, :].expand(groups, -1, rows, -1).reshape(-1)


@dataclass(frozen=True)
class PackedLayout:
    """Where each sequence of a flat row of tokens begins and ends.

    `lengths`: tokens of each sequence, in order, each >= 1. Their sum is T. `branches`: where a sequence is a trunk
    that several branches go on from, each as if it stood behind the trunk alone, the lengths of trunk and branches;
    None where every sequence is one.
    """

    lengths: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    branches: tuple[tuple[int, ...], ...] | None = None
    _kept: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.lengths, "a row without sequences"
        assert min(self.lengths) >= 1, self.lengths
        assert self.branches is None or tuple(map(sum, self.branches)) == self.lengths, self.branches

    @classmethod
    def of_branches(cls, branches: Sequence[tuple[int, ...]], device: torch.device) -> PackedLayout:
        """Sequences that each have a trunk (the first length) and branches that go on from it."""
        return cls(tuple(map(sum, branches)), device, tuple(branches))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def positions(self) -> Tensor:
        """Positions that restart at 0 in each sequence, and behind the trunk in each branch, `[T]`."""
        if self.branches is None:
            runs = [torch.arange(length) for length in self.lengths]
        else:
            runs = [
                torch.arange(first, first + length)
                for trunk, *rest in self.branches
                for first, length in ((0, trunk), *((trunk, branch) for branch in rest))
            ]
        return torch.cat(runs).to(self.device)

    def lengths_tensor(self) -> Tensor:
        """`[N]`, int64."""
        return torch.tensor(self.lengths, device=self.device)

    def ends(self) -> Tensor:
        """Index of the last token of each sequence, `[N]`."""
        return self.lengths_tensor().cumsum(0) - 1

    def last_tokens(self) -> Tensor:
        """Index of the last token of each sequence, or of each branch where there are branches, in order."""
        if self.branches is None:
            return self.ends()
        ends = torch.tensor([length for parts in self.branches for length in parts]).cumsum(0) - 1
        is_branch = torch.tensor([index > 0 for parts in self.branches for index in range(len(parts))])
        return ends[is_branch].to(self.device)

    def starts(self) -> Tensor:
        """Index of the first token of each sequence, `[N]`."""
        return self.ends() - self.lengths_tensor() + 1

    def boundaries(self) -> Tensor:
        """Cumulative lengths with a leading 0, `[N + 1]`, int32: what variable-length kernels call `cu_seqlens`."""
        return F.pad(self.lengths_tensor().cumsum(0), (1, 0)).to(torch.int32)

    def bundles(self) -> list[Bundle]:
        """Every sequence once, longest first, in bundles of like length."""
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
        branch = None
        if self.branches is not None:
            branch = torch.stack([_branch_numbers(self.branches[i], longest) for i in run]).to(self.device)
        return Bundle(tokens, None if self.lengths[run[-1]] == longest else column[None] < lengths, branch)

    def kept_for_layers(self, key: object, make: Callable[[], _Kept]) -> _Kept:
        """What `make` gives, made once for the row and kept for its other layers."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[return-value]


def _branch_numbers(lengths: Sequence[int], longest: int) -> Tensor:
    """The branch of each token of one sequence, 0 = its trunk, `[longest]`; pads continue the last."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return F.pad(numbers, (0, longest - len(numbers)), value=len(lengths) - 1)


def additive_mask(
    bundle: Bundle, *, groups: int, rows: int, causal: bool, window: int | None, dtype: torch.dtype
) -> Tensor | None:
    """Mask added to a bundle's scores (0 = attends, −inf = does not), None where every pair attends.

    `[r·n, n]` where all its sequences have the same one, else `[K·G, r·n, n]`. Pads stand on the right, so that a
    causal mask hides them from every token by itself.
    """
    count, length = bundle.tokens.shape
    allowed = allowed_pairs((length,), causal=causal, window=window, device=bundle.tokens.device)
    each: Tensor | None = None
    if bundle.branch is not None:
        own, other = bundle.branch[:, :, None], bundle.branch[:, None, :]
        each = allowed[None] & ((own == other) | (other == 0))
    elif not causal and bundle.real is not None:
        # A pad may attend to everything: a row that attends to nothing would be nan, and spoil its keys' gradient.
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
    place = torch.arange(len(sequence), device=device)
    distance = place[:, None] - place[None, :]
    allowed = sequence[:, None] == sequence[None, :]
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance.abs() < window
    return allowed
