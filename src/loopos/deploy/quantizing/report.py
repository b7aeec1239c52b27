"""What a quantization did and cost, in Markdown.

Enters: a `QuantizationResult`. Leaves: `report.md`. Left out: measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loopos.deploy.pruning.report import recipe_table, value_shown
from loopos.deploy.shipped_folder import REPORT
from loopos.evaluation.markdown import cell, table

if TYPE_CHECKING:
    from loopos.deploy.quantize import QuantizationResult

_SPEED = (
    "speed: both models in bf16, in turn (A B A B), on this machine as busy as it was; each figure is the median of 5 "
    "goes, the ratio the median of the pairs' ratios. Reading is a forward pass over 256 tokens; writing is greedy, 32 "
    "tokens behind a prompt of 16. Less than 3% apart counts as as fast"
)


def write_report(folder: Path, result: QuantizationResult) -> None:
    """Writes `report.md`."""
    recipe = result.recipe
    kinds = [(kind.name, f"{kind.layers:,}", f"{kind.weights:,}", _megabytes(kind.num_bytes)) for kind in result.kinds]
    parts = [
        f"# {recipe.model}, quantized to {recipe.method}",
        f"**{cell(result.verdict)}**",
        _summary(result),
        "## Weights",
        "\n".join(f"- {cell(sentence)}" for sentence in result.said),
        table(("kept as", "tensors", "weights", "MB"), kinds),
        "## Notes",
        "\n".join(f"- {cell(note)}" for note in [*result.notes, _SPEED]),
        "## Recipe",
        recipe_table(recipe),
    ]
    (folder / REPORT).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _summary(result: QuantizationResult) -> str:
    rows: list[Sequence[str]] = [
        ["parameters", f"{result.parameters:,}", f"{result.parameters:,}", ""],
        ["weights (MB)", *map(_megabytes, (result.bytes_before, result.bytes_after)), _change(
            result.bytes_before, result.bytes_after
        )],
    ]  # fmt: skip
    for name, value in result.before.items():
        after = result.after.get(name)
        rows.append([name, value_shown(value), value_shown(after), "" if after is None else _change(value, after)])
    for rate in result.rates:
        rows.append(
            [
                f"{rate.name} (tokens/s)",
                f"{rate.before:,.0f}",
                f"{rate.after:,.0f}",
                f"×{rate.ratio:.2f}, {rate.verdict}",
            ]
        )
    return table(("", "before, in bf16", f"after, {result.recipe.method}", "change"), rows)


def _change(before: float, after: float) -> str:
    return "" if before in (after, 0) else f"{after / before - 1:+.2%}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"
