"""Pruning: a model's folder in, a sparser or smaller model's folder out, with what it cost.

Enters: a `PruningRecipe` and a folder that is not there yet. Leaves: the folder, whole or not at all: the model,
`recipe.json`, `report.md`; of several shares a folder `sparsity-0.5/` each, and `perplexity.svg` or another metric's.
Left out: opening, writing and measuring (`weight_change.py`), the weights (`pruning/model.py`), the report's words
(`pruning/report.py`).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from loopos.config.pruning import PruningRecipe
from loopos.deploy.pruning.model import Pruned, prune_model, zeros_of
from loopos.deploy.pruning.report import write_report
from loopos.deploy.weight_change import Changed, ChangeRoad, Progress, Say

PruningResult: TypeAlias = Changed[PruningRecipe, Pruned]

_ZEROS_ALONE = (
    "zeros alone make a dense product no faster and no file smaller: they are multiplied and written like any other "
    "number. They pay where a kernel or a format leaves them out (2:4 on GPUs that have it, compression of the file)"
)


@dataclass(eq=False)
class Pruner:
    """Prunes by a recipe: `Pruner(recipe).prune("outputs/sparse")`.

    device: "cpu", "cuda" or "mps", found out by the caller. say: takes a sentence. progress: takes blocks done and
    blocks in all.
    """

    recipe: PruningRecipe
    _: KW_ONLY
    device: str = "cpu"
    say: Say = lambda sentence: None
    progress: Progress = lambda done, whole: None

    def prune(self, output: str | Path) -> PruningResult:
        """The models by rising share. Raises `UserError` as `ChangeRoad.run` does."""
        recipe = self.recipe
        road = ChangeRoad[PruningRecipe, Pruned](
            recipe,
            reads=recipe.calibration if recipe.needs_calibration else None,
            precision=None,
            share=1.0,
            what="the pruned model",
            wanted="a Llama-like model or GPT-2, or an unstructured method",
            report=write_report,
            notes=[] if recipe.structured else [_ZEROS_ALONE],
            device=self.device,
            say=self.say,
            progress=self.progress,
        )
        return road.run(output, [_ToShare(recipe, sparsity) for sparsity in recipe.sparsities])


@dataclass(frozen=True)
class _ToShare:
    """Pruning to one share of a recipe's."""

    recipe: PruningRecipe
    sparsity: float

    @property
    def name(self) -> str:
        return f"sparsity-{self.sparsity:g}" if len(self.recipe.sparsities) > 1 else ""

    @property
    def title(self) -> str:
        return f"{self.recipe.method}, {self.sparsity:.3g}"

    def apply(self, model: PreTrainedModel, rows: Tensor | None, *, progress: Progress) -> list[str]:
        return prune_model(model, self.recipe, self.sparsity, rows, progress=progress)

    def told(self, model: PreTrainedModel) -> Pruned:
        return Pruned(self.sparsity, zeros_of(model))
