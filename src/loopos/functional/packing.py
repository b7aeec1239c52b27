"""The layout of a packed row: where its sequences lie, and who may attend to whom.

Letters: T tokens of the row, N sequences, n tokens of a block of neighbouring sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# Neighbouring short sequences share one block-diagonal product up to this many tokens: fewer kernel launches outweigh
# the masked scores.
BLOCK_TOKENS = 128


@dataclass(frozen=True)
class PackedLayout:
    """Where each sequence of a flat row of tokens begins and ends.

    `lengths`: tokens of each sequence, in order, each >= 1. Their sum is T.
    """

    lengths: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _masks: dict[object, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.lengths, "a row without sequences"
        assert min(self.lengths) >= 1, self.lengths

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def positions(self) -> Tensor:
        """Positions that restart at 0 in each sequence, `[T]`."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    def lengths_tensor(self) -> Tensor:
        """`[N]`, int64."""
        return torch.tensor(self.lengths, device=self.device)

    def ends(self) -> Tensor:
        """Index of the last token of each sequence, `[N]`."""
        return self.lengths_tensor().cumsum(0) - 1

    def starts(self) -> Tensor:
        """Index of the first token of each sequence, `[N]`."""
        return self.ends() - self.lengths_tensor() + 1

    def boundaries(self) -> Tensor:
        """Cumulative lengths with a leading 0, `[N + 1]`, int32: what variable-length kernels call `cu_seqlens`."""
        return F.pad(self.lengths_tensor().cumsum(0), (1, 0)).to(torch.int32)

    def blocks(self) -> list[tuple[int, tuple[int, ...]]]:
        """(first token, lengths) of runs of neighbouring sequences that are attended to in one product."""
        blocks: list[tuple[int, tuple[int, ...]]] = []
        start = 0
        run: list[int] = []
        for length in self.lengths:
            if run and sum(run) + length > BLOCK_TOKENS:
                blocks.append((start, tuple(run)))
                start, run = start + sum(run), []
            run.append(length)
        blocks.append((start, tuple(run)))
        return blocks

    def mask(
        self, lengths: tuple[int, ...], *, causal: bool, window: int | None, rows: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Additive mask `[rows·n, n]` of a block (0 = attends, −inf = does not), or None where every pair attends.
        Kept for the row's other layers.
        """
        key = (lengths, causal, window, rows, dtype)
        if key not in self._masks:
            allowed = allowed_pairs(lengths, causal=causal, window=window, device=self.device)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=self.device).masked_fill_(~allowed, float("-inf"))
            self._masks[key] = None if bool(allowed.all()) else mask.repeat(rows, 1)
        return self._masks[key]


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
