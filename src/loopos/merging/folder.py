"""The folder of a merged model without its weights (config, tokenizer, description), and stacks of layers.

A stack (`passthrough`) takes ranges of layers from several models. Layers keep their order; tensors outside the layers
(embeddings, final norm, heads) come from the first model.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.config.merge import MergeConfig
from loopos.config.paths import MANIFEST, MODEL_DESCRIPTION, RECIPE
from loopos.merging.plan import Plan, PlannedTensor, config_diagnostics
from loopos.merging.sources import TOKENIZER, Source, vocabulary_diagnostics
from loopos.models.load import NUMBER_FORMATS
from loopos.storage.json_files import save_json
from loopos.storage.output_folder import REPORT
from loopos.storage.tensor_files import NAMED_WEIGHTS

# Keys of the number of layers in transformers configs.
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def ranges_of(recipe: MergeConfig, models: Sequence[Source]) -> list[tuple[int, int]]:
    """The first layer and the one after the last, of each model. Raises `UserError` for layers that a model lacks."""
    found, diagnostics = [], []
    for number, (each, source) in enumerate(zip(recipe.models, models, strict=True)):
        start, end = each.layers or (0, source.num_layers)
        if end > source.num_layers:
            diagnostics.append(
                f"models.{number}.layers: got [{start}, {end}]; expected at most {source.num_layers}, the layers of "
                f"{source.location}"
            )
        found.append((start, end))
    if diagnostics:
        raise UserError("\n".join(diagnostics))
    return found


def stacked(recipe: MergeConfig, models: Sequence[Source]) -> Plan:
    """The plan of a stack. Raises `UserError` with all reasons: other architectures, shapes or vocabularies."""
    ranges, first = ranges_of(recipe, models), models[0]
    diagnostics = [*config_diagnostics(models), *vocabulary_diagnostics(models)]
    tensors = {name: _copy(name, None, 0, name, first) for name in first.specs if first.layer_of(name) is None}
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    depth = 0
    for index, (source, (start, end)) in enumerate(zip(models, ranges, strict=True)):
        for name, spec in source.specs.items():
            layer = source.layer_of(name)
            if layer is None or not start <= layer < end:
                continue
            rest = name.removeprefix(source.stack).partition(".")[2]
            named, shape = seen.setdefault(rest, (source.location, spec.shape))
            if shape != spec.shape:
                diagnostics.append(f"{source.location}: {name} is {list(spec.shape)} where {named} has {list(shape)}")
            target = f"{first.stack}{depth + layer - start}.{rest}"
            tensors[target] = _copy(target, depth + layer - start, index, name, source)
        depth += end - start
    if diagnostics:
        raise UserError("\n".join(diagnostics))
    summary = ", ".join(
        f"{source.location} {start} to {end - 1}" for source, (start, end) in zip(models, ranges, strict=True)
    )
    return Plan(models, None, tensors, None, [f"{depth} layers: {summary}"])


def _copy(name: str, layer: int | None, index: int, own: str, source: Source) -> PlannedTensor:
    return PlannedTensor(name, layer, {index: own}, None, source.specs[own])


def stacked_config(recipe: MergeConfig, models: Sequence[Source]) -> dict[str, Any]:
    """The first model's config with the stack's number of layers. A list with one value per layer (such as layer_types)
    is composed from the models' lists like the layers.
    """
    ranges = ranges_of(recipe, models)
    config: dict[str, Any] = copy.deepcopy(dict(models[0].config))
    part = config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
    for key, value in list(part.items()):
        if key in _NUM_LAYERS:
            part[key] = sum(end - start for start, end in ranges)
        elif isinstance(value, list) and len(value) == models[0].num_layers and value:
            lists = [source.text_config.get(key) for source in models]
            if all(
                isinstance(each, list) and len(each) == source.num_layers
                for each, source in zip(lists, models, strict=True)
            ):
                part[key] = [
                    item for each, (start, end) in zip(lists, ranges, strict=True) for item in (each or [])[start:end]
                ]
    return config


# Files of a model folder that do not describe the merged model.
_LEFT = frozenset({MANIFEST, RECIPE, MODEL_DESCRIPTION, "config.json", "README.md", REPORT, "events.jsonl"})
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")
_OF_TOKENIZERS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")


def write_beside(folder: Path, plan: Plan, recipe: MergeConfig) -> None:
    """Writes everything except weights and report."""
    first, named = plan.models[0], _tokenizer_source(plan, recipe)
    for file in _files(first):
        if not _is_of_tokenizer(file):
            shutil.copyfile(file, folder / file.name)
    for file in _files(named):
        if _is_of_tokenizer(file):
            shutil.copyfile(file, folder / file.name)
    save_json(folder / "config.json", _config(plan, recipe))
    if plan.vocabulary is not None:
        text = json.dumps(plan.vocabulary.tokenizer, ensure_ascii=False)
        (folder / TOKENIZER).write_text(text, encoding="utf-8")
    if first.description:
        save_json(folder / MODEL_DESCRIPTION, _description(first, recipe))
    write_recipe(folder, recipe)


def write_recipe(folder: Path, recipe: MergeConfig) -> None:
    """Writes the resolved recipe."""
    save_json(folder / RECIPE, recipe.model_dump(mode="json"))


def _tokenizer_source(plan: Plan, recipe: MergeConfig) -> Source:
    if recipe.tokenizer == "base" and plan.base is not None:
        return plan.base
    sources = [*plan.models, *([plan.base] if plan.base is not None else [])]
    return next((each for each in sources if each.location == recipe.tokenizer), plan.models[0])


def _files(source: Source) -> list[Path]:
    """The files of a model folder that belong to the model, without weights and their indices."""
    return [
        file
        for file in sorted(source.folder.iterdir())
        if file.is_file()
        and file.suffix in _SUFFIXES
        and file.name not in _LEFT
        and not file.name.endswith(".index.json")
    ]


def _is_of_tokenizer(file: Path) -> bool:
    return file.name.startswith(_OF_TOKENIZERS) or file.suffix in (".model", ".tiktoken")


def _config(plan: Plan, recipe: MergeConfig) -> dict[str, Any]:
    first = plan.models[0]
    config = stacked_config(recipe, plan.models) if recipe.method == "passthrough" else dict(first.config)
    config.pop(NAMED_WEIGHTS, None)
    if recipe.dtype != "auto":
        name = str(NUMBER_FORMATS[recipe.dtype]).removeprefix("torch.")
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(keys, name)
    if plan.vocabulary is not None:
        if first.text_config is first.config:
            config["vocab_size"] = plan.vocabulary.size
        else:
            config["text_config"] = {**first.text_config, "vocab_size": plan.vocabulary.size}
    return config


def _description(first: Source, recipe: MergeConfig) -> Mapping[str, Any]:
    """The first model's description. The result is not an adapter over the weights in `base` any more."""
    description = {key: value for key, value in first.description.items() if key != "base"}
    if recipe.dtype != "auto":
        description["precision"] = recipe.dtype
    return description
