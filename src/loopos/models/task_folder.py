"""A trained task model as a folder, out and in.

    model/   config.json  model.safetensors  tokenizer…   what `AutoModel.from_pretrained` opens
             head.safetensors  loopos.json                the head, and what its outputs mean

With pooling "last" on a causal model that transformers has a sequence classifier for, model.safetensors holds that
classifier, so that `AutoModelForSequenceClassification` opens the folder too. Written beside and renamed, so that a
folder is whole or absent. Left out: checkpoints of a run in progress (`training.checkpoint`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.models.backbone import Backbone
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_pretrained, save_json

ProblemType: TypeAlias = Literal["regression", "single_label_classification", "multi_label_classification"]
FORMAT = 1
DESCRIPTION = "loopos.json"
HEAD = "head.safetensors"
_PROBLEM_TYPES: Mapping[str, ProblemType] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
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
    # One process writes a run: what lies beside is left by one that was killed.
    for left in folder.parent.glob(f".{folder.name}.*-*"):
        shutil.rmtree(left)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    backbone = model.backbone.model
    _describe(backbone, tokenizer, description)
    cast_parameters(backbone, NUMBER_FORMATS[description["precision"]])
    classifier = _sequence_classifier(backbone, model) if description["pooling"] == "last" else None
    try:
        (backbone if classifier is None else classifier).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_file({"weight": model.head.weight.detach().float().cpu().contiguous()}, partial / HEAD)
        save_json(partial / DESCRIPTION, {"format": FORMAT, **description})
    except SafetensorError as problem:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors hides the system's error number; a caller that handles a full disk needs it.
        if f"os error {errno.ENOSPC}" in str(problem):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from problem
        raise
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _describe(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]) -> None:
    """Puts class names and the problem's kind where transformers looks for them."""
    config, names = backbone.config, list(description["class_names"])
    config.problem_type = _PROBLEM_TYPES[description["task"]]
    config.id2label = dict(enumerate(names)) if names else {0: "value"}
    config.label2id = {name: i for i, name in config.id2label.items()}
    if config.pad_token_id is None:
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


def model_folder(place: str | Path) -> Path:
    """The folder of a trained task model: `place` itself, or `model/` in a run's output folder. Raises `UserError`
    when there is none.
    """
    for folder in (Path(place), Path(place) / "model"):
        if (folder / DESCRIPTION).is_file():
            return folder
    if (Path(place) / "events.jsonl").is_file():
        raise UserError(f"{place}: this run has no finished model yet; go on with loopos train CONFIG --resume")
    raise UserError(f"{place}: no trained model here; wanted the output_dir of a finished run, or its folder model/")


def open_task_model(
    place: str | Path, *, attention: str = "auto"
) -> tuple[PooledModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The model in fp32, its tokenizer and its description. Raises `UserError` for a folder that is none, is
    broken, or is of a newer format.
    """
    folder = model_folder(place)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        head = load_file(folder / HEAD)["weight"]
    except (OSError, ValueError, KeyError, SafetensorError) as problem:
        raise UserError(f"{folder}: broken: {problem}; make it again: loopos train CONFIG --resume") from problem
    if not isinstance(description, dict):
        raise UserError(f"{folder / DESCRIPTION}: broken: no JSON object; make it again: loopos train CONFIG --resume")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{folder / DESCRIPTION}: format {description.get('format')}, wanted {FORMAT}: written by another version "
            "of LoopOS"
        )
    pretrained = load_pretrained(str(folder))
    model = PooledModel(
        Backbone(pretrained.model, attention=attention), num_outputs=len(head), pooling=description["pooling"], seed=0
    )
    with torch.no_grad():
        model.head.weight.copy_(head)
    return model, pretrained.tokenizer, description
