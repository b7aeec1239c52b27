"""Changes a trained model's weights by a recipe, compares size, quality and speed, and writes model and report.

measure → open → change → write to a temporary folder → reopen, compare, measure → recipe, report → rename

The folder is written completely or not at all; each changed model keeps its format. Speed is compared in turn, A B A B,
and the ratio is the median of the pairs' ratios, so that other load on the machine slows both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.compression.calibration import Calibration, read_calibration
from loopos.config.compression import Recipe
from loopos.config.diagnostics import UserError
from loopos.config.paths import RECIPE
from loopos.evaluation.blocks import cell, table
from loopos.evaluation.quality import Measured, metrics_of, probe, sizes_of
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.models.folders import OpenedModel, open_model
from loopos.models.load import NUMBER_FORMATS, cast_parameters
from loopos.models.quantized import exact_activations
from loopos.models.resolve import ModelRef, resolve_trained
from loopos.storage.json_files import save_json
from loopos.storage.output_folder import REPORT, open_output_folder, require_new_folder

NUM_RUNS = 5
ROWS = (1, 16)
READ, PROMPT, WRITTEN = 256, 16, 32
# Differences below this fraction are noise on a machine with other load.
_NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Rate:
    """One kind of work: its name, tokens per second before and after, and the speedup."""

    name: str
    before: float
    after: float
    ratio: float

    @property
    def slower(self) -> bool:
        return self.ratio < 1 - _NOISE

    @property
    def verdict(self) -> str:
        """faster, slower, or as fast."""
        if self.slower:
            return "slower"
        return "faster" if self.ratio > 1 + _NOISE else "as fast"


@torch.no_grad()
def compared_rates(
    before: PreTrainedModel, after: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, writes: bool
) -> list[Rate]:
    """Reading a row of 256 tokens, or of the model's positions if fewer, and, if the model generates, 32 greedy tokens
    for 1 prompt and for 16 prompts of 16 tokens, prefill included.
    """
    rates = [_compared("reading", _reading(before), _reading(after), before.device)]
    for rows in ROWS if writes else ():
        first, second = (_writing(model, tokenizer, rows) for model in (before, after))
        name = "writing, 1 text" if rows == 1 else f"writing, {rows} texts"
        rates.append(_compared(name, first, second, before.device))
    return rates


Work = tuple[int, Callable[[], object]]
"""The number of tokens, and the function that reads or writes them."""


def _compared(name: str, first: Work, second: Work, device: torch.device) -> Rate:
    # The first run warms up.
    runs = [[tokens / seconds for tokens, seconds in _pair(first, second, device)] for _ in range(NUM_RUNS + 1)][1:]
    before, after = (statistics.median(rates) for rates in zip(*runs, strict=True))
    return Rate(name, before, after, statistics.median(pair[1] / pair[0] for pair in runs))


def _pair(first: Work, second: Work, device: torch.device) -> list[tuple[int, float]]:
    return [(tokens, _seconds_of(partial(work), device)) for tokens, work in (first, second)]


def _reading(model: PreTrainedModel) -> Work:
    base = getattr(model, model.base_model_prefix, model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or READ
    row = _tokens(model, min(READ, positions))[None]
    return row.numel(), lambda: base(input_ids=row)


def _writing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> Work:
    engine = Engine(model, tokenizer, max_rows=rows)
    room = engine.max_positions or PROMPT + WRITTEN
    new = max(1, min(WRITTEN, room - PROMPT))
    ids = _tokens(model, rows * PROMPT).tolist()
    prompts = [ids[first : first + PROMPT] for first in range(0, len(ids), PROMPT)]
    settings = SamplingParams(max_new_tokens=new, stop_at_end=False)
    return rows * new, lambda: engine.generate(prompts, settings, logprobs=False)


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _tokens(model: PreTrainedModel, number: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (number,), generator=draw).to(model.device)


_TOLERANCE = 2e-4

RecipeT = TypeVar("RecipeT", bound=Recipe)
DetailsT = TypeVar("DetailsT")
DetailsT_co = TypeVar("DetailsT_co", covariant=True)
Say = Callable[[str], None]
Progress = Callable[[int, int], None]


class CompressionPipeline(Protocol[DetailsT_co]):
    """A change of the weights of a model in memory. `name`: the changed model's folder inside the output, "" if it is
    the output itself; `title`: printed at the start.
    """

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    def apply(self, model: PreTrainedModel, rows: Tensor | None, *, progress: Progress) -> list[str]:
        """Changes the model in place; returns what was done, one sentence each. rows `[N, L]`: calibration text, if the
        recipe needs it. Raises `UserError`.
        """
        ...

    def details(self, model: PreTrainedModel) -> DetailsT_co:
        """Facts about the changed weights for the report."""
        ...


@dataclass(frozen=True)
class ChangedModel(Generic[DetailsT]):
    """A changed model as written.

    Attributes:
        name: Its folder inside the output; "" if it is the output itself.
        summary: What was done, one sentence each.
        details: Facts about the changed weights.
        measured: Its size and its metrics.
        rates: Its speed, compared with the model before.
        size_ratio: Its bytes divided by those before.
    """

    name: str
    summary: list[str]
    details: DetailsT
    measured: Measured
    rates: list[Rate]
    size_ratio: float

    @property
    def verdict(self) -> str:
        """The result in a sentence: a slower model is no success, however small it is."""
        size = f"{self.size_ratio:.1%} of the size in {self.measured.precision}"
        slower = [f"{rate.name} (×{rate.ratio:.2f})" for rate in self.rates if rate.slower]
        if slower:
            return f"no success for speed: {size}, but slower than before on this machine in {', '.join(slower)}"
        speeds = ", ".join(f"{rate.name} {rate.verdict} (×{rate.ratio:.2f})" for rate in self.rates)
        return f"{size}; compared with the model before on this machine: {speeds}"


@dataclass(frozen=True)
class Changed(Generic[RecipeT, DetailsT]):
    """The result of a pruning or quantization.

    Attributes:
        folder: What was written.
        recipe: What was done.
        before: Size and metrics of the model before.
        after: Each model after, in the order of the changes.
        notes: What the reader of the figures must know.
    """

    folder: Path
    recipe: RecipeT
    before: Measured
    after: list[ChangedModel[DetailsT]]
    notes: list[str]


@dataclass(eq=False)
class WeightTransform(Generic[RecipeT, DetailsT]):
    """Changes a model by a recipe: `WeightTransform(recipe, …).run("outputs/new", changes)`.

    reads: the file of calibration text; None if unused. precision: the format of unquantized weights, in which both
    models run; None for the model's own. size_ratio: upper bound of a changed model's bytes, divided by those before.
    what: the name of the changed model, such as "the pruned model"; expected: which kind of model works where this one
    does not reopen correctly. report: writes report.md into a folder. device: "cpu", "cuda" or "mps".
    """

    recipe: RecipeT
    _: KW_ONLY
    reads: str | None
    precision: str | None
    size_ratio: float
    what: str
    expected: str
    report: Callable[[Path, Changed[RecipeT, DetailsT]], None]
    notes: list[str]
    device: str
    say: Say
    progress: Progress
    _calibration: Calibration | None = field(default=None, init=False)

    @cached_property
    def _model(self) -> ModelRef:
        """The model before the change."""
        return resolve_trained(self.recipe.model)

    def run(self, output: str | Path, changes: Sequence[CompressionPipeline[DetailsT]]) -> Changed[RecipeT, DetailsT]:
        """Measures, changes, writes. Raises `UserError` for an unsuitable model, data or output, and `DiskFull`;
        nothing is left under the output's name then.
        """
        folder = Path(output)
        require_new_folder(folder)
        before = self._measured(self._running(open_model(self._model)), self._model, self.recipe.model)
        needed = round(before.weight_bytes * self.size_ratio * len(changes))
        with open_output_folder(folder, needed, self.what) as partial:
            after = [self._one(change, partial / change.name, before) for change in changes]
            changed = Changed(folder, self.recipe, before, after, [*self._common_notes(), *self.notes])
            save_json(partial / RECIPE, self.recipe.model_dump(mode="json"))
            self.report(partial, changed)
        return changed

    def _one(self, change: CompressionPipeline[DetailsT], folder: Path, before: Measured) -> ChangedModel[DetailsT]:
        """Opens the model anew, changes and writes it, and measures what was written."""
        opened = open_model(self._model)
        rows = self._rows(opened)
        opened.model.to(self.device)  # type: ignore[arg-type]
        self.say(f"{change.title}: {self.recipe.model}")
        summary = change.apply(opened.model, rows, progress=self.progress)
        for sentence in summary:
            self.say(sentence)
        details = change.details(opened.model)
        if self.precision is not None:
            description = {**opened.description, "precision": self.precision} if opened.description else {}
            opened = replace(opened, precision=self.precision, description=description)
        opened.save(folder)
        expected = _outputs(opened)
        del opened
        gc.collect()
        written = resolve_trained(str(folder))
        again = open_model(written, quantized=True)
        self._check_opens_as_it_was(expected, _outputs(again))
        again = self._running(again)
        rates = self._rates(again)
        measured = self._measured(again, written, self.what)
        return ChangedModel(change.name, summary, details, measured, rates, measured.weight_bytes / before.weight_bytes)

    def _rows(self, opened: OpenedModel) -> Tensor | None:
        """Calibration rows `[N, L]`, read once."""
        if self.reads is None:
            return None
        if self._calibration is None:
            positions = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
            self._calibration = read_calibration(
                self.reads,
                self.recipe.columns,
                opened.tokenizer,
                num_rows=self.recipe.calibration_rows,
                num_tokens=min(self.recipe.calibration_tokens, positions or self.recipe.calibration_tokens),
                seed=self.recipe.seed,
            )
            self.say(self._calibration.summary)
        return self._calibration.ids

    def _running(self, opened: OpenedModel) -> OpenedModel:
        """The model as commands run it by default."""
        own = opened.precision if opened.description else "fp32"
        cast_parameters(opened.model, NUMBER_FORMATS[self.precision or own])
        opened.model.to(torch.device(self.device)).eval()  # type: ignore[arg-type]
        return opened

    def _rates(self, after: OpenedModel) -> list[Rate]:
        before = self._running(open_model(self._model))
        self.say("measuring the speed of both models, in turn")
        return compared_rates(before.model, after.model, before.tokenizer, writes=before.pooled is None)

    def _measured(self, opened: OpenedModel, source: ModelRef, name: str) -> Measured:
        """source: where the model was opened; name: for messages. Must come last: perplexity leaves the packed
        attention in the model.
        """
        precision = self.precision or opened.precision
        parameters, weight_bytes = sizes_of(opened, precision)
        if self.recipe.evaluate is not None:
            self.say(f"measuring {name} on {self.recipe.evaluate}")
        metrics = metrics_of(opened, source, self.recipe, precision=self.precision)
        return Measured(parameters, weight_bytes, precision, metrics)

    def _common_notes(self) -> list[str]:
        notes = [self._calibration.summary] if self._calibration is not None else []
        if self.recipe.evaluate is None:
            kind = "text" if self._model.kind == "language" else "labeled rows"
            notes.append(f"only size and speed were measured: set evaluate to {kind} to measure quality")
        elif self.recipe.evaluate == self.reads:
            notes.append("evaluate is the calibration text: the figures favor the changed model")
        return notes

    def _check_opens_as_it_was(self, expected: Tensor, found: Tensor) -> None:
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not difference <= _TOLERANCE:
            raise UserError(
                f"{self.what} reopens with outputs that differ by {difference:.1e} from those written: this family's "
                f"config cannot describe the change; nothing was written. Expected {self.expected}"
            )


@torch.no_grad()
def _outputs(opened: OpenedModel) -> Tensor:
    """Outputs of the stored weights, computed in fp32 on the CPU."""
    cast_parameters(opened.model, torch.float32)
    # A code rounded to the other side of a half would look like a changed weight.
    with exact_activations(opened.model):
        return probe(opened.model)


_SPEED = (
    "speed: the models before and after in turn (A B A B), in one number format, on this machine with its load; "
    "each figure is the median of 5 runs, the ratio the median of the pairs' ratios. Reading is a forward pass "
    "over 256 tokens; writing is greedy, 32 tokens after a prompt of 16. Less than 3% apart counts as as fast"
)


def write_parts(folder: Path, changed: Changed[Any, Any], parts: Sequence[str]) -> None:
    """Writes `report.md`: the parts, then notes and recipe."""
    notes = ["## Notes", listed([*changed.notes, _SPEED])]
    actual = changed.recipe.model_dump(mode="json", exclude_defaults=True)
    recipe = table(("key", "value"), [(name, f"`{cell(value)}`") for name, value in actual.items()])
    (folder / REPORT).write_text("\n\n".join([*parts, *notes, "## Recipe", recipe]) + "\n", encoding="utf-8")


def summary(changed: Changed[Any, Any], heads: Sequence[str], more: Sequence[Sequence[str]] = ()) -> str:
    """The table of before and after, one column per model. heads: titles of the models after; more: additional rows,
    with an empty cell for the model before.
    """
    before, models = changed.before, [each.measured for each in changed.after]
    rows: list[Sequence[str]] = [
        ["parameters", f"{before.parameters:,}", *(f"{model.parameters:,}" for model in models)],
        *more,
        ["weights (MB)", megabytes(before.weight_bytes), *(
            f"{megabytes(each.measured.weight_bytes)} ({each.size_ratio:.1%})" for each in changed.after
        )],
    ]  # fmt: skip
    for name, value in before.metrics.items():
        after = [model.metrics.get(name) for model in models]
        rows.append([name, value_shown(value), *(value_shown(each) + _change(value, each) for each in after)])
    for number, first in enumerate(changed.after[0].rates):
        rates = [each.rates[number] for each in changed.after]
        was = statistics.median(rate.before for rate in rates)
        after_cells = [f"{rate.after:,.0f} (×{rate.ratio:.2f}, {rate.verdict})" for rate in rates]
        rows.append([f"{first.name} (tokens/s)", f"{was:,.0f}", *after_cells])
    return table(("", f"before, in {before.precision}", *heads), rows)


def listed(sentences: Sequence[str]) -> str:
    """The sentences as a Markdown list."""
    return "\n".join(f"- {cell(sentence)}" for sentence in sentences)


def value_shown(value: float | None) -> str:
    """A metric in a cell: counts in full, other numbers with five digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.5g}"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"


def _change(before: float, after: float | None) -> str:
    return "" if after is None or before in (after, 0) else f" ({after / before - 1:+.2%})"
