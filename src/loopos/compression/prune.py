"""Weights set to zero and parts taken out, on a model in memory.

Enters: a model of transformers, a recipe, a share and, where the method reads text, calibration rows. Leaves: the same
model, changed, and what was done in words. Blocks are pruned in order, each on what the pruned ones before it give.
Left out: files and reports (`deploy.prune`), the scores themselves (`functional.sparsity`, `functional.sparse_gpt`).

What a pruning did and cost, in Markdown and as a curve.

Enters: a `PruningResult`. Leaves: `report.md`, and of several shares an SVG of the metric. Left out: what every changed
model's report has (`deploy.change_report`), measuring.

Pruning: a model's folder in, a sparser or smaller model's folder out, with what it cost.

Enters: a `PruningRecipe` and a folder that is not there yet. Leaves: the folder, whole or not at all: the model,
`recipe.json`, `report.md`; of several shares a folder `sparsity-0.5/` each, and `perplexity.svg` or another metric's.
Left out: opening, writing and measuring (`weight_change.py`), the weights (`pruning/model.py`), the report's words
(`pruning/report.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopos.compression.blocks import (
    BlockPass,
    Linear,
    block_influence,
    channel_layers,
    drop_layers,
    head_shape,
    keep_channels,
    keep_groups,
    linears_of,
    output_projection,
    possible_groups,
    set_channels,
    set_groups,
)
from loopos.compression.pipeline import Changed, Progress, Say, WeightTransform, listed, summary, write_parts
from loopos.compression.solvers import (
    kept_above,
    kept_of_all,
    kept_of_groups,
    kept_of_many,
    kept_of_rows,
    magnitude_scores,
    num_zeros,
    sparse_gpt,
    wanda_scores,
)
from loopos.config.compression import PruningRecipe
from loopos.config.diagnostics import UserError
from loopos.evaluation.blocks import cell, shown, table
from loopos.evaluation.drawing import drawing, svg_of
from loopos.evaluation.quality import Measured
from loopos.models.adapters import layer_list

LayerProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Zeros:
    """Of the weights of one kind of linear layer, over all blocks: how many there are, and how many are zero."""

    kind: str
    weights: int
    zeros: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """What the report says of a pruned model: the share that it was pruned to, and the zeros of its blocks."""

    sparsity: float
    zeros: list[Zeros]


def stack_of(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks. Raises `UserError` for a model without a plain stack of them."""
    try:
        return layer_list(model)
    except UserError as error:
        raise UserError(
            f"{type(model).__name__}: no plain stack of num_hidden_layers blocks found; expected a model that has one, "
            "as Llama, Qwen, Mistral, Gemma, GPT-2 and BERT do"
        ) from error


@torch.no_grad()
def prune_model(
    model: PreTrainedModel, recipe: PruningRecipe, sparsity: float, rows: Tensor | None, *, progress: LayerProgress
) -> list[str]:
    """Prunes in place; what was done, a sentence each. rows `[N, L]`: calibration text, None for magnitude. progress:
    takes blocks done and blocks in all. Raises `UserError` where the model's family or sizes do not allow it.
    """
    model.train(False)
    blocks = stack_of(model)
    if recipe.method == "magnitude":
        return _magnitude(blocks, recipe, sparsity, progress)
    assert rows is not None, "checked by the recipe"
    match recipe.method:
        case "layers":
            return _layers(model, blocks, sparsity, rows)
        case "heads":
            return _heads(model, blocks, sparsity, rows, progress)
        case "channels":
            return _channels(model, blocks, sparsity, rows, progress)
        case _:
            return _by_activations(model, blocks, recipe, sparsity, rows, progress)


def zeros_of(model: PreTrainedModel) -> list[Zeros]:
    """The zeros of the blocks' linear layers, by the layer's name in its block."""
    counts: dict[str, tuple[int, int]] = {}
    for block in stack_of(model):
        for linear in linears_of(block):
            weights, zeros = counts.get(linear.name, (0, 0))
            weight = linear.weight
            counts[linear.name] = (weights + weight.numel(), zeros + int((weight == 0).sum()))
    return [Zeros(kind, *count) for kind, count in counts.items()]


def _magnitude(blocks: nn.ModuleList, recipe: PruningRecipe, sparsity: float, progress: LayerProgress) -> list[str]:
    if recipe.scope == "global":
        return _global_magnitude(blocks, sparsity)
    for index, block in enumerate(blocks):
        for linear in linears_of(block):
            weight, scores = linear.weight, magnitude_scores(linear.weight)
            if recipe.pattern_counts is not None:
                kept = kept_of_groups(scores, *_fitting(recipe.pattern_counts, linear))
            else:
                kept = kept_of_all(scores, num_zeros(weight.numel(), sparsity))
            weight.masked_fill_(~kept, 0.0)
        progress(index + 1, len(blocks))
    return [f"the smallest weights of each linear layer of {len(blocks)} blocks"]


