"""Metrics of a reward model on pairs of a better and a worse response.

A metric that is not defined for its input is absent, never nan. Letters: P pairs; Δ = score of the better − score of
the worse; σ(Δ) = 1 / (1 + e^−Δ), the probability by Bradley and Terry (1952) that the better one is preferred; p = that
probability by people's labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy
from numpy.typing import ArrayLike

from loopos.evaluation.metrics import NUM_CALIBRATION_BINS, Floats, Integers, correlation, finite_floats
from loopos.evaluation.policy_metrics import win_rate

PREFERENCE_METRIC_DIRECTION: Mapping[str, Literal["min", "max"]] = {
    "loss": "min",
    "pair_accuracy": "max",
    "ece": "min",
    "margin_correlation": "max",
}


@dataclass(frozen=True, slots=True)
class Bucket:
    """Pairs with a margin from `low` up to `high`; `accuracy` with its 95% interval."""

    low: float
    high: float
    pairs: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Ordered pairs whose mean σ(Δ) is `confidence`; the first was preferred with `frequency`."""

    confidence: float
    frequency: float
    pairs: int


def preference_metrics(
    better: ArrayLike,
    worse: ArrayLike,
    *,
    probabilities: ArrayLike | None = None,
    margins: ArrayLike | None = None,
    better_lengths: ArrayLike | None = None,
    worse_lengths: ArrayLike | None = None,
) -> dict[str, float]:
    """Metrics of the scores `better` [P] and `worse` [P]; the optional arguments are [P] too.

    `probabilities`: p, default 1; below 0.5 the worse is the preferred one. pair_accuracy: fraction of pairs whose
    preferred response scores higher, ties half, without pairs of p = 0.5, with its Wilson 95% interval from
    pair_accuracy_low to pair_accuracy_high · num_pairs · loss: mean −[p log σ(Δ) + (1 − p) log σ(−Δ)] in nats ·
    score_gap: mean Δ · ece: over 15 bins of equal width (a, b] of the confidence max(σ(Δ), σ(−Δ)) in (0.5, 1],
    |bin| / P · |confidence − fraction preferred| (Guo et al. 2017, section 2), probabilities p unrounded; a tie is half
    correct · margin_correlation: Pearson's r of Δ with the margins · length_correlation: Pearson's r of all 2P scores
    with the lengths, and longer_wins: the accuracy of "the longer one is better", the baseline of a model that knows
    only lengths. Correlations with a constant are absent. Raises ValueError on empty, non-finite or misshapen input.
    """
    high, low = _scores(better, worse)
    gap = high - low
    chance = _chances(probabilities, len(gap))
    decided = chance != 0.5
    sign = numpy.sign(chance - 0.5)[decided]
    metrics = {
        "num_pairs": float(len(gap)),
        "loss": float((chance * numpy.logaddexp(0, -gap) + (1 - chance) * numpy.logaddexp(0, gap)).mean()),
        "score_gap": float(gap.mean()),
        "ece": _calibration_error(gap, chance),
    }
    if decided.any():
        found = win_rate(sign * high[decided], sign * low[decided])
        metrics |= {"pair_accuracy": found.rate, "pair_accuracy_low": found.low, "pair_accuracy_high": found.high}
    if margins is not None:
        _add_correlation(metrics, "margin_correlation", gap, _column("margins", margins, len(gap)))
    if (better_lengths is None) != (worse_lengths is None):
        raise ValueError("lengths: got one side only; expected better_lengths and worse_lengths, or neither")
    if better_lengths is not None and worse_lengths is not None:
        lengths = [
            _column("better_lengths", better_lengths, len(gap)),
            _column("worse_lengths", worse_lengths, len(gap)),
        ]
        _add_correlation(metrics, "length_correlation", numpy.concatenate([high, low]), numpy.concatenate(lengths))
        if decided.any():
            metrics["longer_wins"] = win_rate(sign * lengths[0][decided], sign * lengths[1][decided]).rate
    return metrics


def brier_score(better: ArrayLike, worse: ArrayLike, probabilities: ArrayLike | None = None) -> float:
    """Mean of (σ(Δ) − p)² of the scores `better` [P] and `worse` [P] (Brier 1950); 0.25 is knowing nothing.
    `probabilities` [P]: p, default 1. Raises ValueError on empty, non-finite or misshapen input.
    """
    high, low = _scores(better, worse)
    return float(((_sigmoid(high - low) - _chances(probabilities, len(high))) ** 2).mean())


