"""Merges models by a recipe, tensor by tensor, and writes the report.

The result is a model folder with `recipe.json` and `report.md`, written completely or not at all. At any time one
tensor of each model, of the base and of the result is in memory; the result depends neither on the order of tensors nor
on their distribution over files.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.merge import PARAMETERS, MergeConfig
from loopos.evaluation.blocks import cell, shown, table
from loopos.evaluation.quality import dropped_summary, row_metrics
from loopos.merging.adapters import adapted_source, check_summable, open_summable, summed
from loopos.merging.folder import stacked, write_beside, write_recipe
from loopos.merging.greedy_soup import Trial, choose
from loopos.merging.plan import Plan, planned
from loopos.merging.sources import HEAD_TENSOR, Source, open_source
from loopos.merging.tensors import Change, OnProgress, TensorMerger
from loopos.models.adapter_folder import ADAPTER_WEIGHTS, AdapterFolder, is_adapter
from loopos.models.folders import HEAD
from loopos.models.resolve import ADAPTER_CONFIG, resolve_trained
from loopos.models.task_layout import TaskLayout, layout_at
from loopos.storage.durable import explain_disk_full
from loopos.storage.json_files import save_json
from loopos.storage.output_folder import NOTHING_WRITTEN, REPORT, open_output_folder
from loopos.storage.tensor_files import TensorSpec, num_bytes, save_tensors, write_tensors
from loopos.storage.whole_folder import whole_folder

_MOST_GROUPS = 8


@dataclass(frozen=True)
class Measured:
    """`values`: metrics by model, those of the merged one under "result"."""

    data: str
    values: dict[str, Mapping[str, float]]


def report(
    recipe: MergeConfig,
    plan: Plan,
    changes: Sequence[Change],
    measured: Sequence[Measured],
    trials: Sequence[Trial],
    *,
    notes: Sequence[str],
    seconds: float,
) -> str:
    """The whole report."""
    parts = [f"# Merge: {recipe.method}", *([recipe.description] if recipe.description else [])]
    parts += [_settings(recipe), "## Models", _models(recipe, plan)]
    parts += ["## Result", _result(recipe, plan, seconds)]
    if trials:
        parts += ["## Soup", _soup(plan, trials)]
    parts += ["## Change", _change_summary(recipe), _groups(changes, plan.num_layers)]
    for each in measured:
        parts += [f"## Measured on {cell(each.data)}", _metrics(each)]
    if notes:
        parts += ["## Notes", "\n".join(f"- {cell(sentence)}" for sentence in notes)]
    return "\n\n".join(parts) + "\n"


def _settings(recipe: MergeConfig) -> str:
    fields = type(recipe).model_fields
    actual = [name for name in (*PARAMETERS, "normalize") if getattr(recipe, name) != fields[name].default]
    return table(
        ["setting", "value"], [["seed", str(recipe.seed)], *([name, cell(getattr(recipe, name))] for name in actual)]
    )


def _models(recipe: MergeConfig, plan: Plan) -> str:
    rows = []
    for each, source in zip(recipe.models, plan.models, strict=True):
        size = [f"{source.num_parameters:,}", f"{source.num_bytes:,}"]
        rows.append([cell(source.location), cell(each.layers or each.weight), *size])
    if plan.base is not None:
        rows.append([cell(plan.base.location), "base", f"{plan.base.num_parameters:,}", f"{plan.base.num_bytes:,}"])
    return table(["model", "layers" if recipe.method == "passthrough" else "weight", "parameters", "bytes"], rows)


def _result(recipe: MergeConfig, plan: Plan, seconds: float) -> str:
    parameters = sum(each.spec.num_elements for each in plan.tensors.values())
    rows = [["tensors", f"{len(plan.tensors):,}"], ["parameters", f"{parameters:,}"], ["number format", recipe.dtype]]
    rows += [["seconds", shown(seconds)]]
    if plan.vocabulary is not None:
        rows.append(["tokens", f"{plan.vocabulary.size:,}"])
    return table(["", ""], rows)


def _soup(plan: Plan, trials: Sequence[Trial]) -> str:
    rows = [
        [cell(plan.models[each.added].location), shown(each.value), "accepted" if each.accepted else "rejected"]
        for each in trials
    ]
    return table(["model tried", trials[0].metric, ""], rows)


def _change_summary(recipe: MergeConfig) -> str:
    origin = "the base" if recipe.base is not None and recipe.method not in ("linear", "slerp") else "the first model"
    return f"Norm of the change from {origin}, and as a fraction of the norm of {origin}."


def _groups(changes: Sequence[Change], num_layers: int) -> str:
    """Norms of the changes, with layers in at most `_MOST_GROUPS` groups of neighbors."""
    step = max(1, math.ceil(num_layers / _MOST_GROUPS))
    sums: dict[str, tuple[float, float]] = {}
    for change in sorted(changes, key=lambda each: -1 if each.layer is None else each.layer):
        name = "outside the layers"
        if change.layer is not None:
            start = change.layer // step * step
            last = min(start + step, num_layers) - 1
            name = f"layers {start} to {last}" if last > start else f"layer {start}"
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + change.squared, before[1] + change.squared_before
    rows = []
    for name, (squared, squared_before) in sums.items():
        fraction = math.sqrt(squared / squared_before) if squared_before > 0 else 0.0
        rows.append([name, shown(math.sqrt(squared)), f"{fraction:.2%}"])
    return table(["tensors", "norm of the change", "fraction"], rows)


def _metrics(measured: Measured) -> str:
    names = list(dict.fromkeys(name for values in measured.values.values() for name in values))
    rows = [
        [cell(location), *(shown(values[name]) if name in values else "" for name in names)]
        for location, values in measured.values.items()
    ]
    return table(["model", *names], rows)


def adapter_report(adapters: Sequence[AdapterFolder], factors: Sequence[float], config: Mapping[str, object]) -> str:
    """The report of adapters summed into one."""
    rows = [
        [cell(each.source), shown(factor), cell(each.config.get("r")), str(len(each.lora_pairs()))]
        for each, factor in zip(adapters, factors, strict=True)
    ]
    text = f"One adapter of rank {config['r']} whose change is the weighted sum of the adapters' changes."
    return "\n\n".join(["# Merge of adapters", text, table(["adapter", "factor", "rank", "layers"], rows)]) + "\n"


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote and measured.

    Attributes:
        folder: The merged model, with report.md.
        num_tensors: Tensors written.
        num_parameters: Numbers in them.
        seconds: Time of the whole merge.
        notes: What a user should know.
        measured: Metrics of all models and the result, one entry for each file of `evaluate`.
        trials: The steps of a greedy soup.
    """

    folder: Path
    num_tensors: int
    num_parameters: int
    seconds: float
    notes: Sequence[str]
    measured: Sequence[Measured] = ()
    trials: Sequence[Trial] = ()


