"""`loopos quantize`: weights as codes of eight or four bits, with what it cost.

Enters: a model or a recipe file, and options. Leaves: a model's folder, and the figures on standard output. Left out:
what it shares with `loopos prune` (`weight_change.py`), the quantization (`deploy.quantize`).
"""

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


def run(actual: str, options: ChangeOptions) -> int:
    """Quantizes, writes and prints. Raises `UserError`."""
    result = weight_change.run(actual, options, read=read_quantization_recipe, counted="layers", work=_quantize)
    weight_change.tell(
        result,
        [result.recipe.method],
        lambda each: {"share": each.share, "verdict": each.verdict},
        as_json=options.json,
    )
    if not options.json:
        say(result.after[0].verdict)
        say(f"{result.folder}: report.md, recipe.json")
    return 0


def _quantize(recipe: QuantizationRecipe, device: str, output: Path, bar: Bar) -> QuantizationResult:
    from loopos.compression.quantize import Quantizer

    return Quantizer(recipe, device=device, say=bar.say, progress=bar.progress).quantize(output)
