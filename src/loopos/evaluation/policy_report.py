"""A policy's part of a report: curves by iteration, reward over KL compared with best-of-n, and monitors.

Compared points are measured on the same prompts, those of validation; figures on an iteration's own training prompts
are drawn beside them and labeled so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loopos.config.figures import figure
from loopos.evaluation.blocks import Block, Grid, Heading, Paragraph, Picture, number, spread
from loopos.evaluation.drawing import curves_svg, drawing, svg_of
from loopos.evaluation.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """`kl` to the reference in nats, and the mean `reward`."""

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
    """Reward over KL: the policy's `points` in the order of iterations as a line called `label`, named at both ends;
    points of `best_of_n` with their names. A non-finite point leaves a gap and has no name. Raises ValueError without a
    finite point.
    """
    if not any(_is_finite(point) for point in [*points, *best_of_n]):
        raise ValueError(f"got {len(points) + len(best_of_n)} points, none of them finite; expected at least one")
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
                    position = (point.kl, point.reward)
                    # A name may contain dollar signs, which would start a formula.
                    axes.annotate(point.name, position, (4, 4), textcoords="offset points", parse_math=False)
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


# In the order of the panels; figures that were not measured are left out.
_PANELS = {
    "reward": "Reward",
    "kl": "KL to the reference, nats per response",
    "judge": "Judge",
    "win_rate": "Win rate against the start, by the judge",
    "reward_win_rate": "Win rate against the start, by the reward",
    "entropy": "Entropy, nats per token",
    "response_length": "Response length, tokens",
    "eos_rate": "Fraction of finished responses",
    "repetition": "Repetition",
    "clip_share": "Clipped fraction",
    "approximate_kl": "Approximate KL of the updates",
    "policy_loss": "Policy loss",
    "value_loss": "Value loss",
    "explained_variance": "Explained variance of the values",
    "kl_coefficient": "KL coefficient",
}
_LISTED = (
    "reward",
    "kl",
    "entropy",
    "response_length",
    "eos_rate",
    "repetition",
    "clip_share",
    "kl_coefficient",
    "explained_variance",
)
_MOST_ITERATIONS_LISTED = 40
# Key of `guards` → the metric that it watches, and its limit as text.
_MONITORS = {
    "kl": ("kl", "KL at most {limit} nats per response"),
    "entropy_share": ("entropy", "entropy at least {limit} of its start"),
    "length_ratio": ("response_length", "mean length within a factor of {limit} of its start"),
    "repetition": ("repetition", "repetition at most {limit}"),
    "eos_rate_drop": ("eos_rate", "fraction of finished responses at most {limit} below its start"),
    "judge_drop": ("judge", "judge at most {limit} below its best while the reward has risen"),
}


@dataclass
class _Iteration:
    """The rollouts and updates of one iteration."""

    rollout: Mapping[str, Any]
    steps: list[Mapping[str, Any]] = field(default_factory=list)

    def of(self, name: str) -> float | None:
        """The figure of the rollouts, or the mean over the iteration's updates."""
        if (found := number(self.rollout.get(name))) is not None:
            return found
        values = [value for step in self.steps if (value := number(step.get(name))) is not None]
        return statistics.fmean(values) if values else None


def policy_blocks(run: RunFolder) -> list[Block]:
    """The report of a run with rollouts; nothing for other runs."""
    iterations, validations = _by_iteration(run.events)
    if not iterations:
        return []
    parts: list[Block] = [Heading("Iterations"), Picture("iterations", _curves(iterations, validations))]
    if validations:
        sources = (
            "validation: the same prompts every time. training: the prompts of the iteration, different each time."
        )
        parts.append(Paragraph(sources))
    names = [name for name in _LISTED if any(each.of(name) is not None for each in iterations)]
    listed = spread(iterations, _MOST_ITERATIONS_LISTED)
    rows = [(str(each.rollout["iteration"] + 1), *(_cell(each.of(name)) for name in names)) for each in listed]
    parts.append(Grid(("iteration", *names), rows, numbers=range(len(names) + 1)))
    best = [event["metrics"] for event in run.events if event["event"] == "best_of_n"]
    return [*parts, *_frontier(iterations, validations, best), *_monitor_blocks(run)]


