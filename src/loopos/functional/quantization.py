"""Weights as whole numbers on a grid, eight or four bits each, and products with them.

Enters: weights. Leaves: codes with their grid, and back. Left out: which weights (`deploy.quantizing`), which rounding
beyond the nearest (`gptq.py`, `awq.py`), which kernel multiplies (`models.quantized`).
Letters: O outputs, I inputs, g inputs of a group, G = I/g groups of a row, W `[O, I]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What a grid is rounded to before anything is rounded to the grid: its values are kept in this format.
GRID_FORMAT = torch.bfloat16
LARGEST = {8: 127, 4: 7}
SMALLEST = {8: -127, 4: -8}


@dataclass(frozen=True)
class Grid:
    """The numbers that codes c stand for, c·scale + zero. scale `[O, G]`, zero `[O, G]` or None for 0, fp32 values that
    `GRID_FORMAT` holds exactly. Eight bits: c from −127 to 127; four: from −8 to 7.
    """

    bits: int
    scale: Tensor
    zero: Tensor | None = None

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of W, `[O, I]` int8."""
        groups = weight.reshape(len(weight), self.scale.shape[1], -1)
        moved = groups if self.zero is None else groups - self.zero[..., None]
        codes = torch.round(moved / self.scale[..., None]).clamp_(SMALLEST[self.bits], LARGEST[self.bits])
        return codes.to(torch.int8).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes `[O, I]` stand for, in the grid's format."""
        groups = codes.reshape(len(codes), self.scale.shape[1], -1).to(self.scale.dtype) * self.scale[..., None]
        moved: Tensor = groups if self.zero is None else groups + self.zero[..., None]
        return moved.flatten(1)

    def rounded(self, weight: Tensor) -> Tensor:
        """W with each entry at its nearest number of the grid."""
        return self.values(self.codes(weight))


def fitted_grid(weight: Tensor, bits: int, group: int) -> Grid:
    """The grid that reaches from the least to the largest weight of every group of `group` inputs.

    Eight bits: scale = max|w| / 127, symmetric; |w − ŵ| ≤ scale/2 (and what the rounded scale lets the largest lack).
    Four bits: scale = (max − min) / 15 and zero = min + 8·scale, with 0 always in reach. A group of zeros has scale 1.
    """
    groups = weight.reshape(len(weight), -1, group)
    if bits == 8:
        scale = groups.abs().amax(2) / LARGEST[8]
        return Grid(8, _kept(torch.where(scale > 0, scale, 1.0)))
    assert bits == 4, bits
    least, largest = groups.amin(2).clamp_max(0.0), groups.amax(2).clamp_min(0.0)
    scale = (largest - least) / (LARGEST[4] - SMALLEST[4])
    scale = _kept(torch.where(scale > 0, scale, 1.0))
    return Grid(4, scale, _kept(torch.where(largest > least, least - SMALLEST[4] * scale, 0.0)))


def _kept(values: Tensor) -> Tensor:
    return values.to(GRID_FORMAT).to(values.dtype)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes from −8 to 7, `[O, I]` int8, I even, two a byte: `[O, I/2]` int8, the even column in the low half."""
    low, high = codes[:, 0::2], codes[:, 1::2]
    return (low & 0xF) | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The codes in `pack_nibbles`' bytes, `[O, I]` int8."""
    return torch.stack([(packed << 4) >> 4, packed >> 4], -1).flatten(1)


def rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Activations `[R, I]` as int8 codes, each row with its own scale max|x| / 127 `[R, 1]` fp32."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min_(1e-12).div_(LARGEST[8])
    return torch.round(rows / scale).to(torch.int8), scale
