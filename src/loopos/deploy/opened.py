"""A model folder opened to be changed, whatever its kind, and written back as that kind.

Enters: the place of a model. Leaves: an `OpenedModel`; later its folder, as transformers and LoopOS open it. Left out:
what is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.config.paths import MODEL_DESCRIPTION
from loopos.models.heads import PooledModel
from loopos.models.language_folder import open_language_model, save_language_model
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_config
from loopos.models.model_folder import model_folder, read_description
from loopos.models.pretrained_folder import save_pretrained
from loopos.models.task_folder import open_task_model, save_task_model


@dataclass(frozen=True)
class OpenedModel:
    """`model` in fp32 on CPU: a causal language model, or the headless one under `pooled`, the model with a head.
    `precision`: the format that its weights are kept in; `description`: what LoopOS wrote of it, empty for others.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    precision: str
    pooled: PooledModel | None = None

    def save(self, folder: Path) -> None:
        """Writes the model as what it was; it is then in its own format. Raises `OSError` when the disk is full."""
        self.model.to("cpu")  # type: ignore[arg-type]
        if self.pooled is not None:
            save_task_model(folder, self.pooled, self.tokenizer, _own(self.description))
        elif self.description:
            save_language_model(folder, self.model, self.tokenizer, _own(self.description))
        else:
            cast_parameters(self.model, NUMBER_FORMATS[self.precision])
            save_pretrained(folder, self.model, self.tokenizer)


def has_head(place: str) -> bool:
    """Whether a place holds a model with a head. Raises `UserError` for a run without a finished model."""
    return "pooling" in _described(place)


def open_model(place: str) -> OpenedModel:
    """place: a run's folder, a model folder, or whatever `data.pretrained_weights` may name. Raises `UserError`."""
    description = _described(place)
    if "pooling" in description:
        # The plain path leaves transformers' own attention in place.
        pooled, tokenizer, description = open_task_model(place, attention="padded")
        return OpenedModel(pooled.backbone.model, tokenizer, description, description["precision"], pooled)
    opened = open_language_model(place)
    return OpenedModel(opened.model, opened.tokenizer, opened.description, precision_of(place))


def precision_of(place: str) -> str:
    """The format that a model's weights are kept in: fp32, bf16 or fp16."""
    described = _described(place)
    if described:
        return str(described["precision"])
    kept = load_config(place).dtype
    return next((name for name, dtype in NUMBER_FORMATS.items() if kept == dtype), "fp32")


def _described(place: str) -> Mapping[str, Any]:
    names = (MODEL_DESCRIPTION, f"model/{MODEL_DESCRIPTION}", "events.jsonl")
    if any((Path(place) / name).is_file() for name in names):
        return read_description(model_folder(place))
    if place == "new":
        raise UserError('given "new", which has learned nothing; wanted a trained model')
    return {}


def _own(description: Mapping[str, Any]) -> Mapping[str, Any]:
    """The description without the mark of the format, which whoever writes it sets."""
    return {name: value for name, value in description.items() if name != "format"}


@torch.no_grad()
def probe(model: PreTrainedModel) -> torch.Tensor:
    """What a model says to a fixed row of tokens, `[L, V]` or `[L, d]` in fp32, to tell whether it opens as it was."""
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, 9), generator=draw).to(model.device)
    was_training = model.training
    model.train(False)
    output = model(input_ids=ids)
    model.train(was_training)
    found: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found[0].float().cpu()
