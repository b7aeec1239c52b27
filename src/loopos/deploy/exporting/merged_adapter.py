"""An adapter folded into the weights under it, exactly: in fp32, before any other number format is taken.

Enters: a `FoundModel` and an empty folder. Leaves: the folder whose weights are to be shipped, and what was done, in
words. Left out: number formats (`number_formats.py`).

A run's own `model/` holds the merged weights in the format of its training. Where the same format is asked for, they
are what is shipped; where another one is, the adapter is merged anew over its base, so that nothing is rounded twice.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from loopos.config.faults import UserError
from loopos.models.adapter_folder import open_adapter_folder
from loopos.models.backbone import Backbone
from loopos.models.found_model import FoundModel
from loopos.models.heads import PooledModel
from loopos.models.load import Pretrained, load_adapted
from loopos.models.opened_model import OpenedModel
from loopos.models.task_folder import read_head
from loopos.storage.tensor_files import folder_tensors, holds_weights, usual_dtype

_OPENERS = {
    "language": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
    "encoder": AutoModel,
}


def weights_folder(model: FoundModel, dtype: torch.dtype | None, scratch: Path) -> tuple[Path, str]:
    """The folder to ship from, and what was done to get it; empty where it is the model's own. dtype: the format that
    will be asked of the weights; None for that of the folder. scratch: an empty folder that may be written into.

    Raises `UserError` for an adapter whose base cannot be opened.
    """
    if model.folder is None:
        return _merged(model, scratch), "adapter merged over its base in fp32"
    if not holds_weights(model.folder):
        return _as_safetensors(model, scratch), "weights read from a torch file"
    if model.adapter is None or dtype is None:
        return model.folder, ""
    stored = usual_dtype(folder_tensors(model.folder))
    if stored in (dtype, torch.float32):
        return model.folder, ""
    try:
        return _merged(model, scratch), "adapter merged over its base in fp32"
    except UserError as problem:
        first = str(problem).splitlines()[0]
        return model.folder, f"merged weights of the run, which are {stored}: its base cannot be opened ({first})"


def _merged(model: FoundModel, scratch: Path) -> Path:
    assert model.adapter is not None
    adapter = open_adapter_folder(model.adapter)
    folded = load_adapted(adapter, base=model.base, causal=model.kind == "language")
    merged = OpenedModel(
        model=folded.model,
        tokenizer=_tokenizer(model, folded),
        description={**model.description, "precision": "fp32"} if model.description else {},
        precision="fp32",
        pooled=_with_head(model, folded) if model.kind in ("head", "reward") else None,
    )
    merged.save(scratch / "merged")
    return scratch / "merged"


def _tokenizer(model: FoundModel, folded: Pretrained) -> PreTrainedTokenizerBase:
    """That of the run, which knows its chat template, before that of the adapter or its base."""
    if model.folder is None or not (model.folder / "tokenizer_config.json").is_file():
        return folded.tokenizer
    opened: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model.folder))
    return opened


def _with_head(model: FoundModel, folded: Pretrained) -> PooledModel:
    assert model.folder is not None
    weight = read_head(model.folder)
    # The backbone is written, not run: which way attention takes does not matter.
    backbone = Backbone(folded.model, attention="padded")
    pooled = PooledModel(backbone, num_outputs=len(weight), pooling=model.description["pooling"], seed=0)
    with torch.no_grad():
        pooled.head.weight.copy_(weight)
    return pooled


def _as_safetensors(model: FoundModel, scratch: Path) -> Path:
    """A checkpoint whose weights are a torch file, written as safetensors; torch's restricted reader opens it."""
    assert model.folder is not None
    folder = scratch / "safetensors"
    try:
        opened = _OPENERS[model.kind].from_pretrained(str(model.folder), dtype="auto")
        opened.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(model.folder)).save_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(f"{model.given}: cannot be opened: {first}; wanted weights as safetensors") from problem
    return folder
