"""What a pruning did and cost, in Markdown and as a curve.

Enters: a `PruningResult`. Leaves: `report.md`, and of several shares an SVG of the metric. Left out: measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loopos.config.recipe import Recipe
from loopos.deploy.quality import Measured
from loopos.deploy.shipped_folder import REPORT
from loopos.evaluation.drawing import drawing, svg_of
from loopos.evaluation.markdown import cell, shown, table

if TYPE_CHECKING:
    from loopos.deploy.prune import PrunedModel, PruningResult

_MAIN = ("perplexity", "accuracy", "micro_f1", "mae", "pair_accuracy")


def write_report(folder: Path, result: PruningResult) -> None:
    """Writes `report.md`, and the curve beside it where there are several shares and a metric."""
    recipe = result.recipe
    parts = [f"# {recipe.model}, pruned by {recipe.method}", _summary(result)]
    metric = main_metric(result.before)
    if metric is not None and len(result.after) > 1:
        file = f"{metric}.svg"
        (folder / file).write_text(curve_svg(result, metric), encoding="utf-8")
        parts += [f"## {metric} by sparsity", f"![{metric}]({file})"]
    for pruned in result.after:
        parts += [f"## Sparsity {pruned.sparsity:g}" + (f": `{pruned.name}/`" if pruned.name else "")]
        parts += ["\n".join(f"- {cell(sentence)}" for sentence in pruned.said), _zeros(pruned)]
    notes = [*result.notes, _speed_note()]
    parts += ["## Notes", "\n".join(f"- {cell(note)}" for note in notes)]
    parts += ["## Recipe", recipe_table(recipe)]
    (folder / REPORT).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main_metric(measured: Measured) -> str | None:
    """The metric that a curve shows; None where nothing was measured."""
    names = [*(name for name in _MAIN if name in measured.metrics), *measured.metrics]
    return names[0] if names else None


def curve_svg(result: PruningResult, metric: str) -> str:
    """The metric over the share of the blocks' weights that is gone; the model before stands at 0."""
    points = [(0.0, result.before.metrics[metric])]
    points += [(pruned.sparsity, pruned.measured.metrics[metric]) for pruned in result.after]
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


def _summary(result: PruningResult) -> str:
    """Before and after, a column a model."""
    models = [result.before, *(pruned.measured for pruned in result.after)]
    head = ["", "before", *(f"sparsity {pruned.sparsity:g}" for pruned in result.after)]
    rows: list[Sequence[str]] = [
        ["parameters", *(f"{model.parameters:,}" for model in models)],
        ["zeros in the blocks' linear layers", "", *(_share_of_zeros(pruned) for pruned in result.after)],
        ["weights (MB)", *(f"{model.weight_bytes / 1e6:,.1f} ({model.precision})" for model in models)],
    ]
    for name in result.before.metrics:
        rows.append([name, *(value_shown(model.metrics.get(name)) for model in models)])
    rows.append(["reading (tokens/s)", *(_with_factor(model.reading, result.before.reading) for model in models)])
    if result.before.writing is not None:
        written = [_with_factor(model.writing or 0.0, result.before.writing) for model in models]
        rows.append(["writing (tokens/s)", *written])
    return table(head, rows)


def _share_of_zeros(pruned: PrunedModel) -> str:
    weights, zeros = sum(each.weights for each in pruned.zeros), sum(each.zeros for each in pruned.zeros)
    return f"{zeros:,} of {weights:,} ({zeros / weights:.2%})"


def _zeros(pruned: PrunedModel) -> str:
    rows = [(f"`{each.kind}`", f"{each.weights:,}", f"{each.zeros:,}", f"{each.zeros / each.weights:.2%}")
            for each in pruned.zeros]  # fmt: skip
    return table(("linear layers of all blocks", "weights", "zeros", "share"), rows)


def value_shown(value: float | None) -> str:
    """A metric in a cell: counts in full, other numbers with five digits; empty for none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.5g}"


def _with_factor(value: float, before: float) -> str:
    return f"{value:,.0f} (×{value / before:.2f})"


def _speed_note() -> str:
    return (
        "speed: each model by itself, one after the other, on this machine as busy as it was; median of 5 goes. "
        "Reading is a forward pass over 256 tokens, writing 4 greedy completions of 32 tokens side by side. A tenth "
        "more or less says nothing"
    )


def recipe_table(recipe: Recipe) -> str:
    """The keys that were given."""
    given = recipe.model_dump(mode="json", exclude_defaults=True)
    return table(("key", "value"), [(name, f"`{cell(value)}`") for name, value in given.items()])
