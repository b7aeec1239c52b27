"""What the reports of changed models share, in Markdown.

Enters: a `Changed`. Leaves: the table of before and after, the notes, the recipe. Left out: what one kind of change
alone tells (`pruning/report.py`, `quantizing/report.py`), measuring.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.deploy.shipped_folder import REPORT
from loopos.evaluation.markdown import cell, table

if TYPE_CHECKING:
    from loopos.deploy.weight_change import Changed

_SPEED = (
    "speed: the model before and the one after in turn (A B A B), in one number format, on this machine as busy as it "
    "was; each figure is the median of 5 goes, the ratio the median of the pairs' ratios. Reading is a forward pass "
    "over 256 tokens; writing is greedy, 32 tokens behind a prompt of 16. Less than 3% apart counts as as fast"
)


def write_parts(folder: Path, changed: Changed[Any, Any], parts: Sequence[str]) -> None:
    """Writes `report.md`: the parts, then notes and recipe."""
    notes = ["## Notes", listed([*changed.notes, _SPEED])]
    given = changed.recipe.model_dump(mode="json", exclude_defaults=True)
    recipe = table(("key", "value"), [(name, f"`{cell(value)}`") for name, value in given.items()])
    (folder / REPORT).write_text("\n\n".join([*parts, *notes, "## Recipe", recipe]) + "\n", encoding="utf-8")


def summary(changed: Changed[Any, Any], heads: Sequence[str], more: Sequence[Sequence[str]] = ()) -> str:
    """Before and after, a column a model. heads: of the models after; more: rows besides, with an empty cell for the
    model before.
    """
    before, models = changed.before, [each.measured for each in changed.after]
    rows: list[Sequence[str]] = [
        ["parameters", f"{before.parameters:,}", *(f"{model.parameters:,}" for model in models)],
        *more,
        ["weights (MB)", megabytes(before.weight_bytes), *(
            f"{megabytes(each.measured.weight_bytes)} ({each.share:.1%})" for each in changed.after
        )],
    ]  # fmt: skip
    for name, value in before.metrics.items():
        after = [model.metrics.get(name) for model in models]
        rows.append([name, value_shown(value), *(value_shown(each) + _change(value, each) for each in after)])
    for number, first in enumerate(changed.after[0].rates):
        rates = [each.rates[number] for each in changed.after]
        was = statistics.median(rate.before for rate in rates)
        told = [f"{rate.after:,.0f} (×{rate.ratio:.2f}, {rate.verdict})" for rate in rates]
        rows.append([f"{first.name} (tokens/s)", f"{was:,.0f}", *told])
    return table(("", f"before, in {before.precision}", *heads), rows)


def listed(sentences: Sequence[str]) -> str:
    """One under another."""
    return "\n".join(f"- {cell(sentence)}" for sentence in sentences)


def value_shown(value: float | None) -> str:
    """A metric in a cell: counts in full, other numbers with five digits; empty for none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.5g}"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"


def _change(before: float, after: float | None) -> str:
    return "" if after is None or before in (after, 0) else f" ({after / before - 1:+.2%})"
