"""What a policy's reward cost in KL → one SVG.

Enters: points of KL and reward, all measured on the same prompts: the policy by iteration, and best-of-n sampling for
comparison. Leaves: the text of an
SVG; equal points give equal text. Left out: measuring the points (`policy_metrics` has best-of-n's) and a run's other
curves (`report`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loopos.evaluation.drawing import drawing, svg_of


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """`kl` to the reference in nats, and the mean `reward` there."""

    name: str
    kl: float
    reward: float


def frontier_svg(
    points: Sequence[FrontierPoint],
    best_of_n: Sequence[FrontierPoint] = (),
    *,
    title: str = "Reward over KL",
    label: str = "policy",
) -> str:
    """Reward over KL: the policy's `points` in the order of iterations as a line called `label`, named at both ends; of
    `best_of_n` each with its name. A point that is not finite leaves a gap and has no name. Raises ValueError without a
    finite point.
    """
    if not any(_is_finite(point) for point in [*points, *best_of_n]):
        raise ValueError(f"{len(points) + len(best_of_n)} points and none finite given, wanted at least one")
    with drawing(6.0, 4.0) as figure:
        axes = figure.add_subplot()
        for name, series, style, named in (
            (label, points, "-o", _ends(points)),
            ("best of n", best_of_n, "D", best_of_n),
        ):
            if not any(_is_finite(point) for point in series):
                continue
            shown = [point if _is_finite(point) else None for point in series]
            axes.plot(
                [point.kl if point else math.nan for point in shown],
                [point.reward if point else math.nan for point in shown],
                style,
                ms=4,
                label=name,
            )
            for point in named:
                if _is_finite(point):
                    place = (point.kl, point.reward)
                    # A name may hold dollar signs, which would else begin a formula.
                    axes.annotate(point.name, place, (4, 4), textcoords="offset points", parse_math=False)
        axes.set_title(title, parse_math=False)
        axes.set_xlabel("KL to the reference, nats")
        axes.set_ylabel("reward")
        axes.grid(alpha=0.3)
        axes.legend()
        return svg_of(figure)


def _is_finite(point: FrontierPoint) -> bool:
    return math.isfinite(point.kl) and math.isfinite(point.reward)


def _ends(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    finite = [point for point in points if _is_finite(point)]
    return finite if len(finite) < 2 else [finite[0], finite[-1]]
