"""GPTQ: weights rounded to a grid one column after another, while the columns behind make up for the rounding.

Enters: the weight of a linear layer and the sums of products of its inputs. Leaves: codes and their grid. After Frantar
et al. 2023 (arXiv:2210.17323, algorithm 1), own code. Left out: collecting the inputs; another order of the columns.
Letters: O outputs, I inputs, g inputs of a group, W `[O, I]`, X `[I, tokens]` the calibration inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopos.functional.quantization import Grid, fitted_grid
from loopos.functional.settled_columns import BLOCK, DAMPING, settle_columns


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

    # The columns of a group must be up to date when its grid is fitted: a block holds whole groups.
    block = max(BLOCK, group) if inputs > group else BLOCK
    settled = settle_columns(weight, products, choose, block=block, damping=damping)
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return (
        codes,
        Grid(bits, torch.cat([grid.scale for grid in grids], 1), torch.cat(zeros, 1) if zeros else None),
        settled,
    )
