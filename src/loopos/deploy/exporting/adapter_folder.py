"""The adapter that a model was trained as, as a PEFT folder of its own.

Enters: a `FoundModel` with an adapter. Leaves: a folder that `PeftModel.from_pretrained` opens over the base. Left
out: merging (`merged_adapter.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from loopos.config.faults import UserError
from loopos.deploy.exporting.number_formats import cast
from loopos.models.adapter_folder import ADAPTER_WEIGHTS
from loopos.models.found_model import FoundModel
from loopos.models.sources import ADAPTER_CONFIG
from loopos.storage.json_files import read_object, save_json
from loopos.storage.tensor_files import read_tensors, save_tensors

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def require_adapter(model: FoundModel) -> Path:
    """The model's adapter. Raises `UserError` where it was not trained as one."""
    if model.adapter is None:
        raise UserError(
            f'{model.given}: no adapter here; wanted the folder of a run with "trainable": "lora", or that of an '
            "adapter: export the whole model with --format huggingface"
        )
    if not (model.adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{model.adapter}: no {ADAPTER_WEIGHTS}; wanted an adapter as safetensors")
    return model.adapter


def write_adapter(model: FoundModel, out: Path, dtype: torch.dtype | None) -> None:
    """Fills the empty folder `out`. dtype: the format of its tensors; their own when None. Raises `UserError` where
    f16 is too narrow, `OSError` when the disk is full.
    """
    adapter = require_adapter(model)
    save_json(out / ADAPTER_CONFIG, read_object(adapter / ADAPTER_CONFIG))
    tensors = read_tensors(adapter / ADAPTER_WEIGHTS)
    if dtype is not None:
        tensors = {name: cast(name, tensor, dtype) for name, tensor in tensors.items()}
    save_tensors(out / ADAPTER_WEIGHTS, tensors)
    beside = model.folder or adapter
    for name in _TOKENIZER:
        if (beside / name).is_file():
            shutil.copyfile(beside / name, out / name)
