"""Quantization: a model's folder in, a smaller folder of the same kind out, with what it cost.

Enters: a `QuantizationRecipe` and a folder that is not there yet. Leaves: the folder, whole or not at all: the model,
which every command of LoopOS opens, `recipe.json`, `report.md`. Left out: opening, writing and measuring
(`weight_change.py`), the weights (`quantizing/model.py`), the report's words (`quantizing/report.py`).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from loopos.config.quantization import QuantizationRecipe
from loopos.deploy.quantizing.model import Kind, kinds_of, quantize_model
from loopos.deploy.quantizing.report import write_report
from loopos.deploy.weight_change import Changed, ChangeRoad, Progress, Say

# What the weights that are no codes are kept in, what both models run in, and what the model before is measured in.
PRECISION = "bf16"

QuantizationResult: TypeAlias = Changed[QuantizationRecipe, list[Kind]]
"""The result has one model after."""


@dataclass(eq=False)
class Quantizer:
    """Quantizes by a recipe: `Quantizer(recipe).quantize("outputs/small")`.

    device: "cpu", "cuda" or "mps", found out by the caller. say: takes a sentence. progress: takes layers done and
    layers in all.
    """

    recipe: QuantizationRecipe
    _: KW_ONLY
    device: str = "cpu"
    say: Say = lambda sentence: None
    progress: Progress = lambda done, whole: None

    def quantize(self, output: str | Path) -> QuantizationResult:
        """The one model after. Raises `UserError` as `ChangeRoad.run` does."""
        recipe = self.recipe
        road = ChangeRoad[QuantizationRecipe, list[Kind]](
            recipe,
            reads=recipe.calibration_text if recipe.needs_calibration else None,
            precision=PRECISION,
            share=recipe.bits / 16,
            what="the quantized model",
            wanted="a family whose weights transformers keeps under their own names",
            report=write_report,
            notes=[],
            device=self.device,
            say=self.say,
            progress=self.progress,
        )
        return road.run(output, [_ToCodes(recipe)])


@dataclass(frozen=True)
class _ToCodes:
    """Quantization as a recipe says."""

    recipe: QuantizationRecipe
    name: str = ""

    @property
    def title(self) -> str:
        return self.recipe.method

    def apply(self, model: PreTrainedModel, rows: Tensor | None, *, progress: Progress) -> list[str]:
        return quantize_model(model, self.recipe, rows, progress=progress)

    def told(self, model: PreTrainedModel) -> list[Kind]:
        return kinds_of(model)
