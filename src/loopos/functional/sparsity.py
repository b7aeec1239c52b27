"""Which weights of a matrix are kept when a share of them is set to zero.

Enters: scores, the larger the more a weight matters, and how many go. Leaves: masks of the scores' shape, True = kept.
Counts are exact: of k weights to go, k go; of equal scores the first goes. Left out: SparseGPT, which changes the
weights that stay (`sparse_gpt.py`), and where activations come from.
Letters: O outputs, I inputs of a linear layer, W `[O, I]` its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HIGH_BITS, _LOW_BITS = 2**15, 2**16


def num_zeros(number: int, sparsity: float) -> int:
    """How many of `number` weights go at a share `sparsity`: the nearest whole number, halves up."""
    return int(number * sparsity + 0.5)


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W| (Han et al. 2015, section 3)."""
    return weight.abs()


def wanda_scores(weight: Tensor, square_sums: Tensor) -> Tensor:
    """|W_oi| · ‖X_i‖₂ (Sun et al. 2024, equation 1), to be compared within each row of W.

    weight `[O, I]`; square_sums `[I]`: ‖X_i‖₂², the sum of the squares of each input over all calibration tokens.
    """
    return weight.abs() * square_sums.sqrt()


def kept_of_all(scores: Tensor, zeros: int) -> Tensor:
    """All but the `zeros` lowest scores of the whole tensor."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().sort(stable=True).indices[:zeros]] = False
    return kept.view_as(scores)


def kept_of_rows(scores: Tensor, zeros: int) -> Tensor:
    """All but the `zeros` lowest scores of each row; scores `[O, I]`."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :zeros], False)


def kept_of_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """The `kept` highest scores of every `group` inputs in a row (Mishra et al. 2021: 2 of 4); scores `[O, I]`, I a
    multiple of `group`.
    """
    assert scores.shape[1] % group == 0, (scores.shape, group)
    return kept_of_rows(scores.reshape(-1, group), group - kept).view_as(scores)


def kept_of_many(matrices: Iterable[Callable[[], Tensor]], zeros: int) -> tuple[float, int]:
    """A threshold over many tensors at once: their `zeros`-th lowest score, and how many scores of just that value go.

    matrices: give the scores, fp32 and not negative, one tensor at a time; each is asked for twice and none is held.
    Floats that are not negative are ordered as their bit patterns are, so two counts (by the high bits, then by the
    low bits of the one high pattern that holds the place) find the exact value.
    """
    assert zeros >= 1, zeros
    asked = list(matrices)
    high = torch.zeros(_HIGH_BITS, dtype=torch.int64)
    for scores in asked:
        high += torch.bincount(_bits(scores()) >> 16, minlength=_HIGH_BITS).cpu()
    place, before = _place_of(high, zeros)
    low = torch.zeros(_LOW_BITS, dtype=torch.int64)
    for scores in asked:
        bits = _bits(scores())
        low += torch.bincount(bits[bits >> 16 == place] & 0xFFFF, minlength=_LOW_BITS).cpu()
    rest, before_rest = _place_of(low, zeros - before)
    threshold = torch.tensor([place << 16 | rest], dtype=torch.int32).view(torch.float32)
    return float(threshold), zeros - before - before_rest


def kept_above(scores: Tensor, threshold: float, at_threshold: int) -> tuple[Tensor, int]:
    """The scores above a threshold of `kept_of_many`, and of those just there all but the first `at_threshold`; with
    the number of these that are left for the tensors behind.
    """
    kept = scores > threshold
    equal = (scores == threshold).flatten().nonzero().squeeze(1)
    kept.view(-1)[equal[at_threshold:]] = True
    return kept, max(0, at_threshold - len(equal))


def _bits(scores: Tensor) -> Tensor:
    # −0.0 would be a negative number of bits.
    return scores.float().abs().flatten().view(torch.int32).long()


def _place_of(counts: Tensor, number: int) -> tuple[int, int]:
    """The bin that holds the `number`-th entry, from 1, and how many entries lie before that bin."""
    summed = counts.cumsum(0)
    place = int((summed < number).sum())
    return place, int(summed[place - 1]) if place else 0
