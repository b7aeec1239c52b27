"""What a quantization did and cost, in Markdown.

Enters: a `QuantizationResult`. Leaves: `report.md`. Left out: what every changed model's report has
(`deploy.change_report`), measuring.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopos.deploy.change_report import listed, megabytes, summary, write_parts
from loopos.evaluation.markdown import cell, table

if TYPE_CHECKING:
    from loopos.deploy.quantize import QuantizationResult


def write_report(folder: Path, result: QuantizationResult) -> None:
    """Writes `report.md`."""
    recipe, [after] = result.recipe, result.after
    kinds = [(kind.name, f"{kind.layers:,}", f"{kind.weights:,}", megabytes(kind.num_bytes)) for kind in after.told]
    parts = [
        f"# {recipe.model}, quantized to {recipe.method}",
        f"**{cell(after.verdict)}**",
        summary(result, [f"after, {recipe.method}"]),
        "## Weights",
        listed(after.said),
        table(("kept as", "tensors", "weights", "MB"), kinds),
    ]
    write_parts(folder, result, parts)
