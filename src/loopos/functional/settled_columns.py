"""A weight changed one column after another, while the columns behind make up for it.

Enters: the weight of a linear layer, the sums of products of its inputs, and what each column is to become. Leaves: the
new weight. Pruning (`sparse_gpt.py`) and quantization (`gptq.py`) differ in the choice alone. Left out: that choice.
Letters: O outputs, I inputs, W `[O, I]`, X `[I, tokens]` the calibration inputs, H = XXᵀ + λ·1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
DAMPING = 0.01
Choice = Callable[[Tensor, int, Tensor], Tensor]
"""(the weight as it stands `[O, I]`, the column, √dᵢ of every column `[I]`) → what the column becomes, `[O]`."""


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
        damping: λ as a share of the mean of XXᵀ's diagonal.
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
    """R, upper triangular, with RᵀR = H⁻¹; H = `products` + λ·1. Inputs that are all zero leave H = 1."""
    mean = products.diagonal().mean()
    hessian = products.clone()
    hessian.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