def _global_magnitude(blocks: nn.ModuleList, sparsity: float) -> list[str]:
    linears = [linear for block in blocks for linear in linears_of(block)]
    zeros = num_zeros(sum(linear.weight.numel() for linear in linears), sparsity)
    threshold, at_threshold = kept_of_many([partial(_magnitudes, linear) for linear in linears], zeros)
    for linear in linears:
        kept, at_threshold = kept_above(_magnitudes(linear), threshold, at_threshold)
        linear.weight.masked_fill_(~kept, 0.0)
    return [f"the smallest weights of {len(linears)} linear layers together: |weight| up to {threshold:.3g}"]


def _magnitudes(linear: Linear) -> Tensor:
    return magnitude_scores(linear.weight)


def _by_activations(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    recipe: PruningRecipe,
    sparsity: float,
    rows: Tensor,
    progress: LayerProgress,
) -> list[str]:
    """Wanda and SparseGPT, block by block."""
    run = BlockPass(model, blocks, rows)
    for place, block in run.blocks_in_order():
        linears = linears_of(block)
        products = run.products(place, linears, diagonal=recipe.method == "wanda")
        for linear in linears:
            weight, seen = linear.weight, products.pop(linear.name)
            pattern = None if recipe.pattern_counts is None else _fitting(recipe.pattern_counts, linear)
            if recipe.method == "sparsegpt":
                weight.copy_(sparse_gpt(weight, seen, sparsity=sparsity, pattern=pattern)[0])
                continue
            scores = wanda_scores(weight, seen)
            zeros = num_zeros(weight.shape[1], sparsity)
            kept = kept_of_groups(scores, *pattern) if pattern is not None else kept_of_rows(scores, zeros)
            weight.masked_fill_(~kept, 0.0)
        progress(place + 1, len(blocks))
    name = "|W|·‖X‖, compared within each row" if recipe.method == "wanda" else "SparseGPT, 128 columns at a time"
    return [f"{len(blocks)} blocks in order, each on what the pruned ones before it give: {name}"]


def _fitting(pattern: tuple[int, int], linear: Linear) -> tuple[int, int]:
    if linear.weight.shape[1] % pattern[1]:
        raise UserError(
            f"pattern: got {pattern[0]}:{pattern[1]}, but {linear.name} has {linear.weight.shape[1]} inputs; expected "
            "a pattern whose second number divides them"
        )
    return pattern


def _layers(model: PreTrainedModel, blocks: nn.ModuleList, sparsity: float, rows: Tensor) -> list[str]:
    influence = block_influence(model, blocks, rows)
    expected = num_zeros(len(blocks), sparsity)
    if not 0 < expected < len(blocks):
        raise UserError(
            f"sparsity: got {sparsity:g}, which drops {expected} of {len(blocks)} layers; expected a share that "
            f"drops at least 1 and keeps at least 1: {1 / len(blocks):.3g} is one layer"
        )
    dropped = sorted(sorted(range(len(blocks)), key=lambda place: (influence[place], place))[:expected])
    drop_layers(model, dropped)
    told = ", ".join(f"{place} ({influence[place]:.3g})" for place in dropped)
    return [
        f"layers dropped, from 0, with their block influence 1 − cos(h_in, h_out): {told}",
        "block influence of all: " + " ".join(f"{value:.3g}" for value in influence),
    ]


def _heads(
    model: PreTrainedModel, blocks: nn.ModuleList, sparsity: float, rows: Tensor, progress: LayerProgress
) -> list[str]:
    """Key-value groups by ‖W_S·X_S‖², the squared error of the attention's output where the group alone goes."""
    shape = head_shape(model)
    expected = shape.groups - num_zeros(shape.groups, sparsity)
    possible = [groups for groups in possible_groups(model) if groups < shape.groups]
    if not possible:
        raise UserError(f"heads: the model has {shape.groups} key-value group; expected a model with more to take from")
    keeps = min(possible, key=lambda groups: (abs(groups - expected), -groups))
    run = BlockPass(model, blocks, rows)
    for place, block in run.blocks_in_order():
        reads = output_projection(block)
        [products] = run.products(place, [reads], diagonal=False).values()
        scores = []
        for group in range(shape.groups):
            inputs = shape.outputs([group], shape.queries).to(products.device)
            part = reads.weight[:, inputs]
            scores.append(float((part @ products[inputs][:, inputs] * part).sum()))
        kept = sorted(sorted(range(shape.groups), key=lambda group: -scores[group])[:keeps])
        keep_groups(model, block, kept)
        progress(place + 1, len(blocks))
    set_groups(model, keeps)
    told = f"{shape.groups - keeps} of {shape.groups} key-value groups of {shape.queries} query heads leave every block"
    if keeps != expected:
        told += f" (sparsity {sparsity:g} means {shape.groups - expected}; this is the nearest that can be written)"
    return [told]


