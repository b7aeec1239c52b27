"""Agreement of annotators beyond chance: Cohen's κ, Fleiss' κ, Krippendorff's α.

Pure functions. Apart from `quality`, which draws them from a study: they know only numbers. A measure that is not
defined for its input is None, never nan: with no pair of judgments, or with one category only, there is nothing to
agree on beyond chance.
Letters: N units (items), C categories, n judgments of a unit.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["nominal", "ordinal", "interval"]


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two annotators on the same units: κ = (p_o − p_e) / (1 − p_e), p_o the fraction of units on which
    they agree, p_e = Σ_c p_1c p_2c (Cohen 1960). From −1 to 1; None without units or if both use one category only.
    """
    assert len(first) == len(second), (len(first), len(second))
    total = len(first)
    if total == 0:
        return None
    one, other = Counter(first), Counter(second)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    expected = sum(one[each] * other[each] for each in one) / total**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Agreement of any annotators, the same number n ≥ 2 on every unit: κ = (P̄ − P̄_e) / (1 − P̄_e) (Fleiss 1971).

    P̄ is the mean over units of Σ_c n_c (n_c − 1) / (n (n − 1)), P̄_e = Σ_c p_c². None without units or with one
    category. Raises ValueError if units differ in their number of judgments.
    """
    if not units:
        return None
    sizes = {len(unit) for unit in units}
    if len(sizes) > 1 or min(sizes) < 2:
        raise ValueError(f"got units of {sorted(sizes)} judgments; expected the same number, at least 2")
    size = sizes.pop()
    counts = [Counter(unit) for unit in units]
    observed = sum(sum(n * (n - 1) for n in unit.values()) for unit in counts) / (len(units) * size * (size - 1))
    totals = sum(counts, Counter())
    expected = sum((n / (len(units) * size)) ** 2 for n in totals.values())
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level = "nominal") -> float | None:
    """Agreement of any annotators, any number of judgments a unit: α = 1 − D_o / D_e (Krippendorff 2011, Computing
    Krippendorff's Alpha-Reliability).

    D_o is the mean difference δ² of the pairs within units, D_e that of all pairs. δ² of values v, w is [v ≠ w]
    (nominal), (v − w)² (interval), or (Σ from v to w of n_g − (n_v + n_w) / 2)² over the counts n_g of the values in
    between (ordinal). Units with one judgment are left out. None without pairs or with one value only.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in pairable for value in unit)
    total = sum(totals.values())
    if total == 0 or len(totals) < 2:
        return None
    distance = _distance(level, totals)
    observed = sum(_disagreement(Counter(unit), distance) / (len(unit) - 1) for unit in pairable) / total
    expected = _disagreement(totals, distance) / (total * (total - 1))
    return 1 - observed / expected


def bootstrap_interval(
    units: Sequence[Sequence[float]],
    measure: Callable[[Sequence[Sequence[float]]], float | None],
    *,
    seed: int,
    draws: int = 1000,
    coverage: float = 0.95,
) -> tuple[float, float] | None:
    """The percentile interval of a measure over `draws` samples of the units with replacement (Efron 1979). Samples
    for which the measure is not defined are left out; None if more than half are.
    """
    draw = random.Random(seed)
    found = sorted(
        value for _ in range(draws if units else 0) if (value := measure(draw.choices(units, k=len(units)))) is not None
    )
    if len(found) * 2 <= draws:
        return None
    outside = (1 - coverage) / 2
    last = len(found) - 1
    return found[round(outside * last)], found[round((1 - outside) * last)]


def _disagreement(counts: Mapping[float, int], distance: Mapping[tuple[float, float], float]) -> float:
    """Σ over ordered pairs of different judgments of δ²."""
    return sum(counts[one] * counts[other] * distance[one, other] for one in counts for other in counts if one != other)


def _distance(level: Level, totals: Mapping[float, int]) -> dict[tuple[float, float], float]:
    """δ² of each two values."""
    values = sorted(totals)
    found: dict[tuple[float, float], float] = {}
    for low, one in enumerate(values):
        for high in range(low + 1, len(values)):
            other = values[high]
            match level:
                case "nominal":
                    squared = 1.0
                case "interval":
                    squared = (one - other) ** 2
                case "ordinal":
                    between = sum(totals[value] for value in values[low : high + 1])
                    squared = (between - (totals[one] + totals[other]) / 2) ** 2
            found[one, other] = found[other, one] = squared
    return found
