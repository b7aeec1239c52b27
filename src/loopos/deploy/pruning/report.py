"""What a pruning did and cost, in Markdown and as a curve.

Enters: a `PruningResult`. Leaves: `report.md`, and of several shares an SVG of the metric. Left out: what every changed
model's report has (`deploy.change_report`), measuring.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopos.deploy.change_report import listed, summary, write_parts
from loopos.deploy.pruning.model import Pruned
from loopos.deploy.quality import Measured
from loopos.evaluation.drawing import drawing, svg_of
from loopos.evaluation.markdown import cell, shown, table

if TYPE_CHECKING:
    from loopos.deploy.prune import PruningResult

_MAIN = ("perplexity", "accuracy", "micro_f1", "mae", "pair_accuracy")


def write_report(folder: Path, result: PruningResult) -> None:
    """Writes `report.md`, and the curve beside it where there are several shares and a metric."""
    recipe = result.recipe
    heads = [f"sparsity {each.told.sparsity:g}" for each in result.after]
    zeros = ["zeros in the blocks' linear layers", "", *(_share_of_zeros(each.told) for each in result.after)]
    parts = [f"# {recipe.model}, pruned by {recipe.method}", summary(result, heads, [zeros])]
    metric = main_metric(result.before)
    if metric is not None and len(result.after) > 1:
        file = f"{metric}.svg"
        (folder / file).write_text(curve_svg(result, metric), encoding="utf-8")
        parts += [f"## {metric} by sparsity", f"![{metric}]({file})"]
    for each in result.after:
        parts += [f"## Sparsity {each.told.sparsity:g}" + (f": `{each.name}/`" if each.name else "")]
        if recipe.structured:
            parts.append(f"**{cell(each.verdict)}**")
        parts += [listed(each.said), _zeros(each.told)]
    write_parts(folder, result, parts)


def main_metric(measured: Measured) -> str | None:
    """The metric that a curve shows; None where nothing was measured."""
    names = [*(name for name in _MAIN if name in measured.metrics), *measured.metrics]
    return names[0] if names else None


def curve_svg(result: PruningResult, metric: str) -> str:
    """The metric over the share of the blocks' weights that is gone; the model before stands at 0."""
    points = [(0.0, result.before.metrics[metric])]
    points += [(each.told.sparsity, each.measured.metrics[metric]) for each in result.after]
    with drawing(6.0, 4.0) as figure:
        axes = figure.add_subplot()
        axes.plot([share for share, _ in points], [value for _, value in points], "-o", ms=4)
        for share, value in points:
            axes.annotate(shown(value), (share, value), (4, 4), textcoords="offset points", parse_math=False)
        axes.set_title(f"{metric} by sparsity: {result.recipe.method}", parse_math=False)
        axes.set_xlabel("sparsity")
        axes.set_ylabel(metric)
        if metric == "perplexity":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        return svg_of(figure)


def _share_of_zeros(pruned: Pruned) -> str:
    weights, zeros = sum(each.weights for each in pruned.zeros), sum(each.zeros for each in pruned.zeros)
    return f"{zeros:,} of {weights:,} ({zeros / weights:.2%})"


def _zeros(pruned: Pruned) -> str:
    rows = [(f"`{each.kind}`", f"{each.weights:,}", f"{each.zeros:,}", f"{each.zeros / each.weights:.2%}")
            for each in pruned.zeros]  # fmt: skip
    return table(("linear layers of all blocks", "weights", "zeros", "share"), rows)
