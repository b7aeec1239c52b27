"""Pruning: sets weights to zero or removes parts of a model, and reports the effect.

Blocks are pruned in order, each on the outputs of the pruned blocks before it. The output folder contains the model,
`recipe.json` and `report.md`; with several sparsities a folder `sparsity-0.5/` each, and a curve such as
`perplexity.svg`.
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
    global_threshold,
    keep_above,
    keep_highest,
    keep_highest_in_groups,
    keep_highest_in_rows,
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
    """Counts over all blocks for one kind of linear layer: weights, and zeros among them."""

    kind: str
    weights: int
    zeros: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """Facts about a pruned model for the report: its target sparsity, and the zeros of its blocks."""

    sparsity: float
    zeros: list[Zeros]


def stack_of(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks. Raises `UserError` for a model without a plain stack of them."""
    try:
        return layer_list(model)
    except UserError as error:
        raise UserError(
            f"{type(model).__name__}: no plain stack of num_hidden_layers blocks found; expected a model that has one, "
            "like Llama, Qwen, Mistral, Gemma, GPT-2 and BERT"
        ) from error


@torch.no_grad()
def prune_model(
    model: PreTrainedModel, recipe: PruningRecipe, sparsity: float, rows: Tensor | None, *, progress: LayerProgress
) -> list[str]:
    """Prunes in place; returns what was done, one sentence each. rows `[N, L]`: calibration text, None for magnitude.
    progress: takes the numbers of finished blocks and of all. Raises `UserError` if the model's family or sizes do not
    allow it.
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
                keep = keep_highest_in_groups(scores, *_fitting(recipe.pattern_counts, linear))
            else:
                keep = keep_highest(scores, num_zeros(weight.numel(), sparsity))
            weight.masked_fill_(~keep, 0.0)
        progress(index + 1, len(blocks))
    return [f"the smallest weights of each linear layer of {len(blocks)} blocks"]


def _global_magnitude(blocks: nn.ModuleList, sparsity: float) -> list[str]:
    linears = [linear for block in blocks for linear in linears_of(block)]
    zeros = num_zeros(sum(linear.weight.numel() for linear in linears), sparsity)
    threshold, at_threshold = global_threshold([partial(_magnitudes, linear) for linear in linears], zeros)
    for linear in linears:
        keep, at_threshold = keep_above(_magnitudes(linear), threshold, at_threshold)
        linear.weight.masked_fill_(~keep, 0.0)
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
    for index, block in run.blocks_in_order():
        linears = linears_of(block)
        products = run.products(index, linears, diagonal=recipe.method == "wanda")
        for linear in linears:
            weight, seen = linear.weight, products.pop(linear.name)
            pattern = None if recipe.pattern_counts is None else _fitting(recipe.pattern_counts, linear)
            if recipe.method == "sparsegpt":
                weight.copy_(sparse_gpt(weight, seen, sparsity=sparsity, pattern=pattern)[0])
                continue
            scores = wanda_scores(weight, seen)
            zeros = num_zeros(weight.shape[1], sparsity)
            keep = (
                keep_highest_in_groups(scores, *pattern) if pattern is not None else keep_highest_in_rows(scores, zeros)
            )
            weight.masked_fill_(~keep, 0.0)
        progress(index + 1, len(blocks))
    name = "|W|·‖X‖, compared within each row" if recipe.method == "wanda" else "SparseGPT, 128 columns at a time"
    return [f"{len(blocks)} blocks in order, each on the outputs of the pruned ones before it: {name}"]


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
            f"sparsity: got {sparsity:g}, which drops {expected} of {len(blocks)} layers; expected a fraction that "
            f"drops at least 1 and keeps at least 1: {1 / len(blocks):.3g} is one layer"
        )
    dropped = sorted(sorted(range(len(blocks)), key=lambda index: (influence[index], index))[:expected])
    drop_layers(model, dropped)
    listed_layers = ", ".join(f"{index} ({influence[index]:.3g})" for index in dropped)
    return [
        f"layers dropped, from 0, with their block influence 1 − cos(h_in, h_out): {listed_layers}",
        "block influence of all: " + " ".join(f"{value:.3g}" for value in influence),
    ]


def _heads(
    model: PreTrainedModel, blocks: nn.ModuleList, sparsity: float, rows: Tensor, progress: LayerProgress
) -> list[str]:
    """Key-value groups by ‖W_S·X_S‖², the squared error of the attention's output if only this group is removed."""
    shape = head_shape(model)
    expected = shape.groups - num_zeros(shape.groups, sparsity)
    possible = [groups for groups in possible_groups(model) if groups < shape.groups]
    if not possible:
        raise UserError(f"heads: the model has only {shape.groups} key-value group; expected a model with more")
    keeps = min(possible, key=lambda groups: (abs(groups - expected), -groups))
    run = BlockPass(model, blocks, rows)
    for index, block in run.blocks_in_order():
        reads = output_projection(block)
        [products] = run.products(index, [reads], diagonal=False).values()
        scores = []
        for group in range(shape.groups):
            inputs = shape.outputs([group], shape.queries).to(products.device)
            part = reads.weight[:, inputs]
            scores.append(float((part @ products[inputs][:, inputs] * part).sum()))
        keep = sorted(sorted(range(shape.groups), key=lambda group: -scores[group])[:keeps])
        keep_groups(model, block, keep)
        progress(index + 1, len(blocks))
    set_groups(model, keeps)
    sentence = (
        f"{shape.groups - keeps} of {shape.groups} key-value groups of {shape.queries} query heads leave every block"
    )
    if keeps != expected:
        sentence += f" (sparsity {sparsity:g} means {shape.groups - expected}; this is the nearest that can be written)"
    return [sentence]


