"""A trained task model as a folder, out and in.

    model/   config.json  model.safetensors  tokenizer…   what `AutoModel.from_pretrained` opens
             head.safetensors  loopos.json                the head, and what its outputs mean

With pooling "last" on a causal model that transformers has a sequence classifier for, model.safetensors holds that
classifier, so that `AutoModelForSequenceClassification` opens the folder too. Written beside and renamed, so that a
folder is whole or absent. Left out: checkpoints of a run in progress (`training.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.config.paths import HEAD_FILE, MODEL_DESCRIPTION
from loopos.models.backbone import Backbone
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_pretrained
from loopos.models.model_folder import FORMAT, kind_of, model_folder, read_description
from loopos.models.quantized_folder import save_weights
from loopos.storage.json_files import save_json
from loopos.storage.tensor_files import read_tensors, require_finite, save_tensors
from loopos.storage.whole_folder import whole_folder

ProblemType: TypeAlias = Literal["regression", "single_label_classification", "multi_label_classification"]
HEAD = HEAD_FILE
_PROBLEM_TYPES: Mapping[str, ProblemType] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    "reward": "regression",
}


def save_task_model(
    folder: Path,
    model: PooledModel,
    tokenizer: PreTrainedTokenizerBase,
    description: Mapping[str, Any],
) -> None:
    """Writes backbone, head, tokenizer and `description` (needs task, pooling, class_names and precision, the format
    that the backbone takes); replaces the folder at once. LoRA layers must be merged before. Raises `OSError` when
    the disk is full.
    """
    backbone = model.backbone.model
    _describe(backbone, tokenizer, description)
    cast_parameters(backbone, NUMBER_FORMATS[description["precision"]])
    classifier = _sequence_classifier(backbone, model) if description["pooling"] == "last" else None
    with whole_folder(folder) as partial:
        save_weights(partial, backbone if classifier is None else classifier)
        tokenizer.save_pretrained(partial)
        save_tensors(partial / HEAD, {"weight": model.head.weight.detach().float()})
        save_json(partial / MODEL_DESCRIPTION, {**description, "format": FORMAT})


def read_head(folder: Path) -> Tensor:
    """The head's weight `[C, d]`. Raises `UserError` for a file that is missing or broken."""
    try:
        weight = read_tensors(folder / HEAD)["weight"]
        require_finite("the head", weight)
        return weight
    except (KeyError, UserError) as problem:
        raise UserError(f"{folder}: broken: {problem}; make it again: loopos train CONFIG --resume") from problem


def _describe(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]) -> None:
    """Puts class names and the problem's kind where transformers looks for them."""
    config, names = backbone.config, list(description["class_names"])
    config.problem_type = _PROBLEM_TYPES[description["task"]]
    config.id2label = dict(enumerate(names)) if names else {0: "value"}
    config.label2id = {name: i for i, name in config.id2label.items()}
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _sequence_classifier(backbone: PreTrainedModel, model: PooledModel) -> PreTrainedModel | None:
    """transformers' own sequence classifier around this backbone and head, or None where it has none of that shape."""
    try:
        with torch.device("meta"):
            classifier: PreTrainedModel = AutoModelForSequenceClassification.from_config(backbone.config)  # type: ignore[no-untyped-call]
    except ValueError:
        return None
    score, prefix = getattr(classifier, "score", None), classifier.base_model_prefix
    if not isinstance(score, torch.nn.Linear) or getattr(score, "bias", None) is not None:
        return None
    if type(getattr(classifier, prefix, None)) is not type(backbone):
        return None
    setattr(classifier, prefix, backbone)
    weight = model.head.weight.detach()
    classifier.score = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    with torch.no_grad():
        classifier.score.weight.copy_(weight)
    classifier.score.to(backbone.dtype)
    assert isinstance(classifier, PreTrainedModel)
    return classifier


def open_task_model(
    place: str | Path, *, attention: str = "auto"
) -> tuple[PooledModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The model in fp32, its tokenizer and its description. Raises `UserError` for a folder that is none, is
    broken, or is of a newer format.
    """
    folder = model_folder(place)
    description = read_description(folder)
    if kind_of(description) == "ensemble":
        raise UserError(f"{folder}: an ensemble of several models; loopos predict and loopos evaluate open it")
    if kind_of(description) == "language":
        raise UserError(f"{folder}: a language model, without a head; loopos generate and loopos chat open it")
    head = read_head(folder)
    pretrained = load_pretrained(str(folder), quantized=True)
    model = PooledModel(
        Backbone(pretrained.model, attention=attention), num_outputs=len(head), pooling=description["pooling"], seed=0
    )
    with torch.no_grad():
        model.head.weight.copy_(head)
    return model, pretrained.tokenizer, description
