"""Pruning: a model's folder in, a sparser or smaller model's folder out, with what it cost.

    open → prune → write beside → open again and measure → report → rename

Enters: a `PruningRecipe` and a folder that is not there yet. Leaves: the folder, whole or not at all: the model as it
was kept before (a transformers folder, with LoopOS's description and head where it had them), `recipe.json`,
`report.md`; of several shares a folder `sparsity-0.5/` each, and `perplexity.svg` or another metric's. Left out: the
weights (`pruning/model.py`), the report's words (`pruning/report.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from torch import Tensor

from loopos.config.faults import UserError
from loopos.config.paths import RECIPE
from loopos.config.pruning import PruningRecipe
from loopos.data.calibration import read_calibration
from loopos.deploy.pruning.model import Zeros, prune_model, zeros_of
from loopos.deploy.pruning.report import write_report
from loopos.deploy.quality import Measured, measure, probe
from loopos.deploy.shipped_folder import refuse_taken, shipped_folder
from loopos.models.opened_model import OpenedModel, has_head, open_model
from loopos.storage.json_files import save_json

_TOLERANCE = 2e-4


@dataclass(frozen=True)
class PrunedModel:
    """One share of a recipe. `name`: its folder inside the output, "" where the output is the model's folder itself."""

    sparsity: float
    name: str
    said: list[str]
    zeros: list[Zeros]
    measured: Measured


@dataclass(frozen=True)
class PruningResult:
    """What a pruning left: `folder`, the model before, and each model after, smallest share first. `notes`: what the
    reader of the figures must know.
    """

    folder: Path
    recipe: PruningRecipe
    before: Measured
    after: list[PrunedModel]
    notes: list[str]


@dataclass(eq=False)
class Pruner:
    """Prunes by a recipe: `Pruner(recipe).prune("outputs/sparse")`.

    device: "cpu", "cuda" or "mps", found out by the caller. say: takes a sentence. progress: takes blocks done and
    blocks in all.
    """

    recipe: PruningRecipe
    _: KW_ONLY
    device: str = "cpu"
    say: Callable[[str], None] = lambda sentence: None
    progress: Callable[[int, int], None] = lambda done, whole: None

    def prune(self, output: str | Path) -> PruningResult:
        """Prunes, measures, writes. Raises `UserError` for a model, data or an output that will not do; nothing is left
        under the output's name then.
        """
        folder, recipe = Path(output), self.recipe
        _check_output(folder, recipe)
        self._calibration: tuple[Tensor, str] | None = None
        before = measure(recipe.model, recipe, device=self.device, note=self.say)
        several = len(recipe.sparsities) > 1
        needed = before.weight_bytes * len(recipe.sparsities)
        with shipped_folder(folder, needed, "the pruned model") as partial:
            after = []
            for sparsity in recipe.sparsities:
                name = f"sparsity-{sparsity:g}" if several else ""
                after.append(self._one(sparsity, partial / name if several else partial, name))
            result = PruningResult(folder, recipe, before, after, self._notes())
            save_json(partial / RECIPE, recipe.model_dump(mode="json"))
            write_report(partial, result)
        return result

    def _one(self, sparsity: float, folder: Path, name: str) -> PrunedModel:
        """Opens the model anew, prunes it to one share, writes it, and measures what was written."""
        opened = open_model(self.recipe.model)
        rows = self._rows(opened) if self.recipe.needs_calibration else None
        opened.model.to(self.device)  # type: ignore[arg-type]
        self.say(f"{self.recipe.method}: {sparsity:.3g} of {self.recipe.model}")
        said = prune_model(opened.model, self.recipe, sparsity, rows, progress=self.progress)
        for sentence in said:
            self.say(sentence)
        opened.model.to("cpu")  # type: ignore[arg-type]
        zeros, expected = zeros_of(opened.model), probe(opened.model)
        opened.save(folder)
        del opened
        gc.collect()
        found = measure(str(folder), self.recipe, device=self.device, note=lambda _: None)
        if self.recipe.structured:
            _check_opens_as_it_was(expected, found.said)
        return PrunedModel(sparsity, name, said, zeros, found)

    def _rows(self, opened: OpenedModel) -> Tensor:
        """Calibration rows `[N, L]`, read once."""
        if self._calibration is None:
            recipe = self.recipe
            assert recipe.calibration is not None, "checked by the recipe"
            positions = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
            found = read_calibration(
                recipe.calibration,
                recipe.columns,
                opened.tokenizer,
                num_rows=recipe.calibration_rows,
                num_tokens=min(recipe.calibration_tokens, positions or recipe.calibration_tokens),
                seed=recipe.seed,
            )
            self.say(found.said)
            self._calibration = found.ids, found.said
        return self._calibration[0]

    def _notes(self) -> list[str]:
        notes = [self._calibration[1]] if self._calibration is not None else []
        if not self.recipe.structured:
            notes.append(
                "zeros alone make a dense product no faster and no file smaller: they are multiplied and written like "
                "any other number. They pay where a kernel or a format leaves them out (2:4 on GPUs that have it, "
                "compression of the file)"
            )
        if self.recipe.evaluate is None:
            kind = "labelled rows" if has_head(self.recipe.model) else "text"
            notes.append(f"nothing was measured but size and speed: name {kind} with evaluate")
        if self.recipe.evaluate is not None and self.recipe.evaluate == self.recipe.calibration:
            notes.append("evaluate is calibration: the figures flatter the pruned model")
        return notes


def _check_output(folder: Path, recipe: PruningRecipe) -> None:
    refuse_taken(folder)
    if folder.resolve() == Path(recipe.model).resolve():
        raise UserError(f"--output: given {folder}, the model itself; wanted a new folder")


def _check_opens_as_it_was(expected: Tensor, found: Tensor) -> None:
    """Raises `UserError` where the written folder gives other outputs than the model that was written: its config
    cannot say what was taken out.
    """
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not difference <= _TOLERANCE:
        raise UserError(
            f"this family's config cannot say what was taken out: the model opens with other outputs (by "
            f"{difference:.1e}); nothing was written. Wanted a Llama-like model or GPT-2, or an unstructured method"
        )