def merge(
    recipe: MergeConfig,
    *,
    device: str = "cpu",
    note: Callable[[str], None] = lambda sentence: None,
    on_progress: OnProgress = lambda done, total: None,
) -> MergeResult:
    """Merges by a recipe. device: where models are evaluated; merging itself runs on the CPU.

    Raises `UserError` with all problems of all models, before anything is written, and for non-finite numbers.
    """
    began = time.monotonic()
    if recipe.result == "adapter":
        return _merge_adapters(recipe, began)
    with ExitStack() as scratch:
        return _merge_models(recipe, began, scratch, device=device, note=note, on_progress=on_progress)


def _merge_models(
    recipe: MergeConfig,
    began: float,
    scratch: ExitStack,
    *,
    device: str,
    note: Callable[[str], None],
    on_progress: OnProgress,
) -> MergeResult:
    models, base = open_models(recipe, scratch)
    plan = stacked(recipe, models) if recipe.method == "passthrough" else planned(recipe, models, base)
    for sentence in plan.notes:
        note(sentence)
    folder, trials = Path(recipe.output_dir), list[Trial]()
    weights: Sequence[float] | None = None
    needed = sum(each.spec.num_bytes for each in plan.tensors.values())
    with explain_disk_full(folder, needed, "the merged model", NOTHING_WRITTEN):
        if recipe.method == "greedy_soup":
            trials = choose(
                recipe, plan, lambda target, chosen: _write(target, plan, recipe, chosen), device=device, note=note
            )
            weights = trials[-1].weights(len(models))
        measured = [Measured(data, _before(models, data, device, note)) for data in recipe.evaluate]
        with whole_folder(folder) as partial:
            changes = _write(partial, plan, recipe, weights, on_progress)
            for each in measured:
                note(f"evaluating the result on {each.data}")
                each.values["result"] = row_metrics(str(partial), each.data, device=device)
            notes = [
                *plan.notes,
                *(summary for each in measured for summary in dropped_summary(each.data, each.values)),
            ]
            for sentence in notes[len(plan.notes) :]:
                note(sentence)
            seconds = time.monotonic() - began
            text = report(recipe, plan, changes, measured, trials, notes=notes, seconds=seconds)
            (partial / REPORT).write_text(text, encoding="utf-8")
    parameters = sum(each.spec.num_elements for each in plan.tensors.values())
    return MergeResult(folder, len(plan.tensors), parameters, seconds, notes, measured, trials)


