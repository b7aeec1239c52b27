"""A trained task model as a folder, out and in.

    model/   config.json  model.safetensors  tokenizer…   what transformers opens, or refuses (`task_layout.py`)
             head.safetensors  loopos.json                the head as it was trained, and what its outputs mean

Written beside and renamed, so that a folder is whole or absent. Left out: checkpoints of a run in progress
(`training.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.config.paths import HEAD_FILE, MODEL_DESCRIPTION
from loopos.models.backbone import Backbone
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_pretrained
from loopos.models.model_folder import FORMAT, kind_of, model_folder, read_description
from loopos.models.quantized_folder import save_weights
from loopos.models.task_layout import TaskLayout, folder_tokenizer
from loopos.storage.json_files import save_json
from loopos.storage.manifest import check_manifest
from loopos.storage.tensor_files import read_tensors, require_finite, save_tensors
from loopos.storage.whole_folder import whole_folder

HEAD = HEAD_FILE


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
    backbone, head = model.backbone.model, model.head.weight.detach().float().cpu()
    tokenizer = folder_tokenizer(tokenizer, backbone.config)
    layout = TaskLayout.of(backbone.config, head, description, tokenizer)
    cast_parameters(backbone, NUMBER_FORMATS[description["precision"]])
    with whole_folder(folder) as partial:
        save_weights(partial, layout.module(backbone, tokenizer.pad_token_id))
        layout.write_beside(partial, tokenizer)
        save_tensors(partial / HEAD, {"weight": head})
        save_json(partial / MODEL_DESCRIPTION, {**description, "format": FORMAT})


def read_head(folder: Path) -> Tensor:
    """The head's weight `[C, d]`. Raises `UserError` for a file that is missing or broken."""
    check_manifest(folder, of=lambda name: name == HEAD)
    try:
        weight = read_tensors(folder / HEAD)["weight"]
        require_finite("the head", weight)
        return weight
    except (KeyError, UserError) as problem:
        raise UserError(f"{folder}: broken: {problem}; make it again: loopos train CONFIG --resume") from problem


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
