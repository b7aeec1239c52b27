"""SparseGPT: weights set to zero one column after another, while the columns behind make up for them.

Enters: the weight of a linear layer and the sums of products of its inputs. Leaves: the new weight, and which of its
entries are kept. After Frantar & Alistarh 2023 (algorithm 1), own code. Left out: collecting the inputs.
Letters: O outputs, I inputs, W `[O, I]`, X `[I, tokens]` the calibration inputs, H = XXᵀ + λ·1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopos.functional.sparsity import kept_of_all, kept_of_groups, num_zeros

BLOCK = 128
DAMPING = 0.01


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

    Let Hᵢ be H without its first i rows and columns and dᵢ the first entry of Hᵢ⁻¹'s diagonal. Column i loses the
    weights of least w²/dᵢ (the error of optimal brain surgery, Hassibi & Stork 1992), and each row's columns j > i take
    −(w/dᵢ)·(Hᵢ⁻¹)₀ⱼ for a weight w that goes. All Hᵢ⁻¹ are read off one Cholesky factor R, H⁻¹ = RᵀR: its row i is the
    first row of Hᵢ⁻¹ over √dᵢ.

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
    factor = _inverse_factor(products, damping)
    left = weight.clone()
    kept = torch.ones_like(weight, dtype=torch.bool)
    outputs, inputs = weight.shape
    if pattern is not None:
        block = max(pattern[1], block // pattern[1] * pattern[1])
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        if pattern is None:
            zeros = num_zeros(outputs * last, sparsity) - num_zeros(outputs * first, sparsity)
            scores = (left[:, first:last] / factor.diagonal()[first:last]) ** 2
            kept[:, first:last] = kept_of_all(scores, zeros)
        errors = torch.zeros(outputs, last - first, dtype=weight.dtype, device=weight.device)
        for column in range(first, last):
            if pattern is not None and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                scores = (left[:, group] / factor.diagonal()[group]) ** 2
                kept[:, group] = kept_of_groups(scores, *pattern)
            goes = ~kept[:, column]
            error = torch.where(goes, left[:, column] / factor[column, column], 0.0)
            left[:, column:last] -= error[:, None] * factor[column, column:last]
            left[:, column].masked_fill_(goes, 0.0)
            errors[:, column - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return left, kept


def _inverse_factor(products: Tensor, damping: float) -> Tensor:
    """R, upper triangular, with RᵀR = H⁻¹; H = `products` + λ·1. Inputs that are all zero leave H = 1."""
    mean = products.diagonal().mean()
    hessian = products.clone()
    hessian.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