def open_models(recipe: MergeConfig, scratch: ExitStack) -> tuple[list[Source], Source | None]:
    """The models and the base. scratch: keeps the folders of folded adapters until everything has been read. Raises
    `UserError` with the problem of each that cannot be opened.
    """
    diagnostics: list[str] = []
    out = Path(recipe.output_dir).absolute()

    def scratch_folder() -> Path:
        # On the disk that the result is written to.
        above = next(each for each in out.parents if each.is_dir())
        return Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}.scratch-", dir=above)))

    # A recipe may name a model twice, and the base for each.
    ref_of = functools.cache(resolve_trained)

    def opened(name: str, base: str | None) -> Source | None:
        try:
            ref = ref_of(name)
            # Only the model that a run wrote has the head of its adapter.
            if ref.storage == "adapter" and (base is not None or ref.kind == "language"):
                return adapted_source(ref, None if base is None else ref_of(base), scratch_folder)
            return open_source(ref)
        except UserError as problem:
            diagnostics.append(str(problem))
            return None

    models = [opened(each.model, recipe.base) for each in recipe.models]
    base = opened(recipe.base, None) if recipe.base is not None else None
    if diagnostics:
        raise UserError("\n".join(dict.fromkeys(diagnostics)))
    return [each for each in models if each is not None], base


def _write(
    folder: Path,
    plan: Plan,
    recipe: MergeConfig,
    weights: Sequence[float] | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Change]:
    """Writes a model except its report; returns the change of each tensor from the base, or from the first model.
    weights: those of a soup's models, instead of the recipe's.
    """
    write_beside(folder, plan, recipe)
    merger = TensorMerger(plan, recipe, weights, on_progress)
    head = plan.tensors.get(HEAD_TENSOR)
    weights_of = {name: each for name, each in plan.tensors.items() if name != HEAD_TENSOR}
    layout: TaskLayout | None = None
    if head is not None:
        weight = merger.tensor(head, torch.float32)
        save_tensors(folder / HEAD, {"weight": weight})
        layout, tokenizer = layout_at(folder, weight)
        layout.config(tokenizer.pad_token_id).save_pretrained(folder)
        layout.write_beside(folder, tokenizer)
        weights_of = {layout.tensor_name(name): each for name, each in weights_of.items()}
    specs = {name: TensorSpec(merger.dtype_of(each), each.spec.shape) for name, each in weights_of.items()}
    if layout is not None:
        specs |= layout.head_specs()

    def tensor_of(name: str) -> Tensor:
        if name not in weights_of:
            assert layout is not None
            return layout.outputs.weight
        return merger.tensor(weights_of[name], specs[name].dtype)

    write_tensors(folder, specs, tensor_of, most_bytes=recipe.shard_gigabytes * 1e9)
    return merger.changes


def _before(
    models: Sequence[Source], data: str, device: str, note: Callable[[str], None]
) -> dict[str, Mapping[str, float]]:
    """The metrics of each model. An adapter, which is no model by itself, has none, nor has a model of another kind
    than the first, which is that of the result.
    """
    found: dict[str, Mapping[str, float]] = {}
    for source in models:
        if source.changes:
            note(f"{source.location}: not evaluated: an adapter")
        elif source.is_task_model != models[0].is_task_model:
            note(f"{source.location}: not evaluated: another kind of model than the result")
        elif source.location not in found:
            note(f"evaluating {source.location} on {data}")
            found[source.location] = row_metrics(source.ref, data, device=device)
    return found


def _merge_adapters(recipe: MergeConfig, began: float) -> MergeResult:
    """Adapters summed into one. Raises `UserError` with all problems."""
    diagnostics, adapters = [], list[AdapterFolder]()
    for each in recipe.models:
        if not is_adapter(each.model):
            diagnostics.append(f"{each.model}: not an adapter folder; expected one with {ADAPTER_CONFIG}")
            continue
        try:
            adapters.append(open_summable(each.model))
        except UserError as problem:
            diagnostics.append(str(problem))
    weights = [each.weight for each in recipe.models if isinstance(each.weight, float)]
    if len(weights) < len(recipe.models) or recipe.patterns or isinstance(recipe.scale, list):
        diagnostics.append(
            '"result": "adapter" takes one weight per model and one scale; lists and patterns are not supported'
        )
    if adapters:
        diagnostics += check_summable(adapters)
    if diagnostics:
        raise UserError("\n".join(diagnostics))
    total = sum(weights) if recipe.normalizes else 1.0
    scale = recipe.scale if recipe.method == "task_arithmetic" and isinstance(recipe.scale, float) else 1.0
    factors = [weight / total * scale for weight in weights]
    tensors, config = summed(adapters, factors)
    folder = Path(recipe.output_dir)
    seconds = time.monotonic() - began
    with open_output_folder(folder, num_bytes(tensors), "the adapter") as partial:
        save_tensors(partial / ADAPTER_WEIGHTS, tensors)
        save_json(partial / ADAPTER_CONFIG, config)
        write_recipe(partial, recipe)
        (partial / REPORT).write_text(adapter_report(adapters, factors, config), encoding="utf-8")
    return MergeResult(folder, len(tensors), sum(each.numel() for each in tensors.values()), seconds, [])