def margin_buckets(
    better: ArrayLike, worse: ArrayLike, margins: ArrayLike, *, edges: ArrayLike | None = None
) -> list[Bucket]:
    """Accuracy by how clear the preference was: scores and `margins` [P], cut at the inner `edges` (ascending; default:
    the quartiles of the margins) into [edge, next edge).

    The first bucket begins at the smallest margin and the last ends with the largest; empty ones are omitted. Raises
    ValueError on empty, non-finite or misshapen input.
    """
    high, low = _scores(better, worse)
    margin = _column("margins", margins, len(high))
    if edges is None:
        cuts = numpy.unique(numpy.quantile(margin, [0.25, 0.5, 0.75]))
    else:
        cuts = finite_floats("edges", edges, num_axes=1)
        if (numpy.diff(cuts) <= 0).any():
            raise ValueError(f"edges: got {cuts.tolist()}; expected ascending ones")
    indices = numpy.searchsorted(cuts, margin, side="right")
    ends = [float(margin.min()), *cuts.tolist(), float(margin.max())]
    buckets = []
    for index in numpy.unique(indices):
        selected = indices == index
        found = win_rate(high[selected], low[selected])
        begin, end = max(ends[index], ends[0]), min(ends[index + 1], ends[-1])
        buckets.append(Bucket(begin, end, int(selected.sum()), found.rate, found.low, found.high))
    return buckets


def reliability(
    better: ArrayLike, worse: ArrayLike, probabilities: ArrayLike | None = None, bins: int = 10
) -> list[ReliabilityBin]:
    """σ(Δ) compared with the fraction preferred, each pair in both orders (Δ with p, −Δ with 1 − p), so 2P in all, in
    `bins` of equal width [a, b) over 0 to 1, the last one closed; empty ones are omitted. Scores and `probabilities`
    [P]. Raises ValueError on empty, non-finite or misshapen input.
    """
    high, low = _scores(better, worse)
    chance = _chances(probabilities, len(high))
    if bins < 1:
        raise ValueError(f"bins: got {bins}; expected at least 1")
    gaps = numpy.concatenate([high - low, low - high])
    preferred = numpy.concatenate([chance, 1 - chance])
    confidence = _sigmoid(gaps)
    indices = numpy.minimum((confidence * bins).astype(numpy.int64), bins - 1)
    return [
        ReliabilityBin(float(confidence[selected].mean()), float(preferred[selected].mean()), int(selected.sum()))
        for selected in (indices == index for index in numpy.unique(indices))
    ]


def _scores(better: ArrayLike, worse: ArrayLike) -> tuple[Floats, Floats]:
    high = finite_floats("better", better, num_axes=1)
    return high, _column("worse", worse, len(high))


def _column(name: str, values: ArrayLike, num_pairs: int) -> Floats:
    column = finite_floats(name, values, num_axes=1)
    if len(column) != num_pairs:
        raise ValueError(f"{name}: got {len(column)} values for {num_pairs} pairs; expected one for each")
    return column


def _chances(probabilities: ArrayLike | None, num_pairs: int) -> Floats:
    if probabilities is None:
        return numpy.ones(num_pairs)
    chance = _column("probabilities", probabilities, num_pairs)
    if chance.min() < 0 or chance.max() > 1:
        raise ValueError(f"probabilities: got {chance.min()} to {chance.max()}; expected 0 to 1")
    return chance


def _sigmoid(gap: Floats) -> Floats:
    chances: Floats = numpy.exp(-numpy.logaddexp(0, -gap))
    return chances


def _calibration_error(gap: Floats, chance: Floats) -> float:
    confidence = _sigmoid(numpy.abs(gap))
    # A tie prefers neither; in both orders of the pair it would be half correct.
    preferred = numpy.where(gap > 0, chance, numpy.where(gap < 0, 1 - chance, 0.5))
    indices: Integers = numpy.ceil((2 * confidence - 1) * NUM_CALIBRATION_BINS).astype(numpy.int64) - 1
    indices = numpy.clip(indices, 0, NUM_CALIBRATION_BINS - 1)
    surplus = numpy.bincount(indices, weights=confidence - preferred, minlength=NUM_CALIBRATION_BINS)
    return float(numpy.abs(surplus).sum() / len(gap))


def _add_correlation(metrics: dict[str, float], name: str, left: Floats, right: Floats) -> None:
    if numpy.ptp(left) > 0 and numpy.ptp(right) > 0:
        metrics[name] = correlation(left, right)
