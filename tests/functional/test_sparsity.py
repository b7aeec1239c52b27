"""Which weights go: worked by hand, counted exactly, and SparseGPT beside optimal brain surgery done the slow way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loopos.compression.solvers import (
    DAMPING,
    global_threshold,
    keep_above,
    keep_highest,
    keep_highest_in_groups,
    keep_highest_in_rows,
    magnitude_scores,
    num_zeros,
    sparse_gpt,
    wanda_scores,
)

WEIGHT = torch.tensor([[1.0, -4.0, 2.0, -3.0], [-8.0, 0.5, 7.0, 6.0]])


def test_magnitude_by_hand() -> None:
    assert keep_highest(magnitude_scores(WEIGHT), 3).tolist() == [[False, True, False, True], [True, False, True, True]]
    assert keep_highest_in_rows(magnitude_scores(WEIGHT), 2).tolist() == [
        [False, True, False, True],
        [True, False, True, False],
    ]


def test_wanda_by_hand() -> None:
    """‖X‖ = 10, 1, 1, 3: in row 0 the scores are 10, 4, 2, 9; in row 1 they are 80, 0.5, 7, 18."""
    scores = wanda_scores(WEIGHT, torch.tensor([100.0, 1.0, 1.0, 9.0]))
    assert scores.tolist() == [[10, 4, 2, 9], [80, 0.5, 7, 18]]
    assert keep_highest_in_rows(scores, 2).tolist() == [[True, False, False, True], [True, False, False, True]]


def test_equal_scores_lose_the_first() -> None:
    assert keep_highest(torch.ones(2, 3), 4).tolist() == [[False] * 3, [False, True, True]]
    assert keep_highest_in_rows(torch.ones(2, 3), 1).tolist() == [[False, True, True]] * 2


def test_groups_by_hand() -> None:
    kept = keep_highest_in_groups(torch.tensor([[1.0, 5, 3, 4, 9, 8, 7, 6]]), 2, 4)
    assert kept.tolist() == [[False, True, False, True, True, True, False, False]]
    assert keep_highest_in_groups(torch.tensor([[1.0, 5, 3, 4, 9, 8, 7, 6]]), 4, 8).sum() == 4


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.777, 1.0])
def test_counts_are_exact(sparsity: float) -> None:
    scores = torch.rand(13, 29, generator=torch.Generator().manual_seed(1))
    zeros = num_zeros(scores.numel(), sparsity)
    assert abs(zeros - sparsity * scores.numel()) <= 0.5
    assert (~keep_highest(scores, zeros)).sum() == zeros
    assert (~keep_highest_in_rows(scores, 11)).sum(1).tolist() == [11] * 13


@pytest.mark.parametrize("zeros", [1, 2, 50, 77, 149, 150])
def test_a_threshold_over_many_is_that_of_all_of_them_together(zeros: int) -> None:
    draw = torch.Generator().manual_seed(2)
    matrices = [torch.randn(size, generator=draw).abs() for size in ((5, 10), (10, 5), (7, 7))]
    matrices.append(matrices[0][0, :1].clone())  # an equal score elsewhere
    threshold, at_threshold = global_threshold([lambda m=m: m for m in matrices], zeros)  # type: ignore[misc]
    together = torch.cat([m.flatten() for m in matrices]).sort().values
    assert threshold == float(together[zeros - 1])
    gone = 0
    for matrix in matrices:
        kept, at_threshold = keep_above(matrix, threshold, at_threshold)
        assert bool((matrix[~kept] <= threshold).all())
        gone += int((~kept).sum())
    assert gone == zeros


def inputs_and_weight(outputs: int, inputs: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W and correlated inputs X `[I, tokens]` of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=draw) @ torch.randn(inputs, tokens, generator=draw)
    scale = torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=draw), None]
    return torch.randn(outputs, inputs, generator=draw), mixed * scale


def brain_surgery(
    weight: np.ndarray, hessian: np.ndarray, sparsity: float, pattern: tuple[int, int] | None
) -> np.ndarray:
    """Optimal brain surgery in the order of columns: the inverse of H's part from column j on is made anew for each j.
    The mask is chosen over the whole matrix at once, or for every m columns when their first is reached.
    """
    weight, (outputs, inputs) = weight.copy(), weight.shape

    def score(column: int) -> np.ndarray:
        return weight[:, column] ** 2 / np.linalg.inv(hessian[column:, column:])[0, 0]

    goes = np.zeros(weight.shape, dtype=bool)
    if pattern is None:
        scores = np.stack([score(column) for column in range(inputs)], axis=1)
        goes.flat[np.argsort(scores.ravel(), kind="stable")[: round(sparsity * weight.size)]] = True
    for column in range(inputs):
        if pattern is not None and column % pattern[1] == 0:
            scores = np.stack([score(c) for c in range(column, column + pattern[1])], axis=1)
            for row in range(outputs):
                lowest = np.argsort(scores[row], kind="stable")[: pattern[1] - pattern[0]]
                goes[row, column + lowest] = True
        inverse = np.linalg.inv(hessian[column:, column:])
        for row in range(outputs):
            if goes[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0.0
    return weight


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_sparse_gpt_is_optimal_brain_surgery_column_by_column(pattern: tuple[int, int] | None) -> None:
    weight, inputs = inputs_and_weight(6, 24, 60)
    weight, products = weight.double(), (inputs @ inputs.T).double()
    hessian = products + DAMPING * products.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    expected = brain_surgery(weight.numpy(), hessian.numpy(), 0.5, pattern)
    # Without a pattern the mask is chosen block by block: one block holds all columns here.
    found, kept = sparse_gpt(weight, products, sparsity=0.5, pattern=pattern, block=128 if pattern is None else 8)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert bool((found[~kept] == 0).all())
    assert int((~kept).sum()) == 72


def test_blocks_of_columns_change_the_work_and_not_the_result() -> None:
    weight, inputs = inputs_and_weight(6, 24, 60)
    whole, _ = sparse_gpt(weight.double(), (inputs @ inputs.T).double(), sparsity=0.0, pattern=(2, 4), block=24)
    parts, _ = sparse_gpt(weight.double(), (inputs @ inputs.T).double(), sparsity=0.0, pattern=(2, 4), block=4)
    torch.testing.assert_close(parts, whole)


def test_sparse_gpt_with_unrelated_inputs_is_magnitude() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    for products in (torch.eye(12), torch.zeros(12, 12)):
        found, kept = sparse_gpt(weight, products, sparsity=0.4)
        assert torch.equal(kept, keep_highest(weight.abs(), 24))
        assert torch.equal(found, weight * kept)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_each_method_leaves_less_error_than_the_simpler_one(sparsity: float) -> None:
    """‖WX − ŴX‖ on correlated inputs: SparseGPT below Wanda below magnitude, and counts that are exact."""
    weight, inputs = inputs_and_weight(64, 192, 1000)
    products, zeros = inputs @ inputs.T, num_zeros(192, sparsity)
    surgery, kept = sparse_gpt(weight, products, sparsity=sparsity)
    assert int((~kept).sum()) == num_zeros(weight.numel(), sparsity)
    wanda = weight * keep_highest_in_rows(wanda_scores(weight, products.diagonal()), zeros)
    magnitude = weight * keep_highest_in_rows(weight.abs(), zeros)
    errors = [float(((weight - pruned) @ inputs).norm()) for pruned in (surgery, wanda, magnitude)]
    assert errors[0] < errors[1] < errors[2]
