"""Solvers of pruning and quantization: score masks, SparseGPT, GPTQ and AWQ. Own code after the papers.

SparseGPT (Frantar & Alistarh 2023, algorithm 1) and GPTQ (Frantar et al. 2023, arXiv:2210.17323, algorithm 1) change a
weight one column after another, while the remaining columns compensate (`settle_columns`). AWQ (Lin et al. 2024,
arXiv:2306.00978, section 3.2) scales large inputs' weights up before rounding. Masks are True where a weight is kept.
Counts are exact: of k weights to remove, k go; of equal scores the first goes.
Letters: O outputs, I inputs, g inputs of a group, W `[O, I]`, X `[I, tokens]` the calibration inputs, H = XXᵀ + λ·1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from loopos.functional.quantization import GRID_FORMAT, Grid, fitted_grid

BLOCK = 128
DAMPING = 0.01
Choice = Callable[[Tensor, int, Tensor], Tensor]
"""(the current weight `[O, I]`, the column, √dᵢ of every column `[I]`) → the new column, `[O]`."""


def settle_columns(
    weight: Tensor, products: Tensor, choose: Choice, *, block: int = BLOCK, damping: float = DAMPING
) -> Tensor:
    """Ŵ, whose columns are what `choose` says, with ‖WX − ŴX‖² kept small by the columns that are not settled yet.

    Let Hᵢ be H without its first i rows and columns and dᵢ the first entry of Hᵢ⁻¹'s diagonal. Where column i moves by
    e, each row's columns j > i take −(e/dᵢ)·(Hᵢ⁻¹)₀ⱼ (optimal brain surgery, Hassibi & Stork 1992). All Hᵢ⁻¹ are read
    off one Cholesky factor R, H⁻¹ = RᵀR: its row i is the first row of Hᵢ⁻¹ over √dᵢ (Frantar & Alistarh 2023).

    Args:
        weight: `[O, I]`, fp32; it is not changed.
        products: XXᵀ `[I, I]`, fp32, on the weight's device.
        choose: called for every column in order. Columns of its own block and of those before are up to date.
        block: columns whose effect on later blocks is added in one product.
            damping: λ as a fraction of the mean of XXᵀ's diagonal.
    """
    factor = _inverse_factor(products, damping)
    diagonal = factor.diagonal()
    left = weight.clone()
    for first in range(0, weight.shape[1], block):
        last = min(first + block, weight.shape[1])
        errors = torch.zeros(len(weight), last - first, dtype=weight.dtype, device=weight.device)
        for column in range(first, last):
            settled = choose(left, column, diagonal)
            error = (left[:, column] - settled) / diagonal[column]
            left[:, column:last] -= error[:, None] * factor[column, column:last]
            left[:, column] = settled
            errors[:, column - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return left


def _inverse_factor(products: Tensor, damping: float) -> Tensor:
    """R, upper triangular, with RᵀR = H⁻¹; H = `products` + λ·1. Inputs that are all zero give H = 1."""
    mean = products.diagonal().mean()
    hessian = products.clone()
    hessian.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


_HIGH_BITS, _LOW_BITS = 2**15, 2**16


def num_zeros(number: int, sparsity: float) -> int:
    """How many of `number` weights to remove at `sparsity`: the nearest integer, halves up."""
    return int(number * sparsity + 0.5)


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W| (Han et al. 2015, section 3)."""
    return weight.abs()


def wanda_scores(weight: Tensor, square_sums: Tensor) -> Tensor:
    """|W_oi| · ‖X_i‖₂ (Sun et al. 2024, equation 1), to be compared within each row of W.

    weight `[O, I]`; square_sums `[I]`: ‖X_i‖₂², the sum of the squares of each input over all calibration tokens.
    """
    return weight.abs() * square_sums.sqrt()


def keep_highest(scores: Tensor, zeros: int) -> Tensor:
    """Mask of all but the `zeros` lowest scores of the whole tensor."""
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().sort(stable=True).indices[:zeros]] = False
    return keep.view_as(scores)