def _channels(
    model: PreTrainedModel, blocks: nn.ModuleList, sparsity: float, rows: Tensor, progress: LayerProgress
) -> list[str]:
    """Channels by ‖W_j‖²·‖X_j‖², the squared error of the MLP's output where channel j alone goes (the column's sum of
    squared Wanda scores; An et al. 2024, section 3).
    """
    channel_layers(model, blocks[0])
    run, keeps, width = BlockPass(model, blocks, rows), 0, 0
    for place, block in run.blocks_in_order():
        _, reads = channel_layers(model, block)
        [square_sums] = run.products(place, [reads], diagonal=True).values()
        width = len(square_sums)
        keeps = width - num_zeros(width, sparsity)
        if not 0 < keeps < width:
            raise UserError(f"sparsity: got {sparsity:g}, which keeps {keeps} of {width} channels; expected 1 or more")
        scores = reads.weight.square().sum(0) * square_sums
        keep_channels(model, block, kept_of_all(scores, width - keeps).nonzero().squeeze(1))
        progress(place + 1, len(blocks))
    set_channels(model, keeps)
    return [f"{width - keeps} of {width} channels leave the MLP of every block"]


_MAIN = ("perplexity", "accuracy", "micro_f1", "mae", "pair_accuracy")


def write_report(folder: Path, result: PruningResult) -> None:
    """Writes `report.md`, and the curve beside it where there are several shares and a metric."""
    recipe = result.recipe
    heads = [f"sparsity {each.told.sparsity:g}" for each in result.after]
    zeros = ["zeros in the blocks' linear layers", "", *(_share_of_zeros(each.told) for each in result.after)]
    parts = [f"# {recipe.model}, pruned by {recipe.method}", summary(result, heads, [zeros])]
    metric = main_metric(result.before)
    if metric is not None and len(result.after) > 1:
        file = f"{metric}.svg"
        (folder / file).write_text(curve_svg(result, metric), encoding="utf-8")
        parts += [f"## {metric} by sparsity", f"![{metric}]({file})"]
    for each in result.after:
        parts += [f"## Sparsity {each.told.sparsity:g}" + (f": `{each.name}/`" if each.name else "")]
        if recipe.structured:
            parts.append(f"**{cell(each.verdict)}**")
        parts += [listed(each.summary), _zeros(each.told)]
    write_parts(folder, result, parts)


def main_metric(measured: Measured) -> str | None:
    """The metric that a curve shows; None where nothing was measured."""
    names = [*(name for name in _MAIN if name in measured.metrics), *measured.metrics]
    return names[0] if names else None


def curve_svg(result: PruningResult, metric: str) -> str:
    """The metric over the share of the blocks' weights that is gone; the model before stands at 0."""
    points = [(0.0, result.before.metrics[metric])]
    points += [(each.told.sparsity, each.measured.metrics[metric]) for each in result.after]
    with drawing(6.0, 4.0) as figure:
        axes = figure.add_subplot()
        axes.plot([share for share, _ in points], [value for _, value in points], "-o", ms=4)
        for share, value in points:
            axes.annotate(shown(value), (share, value), (4, 4), textcoords="offset points", parse_math=False)
        axes.set_title(f"{metric} by sparsity: {result.recipe.method}", parse_math=False)
        axes.set_xlabel("sparsity")
        axes.set_ylabel(metric)
        if metric == "perplexity":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        return svg_of(figure)


def _share_of_zeros(pruned: Pruned) -> str:
    weights, zeros = sum(each.weights for each in pruned.zeros), sum(each.zeros for each in pruned.zeros)
    return f"{zeros:,} of {weights:,} ({zeros / weights:.2%})"


def _zeros(pruned: Pruned) -> str:
    rows = [(f"`{each.kind}`", f"{each.weights:,}", f"{each.zeros:,}", f"{each.zeros / each.weights:.2%}")
            for each in pruned.zeros]  # fmt: skip
    return table(("linear layers of all blocks", "weights", "zeros", "share"), rows)


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
        """The models by rising share. Raises `UserError` as `WeightTransform.run` does."""
        recipe = self.recipe
        decode_path = WeightTransform[PruningRecipe, Pruned](
            recipe,
            reads=recipe.calibration if recipe.needs_calibration else None,
            precision=None,
            share=1.0,
            what="the pruned model",
            expected="a Llama-like model or GPT-2, or an unstructured method",
            report=write_report,
            notes=[] if recipe.structured else [_ZEROS_ALONE],
            device=self.device,
            say=self.say,
            progress=self.progress,
        )
        return decode_path.run(output, [_ToShare(recipe, sparsity) for sparsity in recipe.sparsities])


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
