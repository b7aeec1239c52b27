"""SparseGPT: weights set to zero one column after another, while the columns behind make up for them.

Enters: the weight of a linear layer and the sums of products of its inputs. Leaves: the new weight, and which of its
entries are kept. After Frantar & Alistarh 2023 (algorithm 1), own code. Left out: collecting the inputs.
Letters: O outputs, I inputs, W `[O, I]`, X `[I, tokens]` the calibration inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopos.functional.settled_columns import BLOCK, DAMPING, settle_columns
from loopos.functional.sparsity import kept_of_all, kept_of_groups, num_zeros


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
    kept = torch.ones_like(weight, dtype=torch.bool)
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
                kept[:, group] = kept_of_all(scores, zeros)
            else:
                kept[:, group] = kept_of_groups(scores, *pattern)
        return torch.where(kept[:, column], left[:, column], 0.0)

    return settle_columns(weight, products, choose, block=block, damping=damping), kept
