"""Grids and their codes: numbers worked by hand, bounds of the rounding, GPTQ and AWQ beside the nearest code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopos.compression.solvers import awq_factors, gptq
from loopos.functional.quantization import fitted_grid, pack_nibbles, rounded_rows, unpack_nibbles


def test_eight_bits_by_hand() -> None:
    """max|w| = 127 · 0.5, so scale = 0.5: 0.7/0.5 = 1.4 → 1, −63.5/0.5 = −127, 0.26/0.5 = 0.52 → 1."""
    weight = torch.tensor([[0.7, -63.5, 0.26, 0.0], [0.0, 0.0, 0.0, 0.0]])
    grid = fitted_grid(weight, 8, 4)
    assert grid.scale.tolist() == [[0.5], [1.0]]
    assert grid.codes(weight).tolist() == [[1, -127, 1, 0], [0, 0, 0, 0]]
    assert grid.rounded(weight).tolist() == [[0.5, -63.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_four_bits_by_hand() -> None:
    """From −1 to 6.5 in fifteen steps of 0.5: zero = −1 + 8 · 0.5 = 3, so that −1 is code −8 and 6.5 code 7."""
    weight = torch.tensor([[-1.0, 6.5, 0.0, 2.8], [5.0, 7.5, 2.0, 1.0]])
    grid = fitted_grid(weight, 4, 4)
    assert grid.zero is not None
    assert grid.scale.tolist() == [[0.5], [0.5]]
    # The second row's least is 1, but 0 stays in reach.
    assert grid.zero.tolist() == [[3.0], [4.0]]
    assert grid.codes(weight).tolist() == [[-8, 7, -6, 0], [2, 7, -4, -6]]
    assert grid.rounded(weight).tolist() == [[-1.0, 6.5, 0.0, 3.0], [5.0, 7.5, 2.0, 1.0]]


@pytest.mark.parametrize(("bits", "group"), [(8, 96), (4, 32), (4, 96)])
def test_no_weight_moves_by_more_than_half_a_step(bits: int, group: int) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 40)[:, None]
    grid = fitted_grid(weight, bits, group)
    steps = grid.scale.repeat_interleave(group, 1)
    # The ends of the range are rounded to bf16 (8 bits of mantissa), which may leave the outermost beyond them.
    slack = 2.0**-8 * weight.abs().unflatten(1, (-1, group)).amax(2).repeat_interleave(group, 1)
    assert bool(((grid.rounded(weight) - weight).abs() <= steps / 2 + slack).all())
    assert torch.equal(grid.scale, grid.scale.bfloat16().float())


def test_nibbles_are_packed_low_half_first() -> None:
    codes = torch.tensor([[1, -8, 7, -1]], dtype=torch.int8)
    assert pack_nibbles(codes).view(torch.uint8).tolist() == [[0x81, 0xF7]]
    every = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(every)), every)
    assert pack_nibbles(every).shape == (256, 1)


def test_activations_have_a_scale_a_row() -> None:
    codes, scale = rounded_rows(torch.tensor([[1.27, -0.635, 0.0], [0.0, 0.0, 0.0], [-254.0, 2.0, 1.1]]))
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 1, 1]]
    assert scale[:, 0].tolist() == pytest.approx([0.01, 1e-12 / 127, 2.0])


def correlated(inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight `[24, I]`, inputs `[I, 400]` that are mixtures of a few causes, and their XXᵀ."""
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(inputs, 12, generator=draw)
    entered = mixing @ torch.randn(12, 400, generator=draw) + 0.1 * torch.randn(inputs, 400, generator=draw)
    weight = torch.randn(24, inputs, generator=draw)
    return weight, entered, entered @ entered.t()


@pytest.mark.parametrize(("bits", "group"), [(8, 160), (4, 32), (4, 160)])
def test_gptq_beats_the_nearest_code_where_inputs_go_together(bits: int, group: int) -> None:
    weight, entered, products = correlated(160)
    codes, grid, settled = gptq(weight, products, bits=bits, group=group)
    nearest = fitted_grid(weight, bits, group).rounded(weight)
    costs = [float(((weight - rounded) @ entered).square().sum()) for rounded in (settled, nearest)]
    assert costs[0] < costs[1] / 2
    assert torch.equal(grid.values(codes), settled)
    assert grid.scale.shape == (24, 160 // group)


@pytest.mark.parametrize(("bits", "group"), [(8, 160), (4, 32)])
def test_gptq_is_the_nearest_code_where_inputs_are_strangers(bits: int, group: int) -> None:
    weight = correlated(160)[0]
    codes, grid, _ = gptq(weight, torch.eye(160), bits=bits, group=group)
    expected = fitted_grid(weight, bits, group)
    assert torch.equal(grid.scale, expected.scale)
    assert torch.equal(codes, expected.codes(weight))


def test_awq_helps_where_few_inputs_are_large() -> None:
    weight, entered, _ = correlated(64)
    entered[:3] *= 40.0
    products = entered @ entered.t()
    factors = awq_factors(weight, products, bits=4, group=32)
    assert factors is not None
    assert bool((factors[:3].min() > factors[3:].max()).item())
    scaled = weight * factors
    with_factors = fitted_grid(scaled, 4, 32).rounded(scaled) / factors
    without = fitted_grid(weight, 4, 32).rounded(weight)
    costs = [float(((weight - rounded) @ entered).square().sum()) for rounded in (with_factors, without)]
    assert costs[0] < costs[1] / 2
    # The identity that it stands on, before anything is rounded.
    torch.testing.assert_close(scaled @ (entered / factors[:, None]), weight @ entered, rtol=1e-4, atol=1e-3)


def test_awq_does_not_change_equal_inputs() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    assert awq_factors(weight, torch.eye(32), bits=4, group=32) is None
    assert awq_factors(weight, torch.zeros(32, 32), bits=4, group=32) is None
