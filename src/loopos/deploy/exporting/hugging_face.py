"""A model as one folder that transformers opens, or LoopOS where the model has a head of its own.

Enters: a model folder. Leaves: another one with the same files, its weights in the number format that was asked for.
Left out: the model card (`model_card.py`).
"""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from loopos.config.paths import MANIFEST, MODEL_DESCRIPTION, RECIPE
from loopos.deploy.exporting.number_formats import cast
from loopos.evaluation.progress import Tell
from loopos.models.load import NUMBER_FORMATS
from loopos.models.task_folder import HEAD
from loopos.storage.json_files import read_object, save_json
from loopos.storage.tensor_files import INDEX, NAMED_WEIGHTS, WEIGHTS, folder_tensors, write_tensors
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
        description = read_object(folder / MODEL_DESCRIPTION)
        if "precision" in description and dtype is not None:
            description["precision"] = _PRECISIONS[dtype]
        save_json(out / MODEL_DESCRIPTION, description)
    if (folder / HEAD).is_file():
        # The head decides, and is small: it keeps its fp32.
        shutil.copyfile(folder / HEAD, out / HEAD)
    if kind == "language" and not (out / _GENERATION).is_file():
        GenerationConfig.from_model_config(PreTrainedConfig.from_dict(config)).save_pretrained(out)
    if dtype is None:
        shutil.copyfile(folder / WEIGHTS, out / WEIGHTS)
    else:
        write_cast(folder, out, dtype, tell)


def write_cast(folder: Path, out: Path, dtype: torch.dtype, tell: Tell) -> None:
    """Writes the weights of `folder` into one file of `out`, every floating-point tensor in `dtype`; other tensors stay
    as they are. Raises `UserError` where f16 is too narrow, `OSError` when the disk is full.
    """
    stored = folder_tensors(folder)
    specs = {
        name: TensorSpec(dtype if each.spec.dtype.is_floating_point else each.spec.dtype, each.spec.shape)
        for name, each in stored.items()
    }
    done = count()

    def tensor_of(name: str) -> Tensor:
        tell(next(done), len(stored), name)
        tensor = stored[name].read()
        return cast(name, tensor, dtype) if tensor.is_floating_point() else tensor

    write_tensors(out, specs, tensor_of)
    tell(len(stored), len(stored), "")
