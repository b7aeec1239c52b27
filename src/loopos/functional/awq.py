"""AWQ: inputs that are large make their weights count, so these are scaled up before rounding and the inputs down.

Enters: the weight of a linear layer and the sums of products of its inputs. Leaves: a factor for each input. After Lin
et al. 2024 (arXiv:2306.00978, section 3.2), own code. Left out: clipping the grid; folding the factors into the layer
before.
Letters: O outputs, I inputs, g inputs of a group, W `[O, I]`, X `[I, tokens]` the calibration inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopos.functional.quantization import GRID_FORMAT, fitted_grid

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
    # An input that was never there says nothing: it stays as it is among the others.
    sizes = torch.where(sizes > 0, sizes, sizes.max().clamp_min(1e-12))
    best, least = None, _error(weight, products, None, bits, group)
    for step in range(1, steps + 1):
        powers = sizes ** (step / steps)
        # What the layer keeps is 1/s, in half precision.
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
