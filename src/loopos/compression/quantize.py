"""Quantization: replaces weights by codes of 8 or 4 bits, and reports the effect.

Every command of LoopOS opens the resulting folder, which contains the model, `recipe.json` and `report.md`.
Letters: N rows of L tokens, O outputs and I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loopos.compression.blocks import BlockPass, Linear, linears_of
from loopos.compression.pipeline import Changed, Progress, Say, WeightTransform, listed, megabytes, summary, write_parts
from loopos.compression.prune import stack_of
from loopos.compression.solvers import awq_factors, gptq
from loopos.config.compression import QuantizationRecipe
from loopos.config.diagnostics import UserError
from loopos.evaluation.blocks import cell, table
from loopos.functional.quantization import GRID_FORMAT, Grid, fitted_grid
from loopos.models.backbone import TokenEmbedding
from loopos.models.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, quantized_layers, stored_form

LayerProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers of one kind in a quantized model: description, number of layers, weights and bytes."""

    name: str
    layers: int
    weights: int
    num_bytes: int


@dataclass(frozen=True)
class _Rounded:
    """codes `[O, I]` and their grid; factors `[I]` that scaled the inputs, or None; `weight` `[O, I]`: what the layer
    multiplies by, with factors.
    """

    codes: Tensor
    grid: Grid
    factors: Tensor | None
    weight: Tensor


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel, recipe: QuantizationRecipe, rows: Tensor | None, *, progress: LayerProgress
) -> list[str]:
    """Quantizes in place; returns what was done, one sentence each. rows `[N, L]`: calibration text, None for
    calibration none. progress: takes the numbers of finished layers and of all. Raises `UserError` for a pattern of
    `keep` that matches no layer, a model without a linear layer and, with calibration, one without a plain stack of
    blocks.
    """
    model.train(False)
    entry, output = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    skipped = _skipped(model, recipe.keep)
    linears = {
        name: Linear(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and name not in skipped
    }
    if not linears:
        raise UserError(f"{type(model).__name__}: no linear layer is left to quantize; expected fewer patterns in keep")
    layers: dict[str, QuantizedLinear] = {}
    for linear, products in _with_products(model, linears, recipe, rows):
        rounded = _rounded(linear.weight.float(), products, recipe)
        # The following blocks are calibrated on this one's new outputs.
        linear.weight.copy_(rounded.weight)
        layers[linear.name] = _layer(linear.module, rounded, rounds=recipe.method == "int8-dynamic")
        progress(len(layers), len(linears))
    for name, layer in layers.items():
        _exchange(model, name, layer)
    summary = [f"{len(layers)} linear layers: {_method_description(recipe)}"]
    if coarse := [name for name, layer in layers.items() if layer.bits > recipe.bits]:
        summary.append(
            f"{len(coarse)} of them in eight bits, because a group of {recipe.group} does not divide their inputs: "
            + _some(coarse)
        )
    summary += _embeddings(model, entry, output, skipped)
    if skipped:
        summary.append(f"{len(skipped)} layers are not quantized: {_some(skipped)}")
    return summary


def kinds_of(model: PreTrainedModel) -> list[Kind]:
    """The storage of a quantized model's weights by kind, tied weights once."""
    found: dict[str, list[QuantizedWeight]] = {}
    seen: set[int] = set()
    for _, layer in quantized_layers(model):
        if id(layer._weight_qdata) in seen:
            continue
        seen.add(id(layer._weight_qdata))
        where = "embedding" if isinstance(layer, QuantizedEmbedding) else "linear layers"
        scales = "one scale per row" if layer.bits == 8 else f"groups of {layer.group}"
        found.setdefault(f"{where}, {layer.bits} bits, {scales}", []).append(layer)
    kinds = [
        Kind(name, len(layers), sum(each.shape[0] * each.shape[1] for each in layers), sum(map(_bytes, layers)))
        for name, layers in found.items()
    ]
    own = {id(p) for layers in found.values() for layer in layers for n, p in layer.named_parameters() if n != "bias"}
    others = [p for p in model.parameters() if id(p) not in own]
    size = sum(p.numel() * GRID_FORMAT.itemsize for p in others)
    return [*kinds, Kind("everything else, bf16", len(others), sum(p.numel() for p in others), size)]


def _bytes(layer: QuantizedWeight) -> int:
    formats = {torch.int8: 1}
    parameters = [p for name, p in layer.named_parameters() if name != "bias"]
    return sum(p.numel() * formats.get(p.dtype, GRID_FORMAT.itemsize) for p in parameters)


def _skipped(model: PreTrainedModel, patterns: Sequence[str]) -> set[str]:
    """Names of the layers that match a pattern."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"keep: got {pattern}, which matches no layer; expected for example {_some(names[-2:])}")
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _with_products(
    model: PreTrainedModel, linears: Mapping[str, Linear], recipe: QuantizationRecipe, rows: Tensor | None
) -> Iterator[tuple[Linear, Tensor | None]]:
    """Every linear layer, with the sums of products of its inputs XXᵀ `[I, I]` if the recipe needs them and the layer
    is in a block. Blocks come in order, each run after those before it were quantized.
    """
    if rows is None:
        yield from ((linear, None) for linear in linears.values())
        return
    names = {id(linear.module): name for name, linear in linears.items()}
    run, seen = BlockPass(model, stack_of(model), rows), set()
    for index, block in run.blocks_in_order():
        inside = [linear for linear in linears_of(block) if id(linear.module) in names]
        products = run.products(index, inside, diagonal=False)
        for linear in inside:
            name = names[id(linear.module)]
            seen.add(name)
            yield linears[name], products.pop(linear.name)
    yield from ((linear, None) for name, linear in linears.items() if name not in seen)


def _fits(inputs: int, recipe: QuantizationRecipe) -> bool:
    return recipe.group is None or inputs % recipe.group == 0


def _rounded(weight: Tensor, products: Tensor | None, recipe: QuantizationRecipe) -> _Rounded:
    """One weight `[O, I]` as codes. products: XXᵀ, or None to round to nearest."""
    inputs = weight.shape[1]
    bits, group = (recipe.bits, recipe.group or inputs) if _fits(inputs, recipe) else (8, inputs)
    if products is not None and recipe.calibration == "gptq":
        codes, grid, values = gptq(weight, products, bits=bits, group=group)
        return _Rounded(codes, grid, None, values)
    factors = None
    if products is not None and recipe.calibration == "awq":
        factors = awq_factors(weight, products, bits=bits, group=group)
    scaled = weight if factors is None else weight * factors
    grid = fitted_grid(scaled, bits, group)
    codes = grid.codes(scaled)
    values = grid.values(codes)
    return _Rounded(codes, grid, factors, values if factors is None else values / factors)


def _layer(plain: nn.Linear | Conv1D, rounded: _Rounded, *, rounds: bool) -> QuantizedLinear:
    factors = None if rounded.factors is None else (1.0 / rounded.factors).to(GRID_FORMAT)
    return QuantizedLinear(
        *stored_form(rounded.codes, rounded.grid),
        factors=factors,
        bias=plain.bias if isinstance(plain.bias, Tensor) else None,
        rounds_activations=rounds,
    )


def _embeddings(model: PreTrainedModel, entry: nn.Module, output: nn.Module | None, skipped: set[str]) -> list[str]:
    """Quantizes the token embedding and the output layer to eight bits, once if tied; returns what was done."""
    names = {id(module): name for name, module in model.named_modules()}
    tied = output is not None and getattr(output, "weight", None) is getattr(entry, "weight", None)
    expected = [each for each in (entry, output) if each is not None and names[id(each)] not in skipped]
    if tied and len(expected) < 2:
        return ["embedding and output layer share one weight, and are not quantized"]
    summary = []
    if entry in expected and type(entry) not in (nn.Embedding, TokenEmbedding):
        return [f"the embedding is not quantized: {type(entry).__name__} does more than look up"]
    for module in expected:
        if module is output and tied:
            continue
        assert isinstance(module, nn.Linear | nn.Embedding), type(module)
        weight = module.weight.data.float()
        grid = fitted_grid(weight, 8, weight.shape[1])
        if module is entry:
            codes, scale, _ = stored_form(grid.codes(weight), grid)
            table = QuantizedEmbedding(codes, scale)
            _exchange(model, names[id(entry)], table)
            summary.append("embedding in eight bits" + (", shared with the output layer" if tied else ""))
            if tied:
                model.set_output_embeddings(table.as_output())  # type: ignore[no-untyped-call]
        else:
            assert isinstance(module, nn.Linear)
            rounded = _Rounded(grid.codes(weight), grid, None, weight)
            _exchange(model, names[id(module)], _layer(module, rounded, rounds=False))
            summary.append("output layer in eight bits")
    return summary


def _exchange(model: nn.Module, name: str, layer: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(model.get_submodule(above), last, layer)


def _method_description(recipe: QuantizationRecipe) -> str:
    grid = "four bits, a scale and a zero for each group" if recipe.bits == 4 else "eight bits, a scale for each row"
    if recipe.group is not None:
        grid += f" of {recipe.group} inputs"
    rounded = {
        "none": "rounded to the nearest code",
        "gptq": "GPTQ, 128 columns at a time, block after block",
        "awq": "AWQ, inputs scaled before rounding, block after block",
    }[recipe.calibration]
    dynamic = "; activations rounded to eight bits row by row" if recipe.method == "int8-dynamic" else ""
    return f"{grid}; {rounded}{dynamic}"


def _some(names: Sequence[str] | set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def write_report(folder: Path, result: QuantizationResult) -> None:
    """Writes `report.md`."""
    recipe, [after] = result.recipe, result.after
    kinds = [(kind.name, f"{kind.layers:,}", f"{kind.weights:,}", megabytes(kind.num_bytes)) for kind in after.details]
    parts = [
        f"# {recipe.model}, quantized to {recipe.method}",
        f"**{cell(after.verdict)}**",
        summary(result, [f"after, {recipe.method}"]),
        "## Weights",
        listed(after.summary),
        table(("stored as", "tensors", "weights", "MB"), kinds),
    ]
    write_parts(folder, result, parts)


# The format of weights that are no codes; both models run in it, and the model before is measured in it.
PRECISION = "bf16"

QuantizationResult: TypeAlias = Changed[QuantizationRecipe, list[Kind]]
"""The result has one model after."""


@dataclass(eq=False)
class Quantizer:
    """Quantizes by a recipe: `Quantizer(recipe).quantize("outputs/small")`.

    device: "cpu", "cuda" or "mps". say: takes a message. progress: takes the numbers of finished layers and of all.
    """

    recipe: QuantizationRecipe
    _: KW_ONLY
    device: str = "cpu"
    say: Say = lambda sentence: None
    progress: Progress = lambda completed, total: None

    def quantize(self, output: str | Path) -> QuantizationResult:
        """The quantized model. Raises `UserError` as `WeightTransform.run` does."""
        recipe = self.recipe
        transform = WeightTransform[QuantizationRecipe, list[Kind]](
            recipe,
            reads=recipe.calibration_text if recipe.needs_calibration else None,
            precision=PRECISION,
            size_ratio=recipe.bits / 16,
            what="the quantized model",
            expected="a family whose weights transformers stores under their own names",
            report=write_report,
            notes=[],
            device=self.device,
            say=self.say,
            progress=self.progress,
        )
        return transform.run(output, [_ToCodes(recipe)])


@dataclass(frozen=True)
class _ToCodes:
    """Quantization by a recipe."""

    recipe: QuantizationRecipe
    name: str = ""

    @property
    def title(self) -> str:
        return self.recipe.method

    def apply(self, model: PreTrainedModel, rows: Tensor | None, *, progress: Progress) -> list[str]:
        return quantize_model(model, self.recipe, rows, progress=progress)

    def details(self, model: PreTrainedModel) -> list[Kind]:
        return kinds_of(model)
