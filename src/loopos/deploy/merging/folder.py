"""The folder of a merged model, all but its weights: config, tokenizer, description.

Enters: a plan and a recipe. Leaves: files, so that the result opens as the models did. Left out: weights
(`deploy.merge`), the report (`report.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopos.config.merge import MergeConfig
from loopos.config.paths import MANIFEST, MODEL_DESCRIPTION, RECIPE
from loopos.deploy.merging.layers import stacked_config
from loopos.deploy.merging.plan import Plan
from loopos.deploy.merging.sources import Source
from loopos.deploy.merging.vocabulary import TOKENIZER
from loopos.deploy.shipped_folder import REPORT
from loopos.models.load import NUMBER_FORMATS
from loopos.storage.json_files import save_json
from loopos.storage.tensor_files import NAMED_WEIGHTS

# What stands beside a model and says nothing of the merged one.
_LEFT = frozenset({MANIFEST, RECIPE, MODEL_DESCRIPTION, "config.json", "README.md", REPORT, "events.jsonl"})
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")
_OF_TOKENIZERS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")


def write_beside(folder: Path, plan: Plan, recipe: MergeConfig) -> None:
    """Writes everything but weights and report."""
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
    return next((each for each in sources if each.place == recipe.tokenizer), plan.models[0])


def _files(source: Source) -> list[Path]:
    """The files of a model's folder that belong to the model, without weights and their indices."""
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
    """What the first model says of itself. It is no longer an adapter over the weights that `base` tells."""
    description = {key: value for key, value in first.description.items() if key != "base"}
    if recipe.dtype != "auto":
        description["precision"] = recipe.dtype
    return description
