"""Quantization: a model's folder in, a smaller folder of the same kind out, with what it cost.

    open → quantize → write beside → open again, compare and measure → report → rename

Enters: a `QuantizationRecipe` and a folder that is not there yet. Leaves: the folder, whole or not at all: the model,
which every command of LoopOS opens, `recipe.json`, `report.md`. Left out: the weights (`quantizing/model.py`), the
report's words (`quantizing/report.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loopos.config.faults import UserError
from loopos.config.paths import RECIPE
from loopos.config.quantization import QuantizationRecipe
from loopos.data.calibration import read_calibration
from loopos.deploy.quality import metrics_of, probe, sizes_of
from loopos.deploy.quantizing.model import Kind, kinds_of, quantize_model
from loopos.deploy.quantizing.rates import Rate, compared_rates
from loopos.deploy.quantizing.report import write_report
from loopos.deploy.shipped_folder import refuse_taken, shipped_folder
from loopos.models.load import NUMBER_FORMATS, cast_parameters
from loopos.models.opened_model import OpenedModel, has_head, open_model
from loopos.models.quantized import exact_activations
from loopos.storage.json_files import save_json
from loopos.storage.tensor_files import WEIGHTS

# What the weights that are no codes are kept in, what both models run in, and what the model before is measured in.
PRECISION = "bf16"
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class QuantizationResult:
    """What a quantization left. parameters: of the model. bytes_before: of its weights in bf16; bytes_after: of the
    file that was written. kinds: what that holds. before, after: metrics by name, empty without data to evaluate on.
    said: what was done; notes: what the reader of the figures must know.
    """

    folder: Path
    recipe: QuantizationRecipe
    parameters: int
    bytes_before: int
    bytes_after: int
    kinds: list[Kind]
    before: dict[str, float]
    after: dict[str, float]
    rates: list[Rate]
    said: list[str]
    notes: list[str]

    @property
    def verdict(self) -> str:
        """What came of it, in a sentence: a model that is slower is no success, however small it is."""
        size = f"{self.bytes_after / self.bytes_before:.1%} of the size in bf16"
        slower = [f"{rate.name} (×{rate.ratio:.2f})" for rate in self.rates if rate.slower]
        if slower:
            return f"no success where speed counts: {size}, but slower than bf16 on this machine in {', '.join(slower)}"
        speeds = ", ".join(f"{rate.name} {rate.verdict} (×{rate.ratio:.2f})" for rate in self.rates)
        return f"{size}; against bf16 on this machine: {speeds}"


@dataclass(eq=False)
class Quantizer:
    """Quantizes by a recipe: `Quantizer(recipe).quantize("outputs/small")`.

    device: "cpu", "cuda" or "mps", found out by the caller. say: takes a sentence. progress: takes layers done and
    layers in all.
    """

    recipe: QuantizationRecipe
    _: KW_ONLY
    device: str = "cpu"
    say: Callable[[str], None] = lambda sentence: None
    progress: Callable[[int, int], None] = lambda done, whole: None

    def quantize(self, output: str | Path) -> QuantizationResult:
        """Quantizes, measures, writes. Raises `UserError` for a model, data or an output that will not do; nothing is
        left under the output's name then.
        """
        folder = Path(output)
        refuse_taken(folder)
        opened = open_model(self.recipe.model)
        needed = sizes_of(opened, PRECISION)[1] * self.recipe.bits // 16
        with shipped_folder(folder, needed, "the quantized model") as partial:
            said, notes = self._write(partial, opened)
            del opened
            gc.collect()
            result = self._measured(folder, partial, said, notes)
            save_json(partial / RECIPE, self.recipe.model_dump(mode="json"))
            write_report(partial, result)
        return result

    def _write(self, partial: Path, opened: OpenedModel) -> tuple[list[str], list[str]]:
        """Writes the quantized model, and opens it again; what was done, and what must be known of it."""
        notes: list[str] = []
        rows = None
        if self.recipe.needs_calibration:
            rows, read = self._rows(opened)
            notes.append(read)
        opened.model.to(self.device)  # type: ignore[arg-type]
        self.say(f"{self.recipe.method}: {self.recipe.model}")
        said = quantize_model(opened.model, self.recipe, rows, progress=self.progress)
        for sentence in said:
            self.say(sentence)
        opened.model.to("cpu")  # type: ignore[arg-type]
        description = {**opened.description, "precision": PRECISION} if opened.description else {}
        opened = replace(opened, precision=PRECISION, description=description)
        opened.save(partial)
        expected = _outputs(opened)
        again = open_model(str(partial), quantized=True)
        cast_parameters(again.model, NUMBER_FORMATS[PRECISION])
        difference = float((_outputs(again) - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not difference <= _TOLERANCE:
            raise UserError(
                f"the written folder opens with other outputs than the model that was written (by {difference:.1e}); "
                "nothing was kept. Wanted a family whose weights transformers keeps under their own names"
            )
        return said, notes

    def _rows(self, opened: OpenedModel) -> tuple[Tensor, str]:
        """Calibration rows `[N, L]`, and what they are."""
        recipe = self.recipe
        assert recipe.calibration_text is not None, "checked by the recipe"
        positions = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
        found = read_calibration(
            recipe.calibration_text,
            recipe.columns,
            opened.tokenizer,
            num_rows=recipe.calibration_rows,
            num_tokens=min(recipe.calibration_tokens, positions or recipe.calibration_tokens),
            seed=recipe.seed,
        )
        self.say(found.said)
        return found.ids, found.said

    def _measured(self, folder: Path, partial: Path, said: list[str], notes: list[str]) -> QuantizationResult:
        """Both models in bf16, as anyone would open them: speed in turn, then what they can do."""
        recipe = self.recipe
        before, after = (self._opened(place, quantized=place != recipe.model) for place in (recipe.model, str(partial)))
        writes = before.pooled is None
        self.say("measuring how fast both are, in turn")
        rates = compared_rates(before.model, after.model, before.tokenizer, writes=writes)
        parameters, bytes_before = sizes_of(before, PRECISION)
        kinds = kinds_of(after.model)
        # Last: perplexity leaves the packed attention in the models.
        was, became = (
            metrics_of(opened, place, recipe, note=self.say, precision=PRECISION)
            for opened, place in ((before, recipe.model), (after, str(partial)))
        )
        if recipe.evaluate is None:
            kind = "labelled rows" if has_head(recipe.model) else "text"
            notes.append(f"nothing was measured but size and speed: name {kind} with evaluate")
        elif recipe.evaluate == recipe.calibration_text:
            notes.append("evaluate is the calibration text: the figures flatter the quantized model")
        if not writes:
            notes.append("bytes are those of the headless model; its head stays in fp32")
        size = (partial / WEIGHTS).stat().st_size
        return QuantizationResult(
            folder=folder,
            recipe=recipe,
            parameters=parameters,
            bytes_before=bytes_before,
            bytes_after=size,
            kinds=kinds,
            before=was,
            after=became,
            rates=rates,
            said=said,
            notes=notes,
        )

    def _opened(self, place: str, *, quantized: bool) -> OpenedModel:
        opened = open_model(place, quantized=quantized)
        cast_parameters(opened.model, NUMBER_FORMATS[PRECISION])
        opened.model.to(torch.device(self.device)).eval()  # type: ignore[arg-type]
        return opened


@torch.no_grad()
def _outputs(opened: OpenedModel) -> Tensor:
    # A code that falls to the other side of a half would look like another weight.
    with exact_activations(opened.model):
        return probe(opened.model).float()
