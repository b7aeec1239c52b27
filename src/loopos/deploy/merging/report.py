"""The report of a merge: what was merged how, what it weighs, how far it went, how good it is.

Enters: a recipe, its plan, the changes of its tensors, metrics. Leaves: Markdown. Left out: the recipe itself
(`recipe.json` beside it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loopos.config.merge import PARAMETERS, MergeConfig
from loopos.deploy.merging.greedy_soup import Trial
from loopos.deploy.merging.plan import Plan
from loopos.deploy.merging.tensors import Change
from loopos.evaluation.markdown import cell, shown, table
from loopos.models.adapter_folder import AdapterFolder

_MOST_GROUPS = 8


@dataclass(frozen=True)
class Measured:
    """`values`: metrics by the place of a model, those of the merged one under "result"."""

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
    parts += ["## Change", _change_told(recipe), _groups(changes, plan.num_layers)]
    for each in measured:
        parts += [f"## Measured on {cell(each.data)}", _metrics(each)]
    if notes:
        parts += ["## Notes", "\n".join(f"- {cell(sentence)}" for sentence in notes)]
    return "\n\n".join(parts) + "\n"


def _settings(recipe: MergeConfig) -> str:
    fields = type(recipe).model_fields
    given = [name for name in (*PARAMETERS, "normalize") if getattr(recipe, name) != fields[name].default]
    return table(
        ["setting", "value"], [["seed", str(recipe.seed)], *([name, cell(getattr(recipe, name))] for name in given)]
    )


def _models(recipe: MergeConfig, plan: Plan) -> str:
    rows = []
    for each, source in zip(recipe.models, plan.models, strict=True):
        size = [f"{source.num_parameters:,}", f"{source.num_bytes:,}"]
        rows.append([cell(source.place), cell(each.layers or each.weight), *size])
    if plan.base is not None:
        rows.append([cell(plan.base.place), "base", f"{plan.base.num_parameters:,}", f"{plan.base.num_bytes:,}"])
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
        [cell(plan.models[each.added].place), shown(each.value), "kept" if each.kept else "left out"] for each in trials
    ]
    return table(["model tried", trials[0].metric, ""], rows)


def _change_told(recipe: MergeConfig) -> str:
    origin = "the base" if recipe.base is not None and recipe.method not in ("linear", "slerp") else "the first model"
    return f"Norm of the change from {origin}, and its share of the norm of what it changed."


def _groups(changes: Sequence[Change], num_layers: int) -> str:
    """Norms of the changes, layers in at most so many groups of neighbours."""
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
        share = math.sqrt(squared / squared_before) if squared_before > 0 else 0.0
        rows.append([name, shown(math.sqrt(squared)), f"{share:.2%}"])
    return table(["tensors", "norm of the change", "share"], rows)


def _metrics(measured: Measured) -> str:
    names = list(dict.fromkeys(name for values in measured.values.values() for name in values))
    rows = [
        [cell(place), *(shown(values[name]) if name in values else "" for name in names)]
        for place, values in measured.values.items()
    ]
    return table(["model", *names], rows)


def adapter_report(adapters: Sequence[AdapterFolder], factors: Sequence[float], config: Mapping[str, object]) -> str:
    """The report of adapters that were summed into one."""
    rows = [
        [cell(each.place), shown(factor), cell(each.config.get("r")), str(len(each.lora_pairs()))]
        for each, factor in zip(adapters, factors, strict=True)
    ]
    told = f"One adapter of rank {config['r']} whose change is the sum of the others', each times its factor."
    return "\n\n".join(["# Merge of adapters", told, table(["adapter", "factor", "rank", "layers"], rows)]) + "\n"