def _by_iteration(
    events: Sequence[Mapping[str, Any]],
) -> tuple[list[_Iteration], list[tuple[int, Mapping[str, Any]]]]:
    """The iterations in order, and each validation with the number of iterations before it."""
    iterations: list[_Iteration] = []
    validations = []
    for event in events:
        if event["event"] == "rollout":
            iterations.append(_Iteration(event["metrics"]))
        elif event["event"] == "step" and iterations:
            iterations[-1].steps.append(event["metrics"])
        elif event["event"] == "validation":
            validations.append((len(iterations), event["metrics"]))
    return iterations, validations


def _curves(iterations: Sequence[_Iteration], validations: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """One panel per figure, over the number of iterations trained when it was measured."""
    panels = {}
    for name, title in _PANELS.items():
        written = [(float(each.rollout["iteration"]), each.of(name)) for each in iterations]
        judged = [(float(num_done), number(metrics.get(name))) for num_done, metrics in validations]
        lines = {
            source: [(num_done, value) for num_done, value in points if value is not None]
            for source, points in (("training", written), ("validation", judged))
        }
        if any(lines.values()):
            panels[title] = {source: points for source, points in lines.items() if points}
    return curves_svg(panels, axis="iterations trained")


def _frontier(
    iterations: Sequence[_Iteration],
    validations: Sequence[tuple[int, Mapping[str, Any]]],
    best: Sequence[Mapping[str, Any]],
) -> list[Block]:
    """Reward over KL on the validation prompts, and best-of-n on the same prompts as the baseline without training; for
    a run without validation, on the prompts of each iteration.
    """
    measured = validations or [(int(each.rollout["iteration"]), each.rollout) for each in iterations]
    path = [
        FrontierPoint(
            "start" if num_done == 0 else f"iteration {num_done}", _or_nan(metrics, "kl"), _or_nan(metrics, "reward")
        )
        for num_done, metrics in measured
    ]
    points = [FrontierPoint(f"best of {each['n']}", each["kl"], each["reward"]) for each in best]
    if not any(math.isfinite(point.kl) and math.isfinite(point.reward) for point in path):
        return []
    if validations:
        label, sentence = "policy, validation prompts", "Policy and best-of-n answer the same validation prompts."
    else:
        label = "policy, training prompts"
        sentence = "There was no validation: each point is measured on the training prompts of its iteration."
    parts: list[Block] = [Heading("Reward over KL"), Picture("frontier", frontier_svg(path, points, label=label))]
    parts.append(Paragraph(sentence))
    if best:
        rows = [
            (str(each["n"]), *(_cell(number(each.get(name))) for name in ("kl", "reward", "judge"))) for each in best
        ]
        parts += [
            Paragraph("Best of n answers of the policy before training, chosen by the reward; KL: log n − (n − 1)/n."),
            Grid(("n", "kl", "reward", "judge"), rows, numbers=range(4)),
        ]
    return parts


def _monitor_blocks(run: RunFolder) -> list[Block]:
    """All monitors with their limits, and when they alerted."""
    section: Mapping[str, Any] = run.config.get("guards") or {}
    alerts = [event for event in run.events if event["event"] == "alert"]
    if not section and not alerts:
        return []
    rows = [_monitor_row(key, section.get(key), alerts) for key in _MONITORS]
    ends = "An alert ends the run." if section.get("stop") else "An alert does not end the run (guards.stop is false)."
    parts: list[Block] = [Heading("Guards"), Grid(("guard", "limit", "alerts"), rows), Paragraph(ends)]
    messages = [
        f"Step {each['step']}: {each['metrics']['message']}." for each in alerts if "message" in each["metrics"]
    ]
    return [*parts, *map(Paragraph, messages)]


def _monitor_row(key: str, limit: float | None, alerts: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    metric, template = _MONITORS[key]
    times = list(_alerts_of(metric, alerts))
    if limit is None and not times:
        return f"guards.{key}", "off", ""
    allowed = "" if limit is None else template.format(limit=figure(limit))
    return f"guards.{key}", allowed, "; ".join(times) or "never"


def _alerts_of(metric: str, alerts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in alerts:
        found = each["metrics"]
        if found["name"] == metric:
            yield f"step {each['step']}: {_cell(number(found['value']))}, limit {_cell(number(found['limit']))}"


def _cell(value: float | None) -> str:
    return "" if value is None else figure(value)


def _or_nan(metrics: Mapping[str, Any], name: str) -> float:
    found = number(metrics.get(name))
    return math.nan if found is None else found
