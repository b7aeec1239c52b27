"""Quantize weights to 8-bit or 4-bit integer codes with a scale per group, and back.

Letters: O outputs, I inputs, g inputs of a group, G = I/g groups of a row, W `[O, I]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Scales and zeros are rounded to this format first, because they are stored in it.
GRID_FORMAT = torch.bfloat16
LARGEST = {8: 127, 4: 7}
SMALLEST = {8: -127, 4: -8}


@dataclass(frozen=True)
class Grid:
    """The values c·scale + zero of codes c.

    scale `[O, G]`, zero `[O, G]` or None for 0: fp32 values that `GRID_FORMAT` represents exactly. c is in −127..127
    for 8 bits, −8..7 for 4 bits.
    """

    bits: int
    scale: Tensor
    zero: Tensor | None = None

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of W, `[O, I]` int8."""
        groups = weight.reshape(len(weight), self.scale.shape[1], -1)
        shifted = groups if self.zero is None else groups - self.zero[..., None]
        codes = torch.round(shifted / self.scale[..., None]).clamp_(SMALLEST[self.bits], LARGEST[self.bits])
        return codes.to(torch.int8).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes `[O, I]`, in the dtype of the grid."""
        groups = codes.reshape(len(codes), self.scale.shape[1], -1).to(self.scale.dtype) * self.scale[..., None]
        shifted: Tensor = groups if self.zero is None else groups + self.zero[..., None]
        return shifted.flatten(1)

    def rounded(self, weight: Tensor) -> Tensor:
        """W with each entry rounded to the grid."""
        return self.values(self.codes(weight))


def fitted_grid(weight: Tensor, bits: int, group: int) -> Grid:
    """The grid that spans the range of weights in each group of `group` inputs.

    Eight bits: scale = max|w| / 127, symmetric; |w − ŵ| ≤ scale/2 (plus the error of the
    rounded scale at the largest weight). Four bits: scale = (max − min) / 15 and zero = min + 8·scale, so that
    0 is always in range. A group of zeros has scale 1.
    """
    groups = weight.reshape(len(weight), -1, group)
    if bits == 8:
        scale = groups.abs().amax(2) / LARGEST[8]
        return Grid(8, _rounded_to_format(torch.where(scale > 0, scale, 1.0)))
    assert bits == 4, bits
    least, largest = groups.amin(2).clamp_max(0.0), groups.amax(2).clamp_min(0.0)
    scale = (largest - least) / (LARGEST[4] - SMALLEST[4])
    scale = _rounded_to_format(torch.where(scale > 0, scale, 1.0))
    return Grid(4, scale, _rounded_to_format(torch.where(largest > least, least - SMALLEST[4] * scale, 0.0)))


def _rounded_to_format(values: Tensor) -> Tensor:
    return values.to(GRID_FORMAT).to(values.dtype)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes from −8 to 7, `[O, I]` int8, I even, two per byte: `[O, I/2]` int8, the even column in the low half."""
    low, high = codes[:, 0::2], codes[:, 1::2]
    return (low & 0xF) | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The codes in `pack_nibbles`' bytes, `[O, I]` int8."""
    return torch.stack([(packed << 4) >> 4, packed >> 4], -1).flatten(1)


def rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Activations `[R, I]` as int8 codes, each row with its own scale max|x| / 127 `[R, 1]` fp32."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min_(1e-12).div_(LARGEST[8])
    return torch.round(rows / scale).to(torch.int8), scale
