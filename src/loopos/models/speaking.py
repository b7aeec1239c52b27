"""What speaks at a place, opened: a language model, or an ensemble that mixes several.

Enters: a place, a device, a number format. Leaves: the model with its tokenizer and what LoopOS wrote of it. Left out:
ensembles that vote (`evaluation.reasoning`), templates and step formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.functional.mixing import MixtureMethod
from loopos.models.ensemble_recipe import EnsembleRecipe, read_ensemble, refuse_votes
from loopos.models.language_ensemble import LanguageEnsemble, check_one_vocabulary
from loopos.models.language_folder import open_language_model
from loopos.models.load import NUMBER_FORMATS, cast_parameters


@dataclass(frozen=True)
class Speaking:
    """`description`: what LoopOS wrote of the model, of an ensemble that of its first member; empty for others."""

    model: PreTrainedModel | LanguageEnsemble
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]


def open_speaking(
    place: str, *, device: str = "cpu", precision: str | None = None, trust_remote_code: bool = False
) -> Speaking:
    """place: as `open_language_model`, or the folder of an ensemble. precision: fp32, bf16 or fp16; that of the
    training when absent, bf16 for quantized models and fp32 for others; of an ensemble for every member. Raises
    `UserError`, also for an ensemble that votes and for members with other tokens.
    """
    recipe = read_ensemble(place)
    refuse_votes(place, recipe)
    if recipe is None:
        return _single(place, device, precision, trust_remote_code)
    return _mixed(recipe, [_single(member, device, precision, trust_remote_code) for member in recipe.members])


def _mixed(recipe: EnsembleRecipe, opened: list[Speaking]) -> Speaking:
    models = [cast(PreTrainedModel, each.model) for each in opened]
    sizes = [int(model.config.get_text_config().vocab_size) for model in models]
    check_one_vocabulary(recipe.members, [each.tokenizer for each in opened], sizes)
    ensemble = LanguageEnsemble(tuple(models), recipe.weights, cast(MixtureMethod, recipe.method))
    return Speaking(ensemble, opened[0].tokenizer, opened[0].description)


def _single(place: str, device: str, precision: str | None, trust_remote_code: bool) -> Speaking:
    opened = open_language_model(place, trust_remote_code=trust_remote_code)
    chosen = precision or opened.precision
    if chosen not in NUMBER_FORMATS:
        raise UserError(f"precision: given {chosen}, wanted one of {', '.join(NUMBER_FORMATS)}")
    cast_parameters(opened.model, NUMBER_FORMATS[chosen])
    model = opened.model.to(torch.device(device))  # type: ignore[arg-type]
    return Speaking(model, opened.tokenizer, opened.description)
