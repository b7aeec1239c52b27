"""`loopos quantize`: quantizes weights to 8 or 4 bits, and reports the effect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from loopos.cli.answers import say
from loopos.cli.compression import ChangedFolder, ModelOrRecipe, RecipeOptions, prepared_recipe, print_figures
from loopos.config.paths import expanded


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """The options of `loopos quantize`."""

    output: ChangedFolder
    method: str | None = field(
        default=None, metadata={"help": "int8; int8-dynamic, activations too; or int4, in groups."}
    )
    group_size: int | None = field(default=None, metadata={"help": "int4: inputs per scale: 32, 64, 128 or 256."})
    calibration: str | None = field(default=None, metadata={"help": "Rounding method: none, gptq or awq."})
    calibration_text: Annotated[
        str | None,
        typer.Option(
            "--calibration-text", metavar="FILE", help="Calibration text or rows for gptq and awq.", parser=expanded
        ),
    ] = None
    keep: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Layers to leave unquantized, e.g. *.down_proj; repeatable.", "metavar": "PATTERN"},
    )
    recipe: RecipeOptions

    def values(self) -> dict[str, object]:
        """The options by the recipe's keys."""
        names = ("method", "group_size", "calibration", "calibration_text")
        own = {name: getattr(self, name) for name in names}
        return {**own, "keep": self.keep or None, **self.recipe.values()}


def run(model: ModelOrRecipe, options: QuantizeOptions) -> int:
    """Quantizes, writes and prints. Raises `UserError`."""
    from loopos.config.compression import QuantizationRecipe

    recipe = prepared_recipe(QuantizationRecipe, model, options)
    from loopos.cli.bar import Bar
    from loopos.compression.quantize import Quantizer
    from loopos.training.precision import pick_device

    device = pick_device(recipe.device).type
    with Bar("layers") as bar:
        result = Quantizer(recipe, device=device, say=bar.say, progress=bar.progress).quantize(options.output)
    print_figures(
        result,
        [recipe.method],
        lambda each: {"share": each.size_ratio, "verdict": each.verdict},
        as_json=options.recipe.json,
    )
    if not options.recipe.json:
        say(result.after[0].verdict)
        say(f"{result.folder}: report.md, recipe.json")
    return 0
