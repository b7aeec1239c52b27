"""The largest elements of a tensor by magnitude, found exactly and in little memory.

Enters: tensors in fp32. Leaves: the same with the largest, or all but them, set to 0. Sorting would make an index twice
as large as the tensor; counting needs none. Torch alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PIECE = 2**20
"""Elements that are worked on at a time."""


def keep_largest(values: Tensor, count: int) -> None:
    """Sets all but the `count` elements of largest magnitude to 0, in place; of equal ones the first stay."""
    if count >= values.numel():
        return
    if count == 0:
        values.zero_()
        return
    threshold, above = magnitude_at(values, count)
    for piece in pieces(values):
        piece.mul_(piece.abs() >= threshold)
    _zero_equal(values, threshold, slice(count - above, None))


def zero_largest(values: Tensor, count: int) -> None:
    """Sets the `count` elements of largest magnitude to 0, in place; of equal ones the first."""
    if count == 0:
        return
    threshold, above = magnitude_at(values, count)
    for piece in pieces(values):
        piece.mul_(piece.abs() <= threshold)
    _zero_equal(values, threshold, slice(0, count - above))


def _zero_equal(values: Tensor, magnitude: float, which: slice) -> None:
    """Sets those elements of exactly this magnitude to 0 that `which` says, in their order."""
    if magnitude > 0:
        flat = values.view(-1)
        flat[(flat.abs() == magnitude).nonzero().squeeze(1)[which]] = 0.0


def magnitude_at(values: Tensor, count: int) -> tuple[float, int]:
    """The magnitude of the element at place `count` (from 1) by falling magnitude, and how many are larger.

    The bits of positive floats are ordered as they are: two counts of 16 and 15 of them find it exactly, without the
    index that sorting makes.
    """
    high, above = _bucket_at((_bits(piece) >> 15 for piece in pieces(values)), 2**16, count)
    low_bits = (bits[(bits >> 15) == high] & 0x7FFF for bits in map(_bits, pieces(values)))
    low, more = _bucket_at(low_bits, 2**15, count - above)
    found = torch.tensor([(high << 15) | low], dtype=torch.int32).view(torch.float32)
    return float(found), above + more


def _bucket_at(numbers: Iterable[Tensor], size: int, count: int) -> tuple[int, int]:
    """Of whole numbers below `size` the one at place `count` by falling size, and how many are larger."""
    counts = torch.zeros(size, dtype=torch.int64)
    for part in numbers:
        counts += torch.bincount(part, minlength=size)
    reached = counts.flip(0).cumsum(0)
    place = int((reached < count).sum())
    return size - 1 - place, int(reached[place - 1]) if place else 0


def _bits(piece: Tensor) -> Tensor:
    return piece.abs().view(torch.int32)


def pieces(values: Tensor) -> Iterator[Tensor]:
    """Parts of a tensor as flat views, at most `PIECE` elements each."""
    # torch leaves the annotations of this method out.
    yield from values.view(-1).split(PIECE)  # type: ignore[no-untyped-call]
