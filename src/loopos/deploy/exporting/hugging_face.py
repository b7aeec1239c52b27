"""A model as one folder that transformers opens, or LoopOS where the model has a head of its own.

Enters: a model folder. Leaves: another one with the same files, its weights in the number format that was asked for.
Left out: the model card (`model_card.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from loopos.config.paths import MANIFEST, MODEL_DESCRIPTION, RECIPE
from loopos.deploy.exporting.number_formats import cast
from loopos.evaluation.progress import Tell
from loopos.models.load import NUMBER_FORMATS
from loopos.models.task_folder import HEAD, open_task_model, read_head, save_task_model
from loopos.models.task_layout import SCORE, layout_at
from loopos.storage.json_files import read_object, save_json
from loopos.storage.tensor_files import (
    INDEX,
    NAMED_WEIGHTS,
    WEIGHTS,
    StoredTensor,
    folder_tensors,
    save_tensors,
    write_tensors,
)
from loopos.storage.tensor_format import TensorSpec

_PRECISIONS = {dtype: name for name, dtype in NUMBER_FORMATS.items()}
_CONFIG, _GENERATION = "config.json", "generation_config.json"
# What is no weight of the model and no report about another folder.
_COPIED = (".json", ".jinja", ".model", ".txt", ".py")
_WRITTEN_HERE = frozenset({_CONFIG, MANIFEST, MODEL_DESCRIPTION, RECIPE, INDEX, "trainer_state.json"})


def write_hugging_face(folder: Path, out: Path, kind: str, dtype: torch.dtype | None, tell: Tell) -> None:
    """Fills the empty folder `out`. kind: what the model is, see `FoundModel`. dtype: the number format of the weights;
    None copies them as they are, which weights in codes must be. Raises `UserError` where f16 is too
    narrow, `OSError` when the disk is full.
    """
    if kind in ("head", "reward"):
        _write_task_model(folder, out, dtype, tell)
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in _WRITTEN_HERE:
            shutil.copyfile(file, out / file.name)
    config = read_object(folder / _CONFIG)
    # The weights are written under the usual name.
    config.pop(NAMED_WEIGHTS, None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    save_json(out / _CONFIG, config)
    if (folder / MODEL_DESCRIPTION).is_file():
        save_json(out / MODEL_DESCRIPTION, _description(folder, dtype))
    if kind == "language" and not (out / _GENERATION).is_file():
        GenerationConfig.from_model_config(PreTrainedConfig.from_dict(config)).save_pretrained(out)
    if dtype is None:
        shutil.copyfile(folder / WEIGHTS, out / WEIGHTS)
    else:
        write_cast(folder_tensors(folder), out, dtype, tell)


def _description(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    description = read_object(folder / MODEL_DESCRIPTION)
    if "precision" in description and dtype is not None:
        description["precision"] = _PRECISIONS[dtype]
    return description


def _write_task_model(folder: Path, out: Path, dtype: torch.dtype | None, tell: Tell) -> None:
    """A model with a head, in the layout that transformers opens right or refuses, whatever layout it has in `folder`.
    The head decides, and is small: it keeps its fp32.
    """
    if dtype is None:
        model, tokenizer, description = open_task_model(folder, attention="padded")
        # Saving replaces a folder as a whole, and `out` holds what is needed until the export ends.
        whole = out / ".model"
        save_task_model(whole, model, tokenizer, description)
        for file in whole.iterdir():
            file.rename(out / file.name)
        whole.rmdir()
        return
    head = read_head(folder)
    layout, tokenizer = layout_at(folder, head)
    layout.backbone.dtype = dtype
    layout.config(tokenizer.pad_token_id).save_pretrained(out)
    layout.write_beside(out, tokenizer)
    save_tensors(out / HEAD, {"weight": head})
    save_json(out / MODEL_DESCRIPTION, _description(folder, dtype))
    stored = {layout.tensor_name(name): each for name, each in folder_tensors(folder).items() if name != SCORE}
    write_cast(stored, out, dtype, tell, dict.fromkeys(layout.head_specs(), layout.outputs.weight))


def write_cast(
    stored: Mapping[str, StoredTensor],
    out: Path,
    dtype: torch.dtype,
    tell: Tell,
    kept: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Writes tensors into one file of `out`, every stored floating-point one in `dtype`; those of other kinds, and what
    is `kept` besides, stay as they are. Raises `UserError` where f16 is too narrow, `OSError` when the disk is full.
    """
    specs = {
        name: TensorSpec(dtype if each.spec.dtype.is_floating_point else each.spec.dtype, each.spec.shape)
        for name, each in stored.items()
    }
    specs |= {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    done = count()

    def tensor_of(name: str) -> Tensor:
        tell(next(done), len(specs), name)
        if name in kept:
            return kept[name]
        tensor = stored[name].read()
        return cast(name, tensor, dtype) if tensor.is_floating_point() else tensor

    write_tensors(out, specs, tensor_of)
    tell(len(specs), len(specs), "")