def _channels(
    model: PreTrainedModel, blocks: nn.ModuleList, sparsity: float, rows: Tensor, progress: LayerProgress
) -> list[str]:
    """Channels by ‖W_j‖²·‖X_j‖², the squared error of the MLP's output if only channel j is removed (the column's sum
    of squared Wanda scores; An et al. 2024, section 3).
    """
    channel_layers(model, blocks[0])
    run, keeps, width = BlockPass(model, blocks, rows), 0, 0
    for index, block in run.blocks_in_order():
        _, reads = channel_layers(model, block)
        [square_sums] = run.products(index, [reads], diagonal=True).values()
        width = len(square_sums)
        keeps = width - num_zeros(width, sparsity)
        if not 0 < keeps < width:
            raise UserError(
                f"sparsity: got {sparsity:g}, which keeps {keeps} of {width} channels; expected 1 or more to stay"
            )
        scores = reads.weight.square().sum(0) * square_sums
        keep_channels(model, block, keep_highest(scores, width - keeps).nonzero().squeeze(1))
        progress(index + 1, len(blocks))
    set_channels(model, keeps)
    return [f"{width - keeps} of {width} channels leave the MLP of every block"]


_MAIN = ("perplexity", "accuracy", "micro_f1", "mae", "pair_accuracy", "step_accuracy")


def write_report(folder: Path, result: PruningResult) -> None:
    """Writes `report.md`, and a curve if there are several sparsities and a metric."""
    recipe = result.recipe
    heads = [f"sparsity {each.details.sparsity:g}" for each in result.after]
    zeros = ["zeros in the blocks' linear layers", "", *(_zero_fraction(each.details) for each in result.after)]
    parts = [f"# {recipe.model}, pruned by {recipe.method}", summary(result, heads, [zeros])]
    metric = main_metric(result.before)
    if metric is not None and len(result.after) > 1:
        file = f"{metric}.svg"
        (folder / file).write_text(curve_svg(result, metric), encoding="utf-8")
        parts += [f"## {metric} by sparsity", f"![{metric}]({file})"]
    for each in result.after:
        parts += [f"## Sparsity {each.details.sparsity:g}" + (f": `{each.name}/`" if each.name else "")]
        if recipe.structured:
            parts.append(f"**{cell(each.verdict)}**")
        parts += [listed(each.summary), _zeros(each.details)]
    write_parts(folder, result, parts)


def main_metric(measured: Measured) -> str | None:
    """The metric for the curve; None if nothing was measured."""
    names = [*(name for name in _MAIN if name in measured.metrics), *measured.metrics]
    return names[0] if names else None


def curve_svg(result: PruningResult, metric: str) -> str:
    """The metric over the fraction of the blocks' weights removed; the model before is at 0."""
    points = [(0.0, result.before.metrics[metric])]
    points += [(each.details.sparsity, each.measured.metrics[metric]) for each in result.after]
    with drawing(6.0, 4.0) as figure:
        axes = figure.add_subplot()
        axes.plot([sparsity for sparsity, _ in points], [value for _, value in points], "-o", ms=4)
        for sparsity, value in points:
            axes.annotate(shown(value), (sparsity, value), (4, 4), textcoords="offset points", parse_math=False)
        axes.set_title(f"{metric} by sparsity: {result.recipe.method}", parse_math=False)
        axes.set_xlabel("sparsity")
        axes.set_ylabel(metric)
        if metric == "perplexity":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        return svg_of(figure)


def _zero_fraction(pruned: Pruned) -> str:
    weights, zeros = sum(each.weights for each in pruned.zeros), sum(each.zeros for each in pruned.zeros)
    return f"{zeros:,} of {weights:,} ({zeros / weights:.2%})"


def _zeros(pruned: Pruned) -> str:
    rows = [(f"`{each.kind}`", f"{each.weights:,}", f"{each.zeros:,}", f"{each.zeros / each.weights:.2%}")
            for each in pruned.zeros]  # fmt: skip
    return table(("linear layers of all blocks", "weights", "zeros", "fraction"), rows)


PruningResult: TypeAlias = Changed[PruningRecipe, Pruned]

_ZEROS_NOTE = (
    "zeros by themselves make a dense product no faster and no file smaller: they are multiplied and stored like other "
    "numbers. They pay off with a kernel or format that skips them (2:4 on GPUs that support it, file compression)"
)


@dataclass(eq=False)
class Pruner:
    """Prunes by a recipe: `Pruner(recipe).prune("outputs/sparse")`.

    device: "cpu", "cuda" or "mps". say: takes a message. progress: takes the numbers of finished blocks and of all.
    """

    recipe: PruningRecipe
    _: KW_ONLY
    device: str = "cpu"
    say: Say = lambda sentence: None
    progress: Progress = lambda completed, total: None

    def prune(self, output: str | Path) -> PruningResult:
        """The models by rising sparsity. Raises `UserError` as `WeightTransform.run` does."""
        recipe = self.recipe
        transform = WeightTransform[PruningRecipe, Pruned](
            recipe,
            reads=recipe.calibration if recipe.needs_calibration else None,
            precision=None,
            size_ratio=1.0,
            what="the pruned model",
            expected="a Llama-like model or GPT-2, or an unstructured method",
            report=write_report,
            notes=[] if recipe.structured else [_ZEROS_NOTE],
            device=self.device,
            say=self.say,
            progress=self.progress,
        )
        return transform.run(output, [_ToSparsity(recipe, sparsity) for sparsity in recipe.sparsities])


@dataclass(frozen=True)
class _ToSparsity:
    """Pruning to one of a recipe's sparsities."""

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

    def details(self, model: PreTrainedModel) -> Pruned:
        return Pruned(self.sparsity, zeros_of(model))