def keep_highest_in_rows(scores: Tensor, zeros: int) -> Tensor:
    """Mask of all but the `zeros` lowest scores of each row; scores `[O, I]`."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    return keep.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :zeros], False)


def keep_highest_in_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    """Mask of the `keep` highest scores of every `group` inputs in a row (Mishra et al. 2021: 2 of 4); scores `[O, I]`,
    I a multiple of `group`.
    """
    assert scores.shape[1] % group == 0, (scores.shape, group)
    return keep_highest_in_rows(scores.reshape(-1, group), group - keep).view_as(scores)


def global_threshold(matrices: Iterable[Callable[[], Tensor]], zeros: int) -> tuple[float, int]:
    """A threshold over many tensors at once: their `zeros`-th lowest score, and how many scores of exactly that value
    go.

    matrices: return the scores, fp32 and not negative; each is called twice, so that one tensor is in memory at a time.
    The bits of non-negative floats are ordered like their values, so two counts (of the high bits, then of the low bits
    for that high pattern) find the exact value.
    """
    assert zeros >= 1, zeros
    sources = list(matrices)
    high = torch.zeros(_HIGH_BITS, dtype=torch.int64)
    for scores in sources:
        high += torch.bincount(_bits(scores()) >> 16, minlength=_HIGH_BITS).cpu()
    high_bin, before = _bin_of(high, zeros)
    low = torch.zeros(_LOW_BITS, dtype=torch.int64)
    for scores in sources:
        bits = _bits(scores())
        low += torch.bincount(bits[bits >> 16 == high_bin] & 0xFFFF, minlength=_LOW_BITS).cpu()
    rest, before_rest = _bin_of(low, zeros - before)
    threshold = torch.tensor([high_bin << 16 | rest], dtype=torch.int32).view(torch.float32)
    return float(threshold), zeros - before - before_rest


def keep_above(scores: Tensor, threshold: float, at_threshold: int) -> tuple[Tensor, int]:
    """Mask of the scores above a threshold of `global_threshold`, and of those equal to it all but the first
    `at_threshold`; and the number of these that remain to be removed from the following tensors.
    """
    keep = scores > threshold
    equal = (scores == threshold).flatten().nonzero().squeeze(1)
    keep.view(-1)[equal[at_threshold:]] = True
    return keep, max(0, at_threshold - len(equal))


def _bits(scores: Tensor) -> Tensor:
    # −0.0 would have the sign bit set.
    return scores.float().abs().flatten().view(torch.int32).long()


def _bin_of(counts: Tensor, number: int) -> tuple[int, int]:
    """The bin of the `number`-th entry, from 1, and how many entries come before that bin."""
    summed = counts.cumsum(0)
    index = int((summed < number).sum())
    return index, int(summed[index - 1]) if index else 0


STEPS = 10


def awq_factors(weight: Tensor, products: Tensor, *, bits: int, group: int, steps: int = STEPS) -> Tensor | None:
    """s `[I]` with W·x = (W·diag(s))·(x/s), such that rounding W·diag(s) costs least on the calibration inputs.

    s_j = ‖X_j‖₂^α, divided by the geometric mean of the largest and the least: the α of 0, 1/steps, …, 1 with the least
    ‖WX − ŴX‖² = tr(D·XXᵀ·Dᵀ), D = W − Q(W·diag(s))·diag(s)⁻¹. The paper takes the mean of |X_j| where ‖X_j‖₂ stands:
    its squares are on the diagonal of XXᵀ. None where α = 0, no factors, is best.

    Args:
        weight: `[O, I]`, fp32. products: XXᵀ `[I, I]`, fp32. bits, group: of the grid.
    """
    sizes = products.diagonal().clamp_min(0.0).sqrt()
    # An input that never occurred has no information: it gets the largest size.
    sizes = torch.where(sizes > 0, sizes, sizes.max().clamp_min(1e-12))
    best, least = None, _error(weight, products, None, bits, group)
    for step in range(1, steps + 1):
        powers = sizes ** (step / steps)
        # The layer stores 1/s in half precision.
        factors = 1.0 / ((powers.max() * powers.min()).sqrt() / powers).to(GRID_FORMAT).to(weight.dtype)
        error = _error(weight, products, factors, bits, group)
        if error < least:
            best, least = factors, error
    return best


def _error(weight: Tensor, products: Tensor, factors: Tensor | None, bits: int, group: int) -> float:
    scaled = weight if factors is None else weight * factors
    rounded = fitted_grid(scaled, bits, group).rounded(scaled)
    difference = weight - (rounded if factors is None else rounded / factors)
    return float(((difference @ products) * difference).sum())


def gptq(
    weight: Tensor, products: Tensor, *, bits: int, group: int, damping: float = DAMPING
) -> tuple[Tensor, Grid, Tensor]:
    """Rounds W so that ‖WX − ŴX‖² stays small (`settle_columns`). The grid of a group is fitted when its first column
    is reached, to the weights as they then are; with one group a row that is W itself.

    Args:
        weight: `[O, I]`, fp32; it is not changed.
        products: XXᵀ `[I, I]`, fp32, on the weight's device.
        group: g, a power of two, or I.
        damping: λ as a share of the mean of XXᵀ's diagonal.
    Returns:
        codes `[O, I]` int8, their grid, and Ŵ `[O, I]`, what they stand for.
    """
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs, dtype=torch.int8, device=weight.device)
    grids: list[Grid] = []

    def choose(left: Tensor, column: int, _diagonal: Tensor) -> Tensor:
        if column % group == 0:
            grids.append(fitted_grid(left[:, column : column + group], bits, group))
        one = left[:, column : column + 1]
        codes[:, column : column + 1] = grids[-1].codes(one)
        return grids[-1].values(codes[:, column : column + 1])[:, 0]

    # The columns of a group must be up to date when its grid is fitted: a block contains whole groups.
    block = max(BLOCK, group) if inputs > group else BLOCK
    settled = settle_columns(weight, products, choose, block=block, damping=damping)
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return (
        codes,
        Grid(bits, torch.cat([grid.scale for grid in grids], 1), torch.cat(zeros, 1) if zeros else None),
        settled,
    )


def sparse_gpt(
    weight: Tensor,
    products: Tensor,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Prunes W and updates what stays, so that ‖WX − ŴX‖² stays small.

    Column after column (`settle_columns`) the weights of least w²/dᵢ go, the error of optimal brain surgery (Hassibi &
    Stork 1992).

    Args:
        weight: `[O, I]`, fp32; it is not changed.
        products: XXᵀ `[I, I]`, fp32, on the weight's device.
        sparsity: share of all weights that go, chosen among the O · `block` weights of each block of columns; without
            effect where a pattern is given.
        pattern: (n, m): n of every m inputs stay in each row; `block` is then rounded down to a multiple of m.
        damping: λ as a share of the mean of XXᵀ's diagonal.
    Returns:
        Ŵ `[O, I]`, and the mask of the weights that are kept, True = kept. Ŵ is exactly 0 elsewhere.
    """
    keep = torch.ones_like(weight, dtype=torch.bool)
    outputs, inputs = weight.shape
    if pattern is not None:
        block = max(pattern[1], block // pattern[1] * pattern[1])

    def choose(left: Tensor, column: int, diagonal: Tensor) -> Tensor:
        width = block if pattern is None else pattern[1]
        if column % width == 0:
            group = slice(column, min(column + width, inputs))
            scores = (left[:, group] / diagonal[group]) ** 2
            if pattern is None:
                zeros = num_zeros(outputs * group.stop, sparsity) - num_zeros(outputs * column, sparsity)
                keep[:, group] = keep_highest(scores, zeros)
            else:
                keep[:, group] = keep_highest_in_groups(scores, *pattern)
        return torch.where(keep[:, column], left[:, column], 0.0)

    return settle_columns(weight, products, choose, block=block, damping=damping), keep
