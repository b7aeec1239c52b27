"""Every method against numbers worked by hand, a slow reference in NumPy, or an identity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loopos.merging import methods
from loopos.merging.methods import (
    DELTA_METHODS,
    Parameters,
    breadcrumbs,
    drop,
    drop_by_rank,
    elected,
    generator_of,
    linear,
    merged,
    model_stock,
    slerp,
    trim,
)


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draws(index: int) -> torch.Generator:
    return generator_of(7, "a.weight", index)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_linear_by_hand() -> None:
    # (1·[1, 2] + 3·[5, −2]) / 4 = [16, −4] / 4, and without the division [16, −4].
    close(linear([of(1, 2), of(5, -2)], [1, 3], normalize=True), of(4, -1))
    close(linear([of(1, 2), of(5, -2)], [1, 3], normalize=False), of(16, -4))


def test_linear_of_one_model_twice_is_the_model() -> None:
    one = random(5, 7)
    assert torch.equal(linear([one.clone(), one.clone()], [1, 1], normalize=True), one)


def test_slerp_by_hand() -> None:
    # [1, 0] and [0, 2]: Ω = 90°. t = 1/3: sin 60° · [1, 0] + sin 30° · [0, 2] = [√3/2, 1].
    close(slerp(of(1, 0), of(0, 2), 1 / 3), of(math.sqrt(3) / 2, 1))
    # [1, 0] and [1, 1]: Ω = 45°. t = 1/2: sin 22.5° / sin 45° of each.
    share = math.sin(math.pi / 8) / math.sin(math.pi / 4)
    close(slerp(of(1, 0), of(1, 1), 0.5), of(2 * share, share))


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_at_its_ends_is_one_of_the_models(t: float) -> None:
    one, two = random(4, 6), random(4, 6, seed=1)
    assert torch.equal(slerp(one.clone(), two.clone(), t), two if t else one)


def test_slerp_keeps_the_length_of_equal_lengths() -> None:
    one, two = random(50), random(50, seed=1)
    one, two = one / one.norm(), two / two.norm()
    for t in (0.2, 0.5, 0.9):
        assert float(slerp(one.clone(), two.clone(), t).norm()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("other", [of(2, 4), of(-2, -4), of(0, 0), of(1.0001, 2)])
def test_slerp_of_colinear_tensors_is_linear(other: Tensor) -> None:
    close(slerp(of(1, 2), other.clone(), 0.25), 0.75 * of(1, 2) + 0.25 * other)


def test_task_arithmetic_by_hand() -> None:
    # Deltas from [1, 1] are [1, 0] and [−3, 2]: 1 + 0.5·(1·1 + 2·(−3)) = −1.5, 1 + 0.5·(0 + 2·2) = 3.
    found = merged(
        "task_arithmetic", [of(2, 1), of(-2, 3)], [1, 2], Parameters(scale=0.5, normalize=False), base=of(1, 1)
    )
    close(found, of(-1.5, 3))


@pytest.mark.parametrize("method", DELTA_METHODS)
def test_a_scale_of_nothing_is_the_base(method: str) -> None:
    base = random(6, 8)
    parameters = Parameters(scale=0.0, density=0.5, epsilon=0.1, drop_smallest=0.3, drop_largest=0.1)
    tensors = [random(6, 8, seed=1), random(6, 8, seed=2)]
    assert torch.equal(merged(method, tensors, [1, 1], parameters, base=base, draws=draws), base)


def test_trim_by_hand() -> None:
    # 2 of 5 by magnitude: −4 and 3.
    close(trim(of(1, -4, 0.5, 3, -2), 0.4), of(0, -4, 0, 3, 0))
    # Of equal magnitudes the first stay, so that the share is kept exactly.
    close(trim(of(1, -1, 1, -1), 0.5), of(1, -1, 0, 0))
    # A share of less than one element keeps one.
    close(trim(of(1, 5), 0.1), of(0, 5))


def test_election_by_hand() -> None:
    # 1st: 3 − 1 − 1 > 0: 3 alone. 2nd: −2 − 2 + 3 < 0: the mean of −2 and −2. 3rd: 1 − 1 + 0: equal, plus, 1.
    # 4th: 0 + 4 + 2: zeros do not count: 3.
    deltas = [of(3, -2, 1, 0), of(-1, -2, -1, 4), of(-1, 3, 0, 2)]
    close(elected([each.clone() for each in deltas], [1, 1, 1], normalize=True), of(3, -2, 1, 3))
    close(elected([each.clone() for each in deltas], [1, 1, 1], normalize=False), of(3, -4, 1, 6))
    # Weights 1, 4, 1 turn the first sign: 3 − 4 − 1 < 0: (4·(−1) + 1·(−1)) / 5.
    close(elected([each.clone() for each in deltas], [1, 4, 1], normalize=True)[:1], of(-1))


def ties_reference(
    base: np.ndarray, models: list[np.ndarray], weights: list[float], density: float, scale: float
) -> np.ndarray:
    """Trim, elect and disjoint mean of the paper, element by element."""
    deltas = []
    for model in models:
        delta = (model - base).ravel().copy()
        kept = sorted(range(delta.size), key=lambda i: -abs(delta[i]))[: round(density * delta.size)]
        deltas.append([delta[i] if i in set(kept) else 0.0 for i in range(delta.size)])
    found = []
    for values in zip(*deltas, strict=True):
        mass = sum(w * v for w, v in zip(weights, values, strict=True))
        agree = [(w, v) for w, v in zip(weights, values, strict=True) if v * mass > 0]
        found.append(sum(w * v for w, v in agree) / sum(w for w, _ in agree) if agree else 0.0)
    return base + scale * np.array(found).reshape(base.shape)


def test_ties_equals_a_reference() -> None:
    base, *models = (random(9, 11, seed=seed) for seed in range(4))
    parameters = Parameters(scale=0.7, density=0.4)
    expected = ties_reference(
        base.double().numpy(), [each.double().numpy() for each in models], [1.0, 2.0, 0.5], 0.4, 0.7
    )
    found = merged("ties", [each.clone() for each in models], [1.0, 2.0, 0.5], parameters, base=base)
    close(found, torch.from_numpy(expected).float(), 2e-6)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "breadcrumbs", "task_arithmetic"])
def test_all_of_one_model_is_that_model(method: str) -> None:
    base, model = random(6, 8), random(6, 8, seed=1)
    close(merged(method, [model.clone()], [1], Parameters(density=1.0), base=base, draws=draws), model)


def test_dare_that_drops_nothing_is_task_arithmetic() -> None:
    base, *models = (random(6, 8, seed=seed) for seed in range(3))
    parameters = Parameters(density=1.0, scale=0.6, normalize=False)
    one, two = (
        merged(method, [each.clone() for each in models], [1, 0.5], parameters, base=base, draws=draws)
        for method in ("dare_linear", "task_arithmetic")
    )
    assert torch.equal(one, two)


def test_dare_keeps_its_fraction_and_its_expectation() -> None:
    delta = random(40) + 2
    total, kept = torch.zeros(40), 0
    for seed in range(3000):
        found = drop(delta.clone(), 0.3, generator_of(seed, "a", 0))
        assert set(found[found != 0].tolist()) <= set((delta / 0.3).tolist())
        total += found
        kept += int((found != 0).sum())
    # 120,000 draws of 0.3: a standard deviation of 0.0013. Each mean of 3000: δ·√(0.7/0.3/3000) = 0.028 δ.
    assert kept / 120_000 == pytest.approx(0.3, abs=0.006)
    assert float(((total / 3000 - delta) / delta).abs().max()) < 0.028 * 4


def test_the_draws_are_repeatable_and_differ_by_name_index_and_seed() -> None:
    drawn = [
        drop(torch.ones(64), 0.5, generator_of(*each))
        for each in ((1, "a", 0), (1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(drawn[0], other) for other in drawn[2:])


def test_della_drops_small_ones_more_often() -> None:
    # A row of 4 by falling magnitude: 4, −3, 2, 1. Density 0.5, ε 0.4: p = 0.3 + 0.1·rank = 0.3, 0.4, 0.5, 0.6.
    rows = of(1, -3, 2, 4).repeat(20_000, 1)
    found = drop_by_rank(rows.clone(), 0.5, 0.4, generator_of(0, "a", 0))
    kept = (found != 0).float().mean(0)
    close(kept, of(0.4, 0.6, 0.5, 0.7), 0.015)
    # What is kept is divided by 1 − p: 1/0.4, −3/0.6, 2/0.5, 4/0.7; the mean is the row.
    close(found.max(0).values + found.min(0).values, of(2.5, -5, 4, 4 / 0.7))
    assert float((found.mean(0) - of(1, -3, 2, 4)).abs().max()) < 0.1


def test_della_ranks_within_each_row() -> None:
    # Without a window of probabilities it is DARE: the same draws, the same result.
    delta = random(8, 16)
    one = drop_by_rank(delta.clone(), 0.5, 0.0, generator_of(0, "a", 0))
    close(one, torch.where(one != 0, delta / 0.5, 0.0))
    # A row of small numbers below one of large ones loses no more than that: rows have their own ranks.
    rows = torch.stack([torch.full((1000,), 1e-3), torch.full((1000,), 1e3)])
    kept = (drop_by_rank(rows, 0.5, 0.8, generator_of(0, "b", 0)) != 0).float().mean(1)
    close(kept, of(0.5, 0.5), 0.07)


def test_breadcrumbs_by_hand() -> None:
    # Of 10 the smallest 4 (0.1 … 0.4) and the largest 2 (−9, 8) are dropped.
    delta = of(0.1, -9, 0.2, 3, 0.3, 8, -0.4, 1, 2, -4)
    close(breadcrumbs(delta, 0.4, 0.2), of(0, 0, 0, 3, 0, 0, 0, 1, 2, -4))


def test_model_stock_by_hand() -> None:
    # Deltas [1, 0] and [1, 1] from [0, 1]: cos θ = 1/√2, t = 2 cos θ / (1 + cos θ); the mean delta is [1, 0.5].
    cosine = 1 / math.sqrt(2)
    t = 2 * cosine / (1 + cosine)
    close(model_stock(of(0, 1), [of(1, 0), of(1, 1)]), of(t, 1 + 0.5 * t))
    # Three at right angles to each other: t = 0, the base.
    close(model_stock(of(1, 2, 3), [of(1, 0, 0), of(0, 1, 0), of(0, 0, 1)]), of(1, 2, 3))
    # Three with the cosines 1/2 of each two: t = 1.5 / (1 + 1) = 0.75.
    close(model_stock(torch.zeros(3), [of(1, 1, 0), of(1, 0, 1), of(0, 1, 1)]), torch.full((3,), 0.75 * 2 / 3))


def test_model_stock_of_equal_models_is_the_model() -> None:
    base, model = random(4, 5), random(4, 5, seed=1)
    close(merged("model_stock", [model.clone() for _ in range(3)], [1, 1, 1], Parameters(), base=base), model)
    close(merged("model_stock", [base.clone(), base.clone()], [1, 1], Parameters(), base=base), base)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs", "slerp", "linear", "model_stock"])
def test_the_chunk_size_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Draws come in the order of elements, so that pieces of any size of 16 rows give the same.
    parameters = Parameters(density=0.5, epsilon=0.2, drop_smallest=0.4, drop_largest=0.1)
    found = []
    for piece in (2**20, 256):
        monkeypatch.setattr(methods, "CHUNK", piece)
        tensors = [random(64, 16, seed=1), random(64, 16, seed=2)]
        found.append(merged(method, tensors, [1, 2], parameters, base=random(64, 16), draws=draws))
    close(found[0], found[1])


def test_magnitudes_are_found_exactly_among_many() -> None:
    values = random(3000) * torch.logspace(-30, 30, 3000)
    ranked = values.abs().sort(descending=True).values
    for count in (1, 2, 700, 2999, 3000):
        assert methods.magnitude_at(values, count) == (float(ranked[count - 1]), count - 1)
