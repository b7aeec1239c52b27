"""`loopos quantize`: quantizes weights to 8 or 4 bits, and reports the effect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopos.cli import weight_change
from loopos.cli.answers import say
from loopos.cli.weight_change import ChangeOptions
from loopos.config.compression import QuantizationRecipe, read_quantization_recipe

if TYPE_CHECKING:
    from loopos.cli.bar import Bar
    from loopos.compression.quantize import QuantizationResult


def run(model: str, options: ChangeOptions) -> int:
    """Quantizes, writes and prints. Raises `UserError`."""
    result = weight_change.run(model, options, read=read_quantization_recipe, counted="layers", work=_quantize)
    weight_change.print_figures(
        result,
        [result.recipe.method],
        lambda each: {"share": each.size_ratio, "verdict": each.verdict},
        as_json=options.json,
    )
    if not options.json:
        say(result.after[0].verdict)
        say(f"{result.folder}: report.md, recipe.json")
    return 0


def _quantize(recipe: QuantizationRecipe, device: str, output: Path, bar: Bar) -> QuantizationResult:
    from loopos.compression.quantize import Quantizer

    return Quantizer(recipe, device=device, say=bar.say, progress=bar.progress).quantize(output)
