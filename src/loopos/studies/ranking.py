"""Strengths of sources (checkpoints, models) from comparisons with ties: Bradley–Terry after Davidson, and Elo.

Letters: S sources, θ_s the log-strength of source s, ν ≥ 0 how often there are ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loopos.config.diagnostics import UserError

Game: TypeAlias = tuple[str, str, float]
"""Two sources and the outcome for the first: 1 a win, 0 a loss, ½ a tie."""
ELO_MEAN, ELO_SCALE = 1000.0, 400.0 / math.log(10.0)
"""A difference of 400 points is odds of 10 : 1."""
_MOST_STEPS, _SMALL = 100, 1e-10


@dataclass(frozen=True, slots=True)
class Strength:
    """`rating` in Elo points, 1000 on average, with its 95% interval; `games`, of which `wins` and `ties`."""

    source: str
    rating: float
    low: float
    high: float
    games: int
    wins: int
    ties: int


@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """Strengths, best first. `tie_parameter`: ν. `log_likelihood` in nats."""

    strengths: tuple[Strength, ...]
    tie_parameter: float
    log_likelihood: float


def bradley_terry(games: Sequence[Game]) -> BradleyTerry:
    """The maximum likelihood of Davidson's model (1970, On Extending the Bradley–Terry Model to Accommodate Ties):

        P(i beats j) = e^θi / Z,   P(tie) = ν e^((θi + θj) / 2) / Z,   Z = e^θi + e^θj + ν e^((θi + θj) / 2)

    by Newton's method in θ and log ν, in which the likelihood is concave; Σ θ = 0. Intervals are ± 1.96 standard
    errors from the inverse information. Raises `UserError` where there is no finite maximum: no games, sources that can
    be split into two groups of which one never lost to the other (Ford 1957), or wins that never contradict each other
    beside ties.
    """
    sources = sorted({name for one, other, _ in games for name in (one, other)})
    _require_finite(sources, games)
    import numpy

    has_ties = any(outcome == 0.5 for *_, outcome in games)
    number = {name: index for index, name in enumerate(sources)}
    rows = numpy.array([(number[one], number[other]) for one, other, _ in games])
    outcomes = numpy.array([outcome for *_, outcome in games], dtype=float)
    size = len(sources) + int(has_ties)
    # Parameters: θ of each source, then log ν. A game's statistics are linear in them, so that the gradient is
    # observed − expected statistics and the Hessian minus their covariance.
    features = numpy.zeros((3, len(games), size))
    index = numpy.arange(len(games))
    features[0, index, rows[:, 0]] = features[1, index, rows[:, 1]] = 1.0
    features[2, index, rows[:, 0]] += 0.5
    features[2, index, rows[:, 1]] += 0.5
    if has_ties:
        features[2, :, -1] = 1.0
    possible = numpy.ones((3, 1)) if has_ties else numpy.array([[1.0], [1.0], [0.0]])
    observed = numpy.select([outcomes == 1.0, outcomes == 0.0], [0, 1], 2)
    # Σ θ = 0 is held by a penalty on the one direction that the likelihood does not see.
    center = numpy.zeros((size, size))
    center[: len(sources), : len(sources)] = 1.0
    parameters = numpy.zeros(size)
    value, gradient, information = _likelihood(features, possible, observed, parameters)
    for _ in range(_MOST_STEPS):
        step = numpy.linalg.solve(information + center, gradient)
        scale = 1.0
        while True:
            new = _likelihood(features, possible, observed, parameters + scale * step)
            if new[0] >= value - _SMALL or scale < _SMALL:
                break
            scale /= 2
        parameters, (value, gradient, information) = parameters + scale * step, new
        if float(numpy.abs(step).max()) < _SMALL:
            break
    covariance = numpy.linalg.inv(information + center) - center / len(sources) ** 2
    errors = numpy.sqrt(numpy.maximum(0.0, numpy.diag(covariance)))
    strengths = [
        _strength(name, float(parameters[index]), float(errors[index]), games) for index, name in enumerate(sources)
    ]
    ranked = tuple(sorted(strengths, key=lambda each: (-each.rating, each.source)))
    return BradleyTerry(ranked, math.exp(parameters[-1]) if has_ties else 0.0, float(value))


def elo(games: Sequence[Game], *, k: float = 32.0) -> dict[str, float]:
    """Ratings after the games in their order, each source starting at 1000 (Elo 1978): r_i += k (outcome − E), E = 1 /
    (1 + 10^((r_j − r_i) / 400)). They depend on the order; `bradley_terry` does not.
    """
    ratings: dict[str, float] = {}
    for one, other, outcome in games:
        difference = ratings.setdefault(other, ELO_MEAN) - ratings.setdefault(one, ELO_MEAN)
        change = k * (outcome - 1.0 / (1.0 + math.exp(difference / ELO_SCALE)))
        ratings[one] += change
        ratings[other] -= change
    return dict(sorted(ratings.items(), key=lambda each: (-each[1], each[0])))


def _likelihood(features: Any, possible: Any, observed: Any, parameters: Any) -> tuple[Any, Any, Any]:
    """Log-likelihood, its gradient `[P]` and information `[P, P]`. features: `[3, games, P]`."""
    import numpy

    logits = features @ parameters
    top = logits.max(axis=0)
    weights = possible * numpy.exp(logits - top)
    total = weights.sum(axis=0)
    chances = weights / total
    index = numpy.arange(features.shape[1])
    value = (logits[observed, index] - top - numpy.log(total)).sum()
    mean = (chances[..., None] * features).sum(axis=0)
    gradient = (features[observed, index] - mean).sum(axis=0)
    second = numpy.einsum("og,ogp,ogq->pq", chances, features, features)
    return value, gradient, second - mean.T @ mean


def _strength(name: str, theta: float, error: float, games: Sequence[Game]) -> Strength:
    own = [outcome for one, _, outcome in games if one == name]
    own += [1.0 - outcome for _, other, outcome in games if other == name]
    reach = 1.959963984540054 * error * ELO_SCALE
    rating = ELO_MEAN + ELO_SCALE * theta
    return Strength(name, rating, rating - reach, rating + reach, len(own), own.count(1.0), own.count(0.5))


def _require_finite(sources: Sequence[str], games: Sequence[Game]) -> None:
    """Raises `UserError` unless the likelihood has a finite maximum: no direction of θ and log ν raises the chance of
    every outcome, or leaves it.

    Such a direction has log ν unchanged, where a group of sources never won or tied against the others; or log ν rises
    by 2, where sources can be moved so that each win is over one at least 2 lower, and ties are within 2.
    """
    if len(sources) < 2:
        raise UserError(f"got comparisons of {len(sources)} sources; expected two or more")
    if any(one == other for one, other, _ in games):
        raise UserError("got a comparison of a source with itself; expected two sources")
    beaten: dict[str, set[str]] = {name: set() for name in sources}
    for one, other, outcome in games:
        if outcome > 0:
            beaten[one].add(other)
        if outcome < 1:
            beaten[other].add(one)
    for start in sources:
        reached, queue = {start}, [start]
        while queue:
            new = beaten[queue.pop()] - reached
            reached |= new
            queue += new
        if len(reached) < len(sources):
            never = ", ".join(sorted(set(sources) - reached))
            raise UserError(
                f"{', '.join(sorted(reached))} never won or tied against {never}: their distance has no finite "
                "estimate; expected comparisons in which each group wins at least once"
            )
    if any(outcome == 0.5 for *_, outcome in games) and _is_one_way(sources, games):
        raise UserError(
            "no source won against one that it lost to, directly or through others, so that the strengths have no "
            "finite estimate; expected more comparisons"
        )


def _is_one_way(sources: Sequence[str], games: Sequence[Game]) -> bool:
    """Whether δ exists with δ_i − δ_j ≥ 2 for each win of i over j, and |δ_i − δ_j| ≤ 2 for each tie: no negative cycle
    of these differences (Bellman 1958).
    """
    limits = set()
    for one, other, outcome in games:
        if outcome == 0.5:
            limits |= {(one, other, 2), (other, one, 2)}
        else:
            # δ of the loser is at most δ of the winner − 2.
            limits.add((one, other, -2) if outcome > 0.5 else (other, one, -2))
    least = dict.fromkeys(sources, 0)
    for _ in range(len(sources) + 1):
        changed = False
        for above, below, limit in limits:
            if least[above] + limit < least[below]:
                least[below], changed = least[above] + limit, True
        if not changed:
            return True
    return False
