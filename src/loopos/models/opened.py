"""Opens models of any kind: to be changed and saved as the same kind (`OpenedModel`), or to generate
(`GenerationModel`, a language model or an ensemble that mixes several).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.paths import NEW_WEIGHTS
from loopos.functional.mixing import MixtureMethod
from loopos.models.ensemble_recipe import EnsembleRecipe, read_ensemble, refuse_votes
from loopos.models.folders import (
    open_language_model,
    open_task_model,
    save_language_model,
    save_pretrained,
    save_task_model,
)
from loopos.models.heads import PooledModel
from loopos.models.language_ensemble import LanguageEnsemble, check_one_vocabulary
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_config
from loopos.models.model_folder import described, kind_of
from loopos.models.quantized import is_quantized


@dataclass(frozen=True)
class OpenedModel:
    """`model` in fp32 on CPU: a causal language model, or the headless model of `pooled`, the model with a head.
    `precision`: the format of the saved weights. `description`: what LoopOS wrote about the model, empty for others.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    precision: str
    pooled: PooledModel | None = None

    def save(self, folder: Path) -> None:
        """Saves the model as the same kind, in its own format. Raises `OSError` when the disk is full."""
        self.model.to("cpu")  # type: ignore[arg-type]
        if self.pooled is not None:
            save_task_model(folder, self.pooled, self.tokenizer, self.description)
        elif self.description:
            save_language_model(folder, self.model, self.tokenizer, self.description)
        else:
            cast_parameters(self.model, NUMBER_FORMATS[self.precision])
            save_pretrained(folder, self.model, self.tokenizer)


def open_model(source: str, *, quantized: bool = False) -> OpenedModel:
    """source: a run's folder, a model folder, or a value of `data.pretrained_weights`. quantized: accept quantized
    weights, which cannot be changed. Raises `UserError`.
    """
    opened = _opened(source)
    if is_quantized(opened.model) and not quantized:
        raise UserError(
            f"{source}: quantized: its weights are codes, which cannot be changed; expected the model it was made from"
        )
    return opened


def _opened(source: str) -> OpenedModel:
    if source == NEW_WEIGHTS:
        raise UserError('got "new", which has learned nothing; expected a trained model')
    if has_head(source):
        # The padded path keeps transformers' own attention.
        pooled, tokenizer, description = open_task_model(source, attention="padded")
        return OpenedModel(pooled.backbone.model, tokenizer, description, description["precision"], pooled)
    opened = open_language_model(source)
    return OpenedModel(opened.model, opened.tokenizer, opened.description, precision_of(source))


def has_head(source: str) -> bool:
    """Whether `source` is a model with a head. Raises `UserError` for a run without a finished model."""
    return kind_of(described(source)) != "language"


def precision_of(source: str) -> str:
    """The format of a model's saved weights: fp32, bf16 or fp16."""
    if description := described(source):
        return str(description["precision"])
    stored = load_config(source).dtype
    return next((name for name, dtype in NUMBER_FORMATS.items() if stored == dtype), "fp32")


@dataclass(frozen=True)
class GenerationModel:
    """A model that generates. `description`: what LoopOS wrote about it, for an ensemble about its first member; empty
    for others.
    """

    model: PreTrainedModel | LanguageEnsemble
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]


def open_generation_model(
    source: str, *, device: str = "cpu", precision: str | None = None, trust_remote_code: bool = False
) -> GenerationModel:
    """source: as for `open_language_model`, or an ensemble's folder. precision: fp32, bf16 or fp16 for all members; by
    default that of training, bf16 for quantized models and fp32 for others. Raises `UserError`, also for an ensemble
    that votes and for members with different tokens.
    """
    recipe = read_ensemble(source)
    refuse_votes(source, recipe)
    if recipe is None:
        return _single(source, device, precision, trust_remote_code)
    return _mixed(recipe, [_single(member, device, precision, trust_remote_code) for member in recipe.members])


def _mixed(recipe: EnsembleRecipe, opened: list[GenerationModel]) -> GenerationModel:
    models = [cast(PreTrainedModel, each.model) for each in opened]
    sizes = [int(model.config.get_text_config().vocab_size) for model in models]
    check_one_vocabulary(recipe.members, [each.tokenizer for each in opened], sizes)
    ensemble = LanguageEnsemble(tuple(models), recipe.weights, cast(MixtureMethod, recipe.method))
    return GenerationModel(ensemble, opened[0].tokenizer, opened[0].description)


def _single(source: str, device: str, precision: str | None, trust_remote_code: bool) -> GenerationModel:
    opened = open_language_model(source, trust_remote_code=trust_remote_code)
    chosen = precision or opened.precision
    if chosen not in NUMBER_FORMATS:
        raise UserError(f"precision: got {chosen}, expected one of {', '.join(NUMBER_FORMATS)}")
    cast_parameters(opened.model, NUMBER_FORMATS[chosen])
    model = opened.model.to(torch.device(device))  # type: ignore[arg-type]
    return GenerationModel(model, opened.tokenizer, opened.description)
