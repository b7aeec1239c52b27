"""A model as one folder that transformers opens, or LoopOS where the model has a head of its own.

Enters: a model folder. Leaves: another one with the same files, its weights in the number format that was asked for.
Left out: the model card (`model_card.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from loopos.config.paths import MODEL_DESCRIPTION
from loopos.deploy.streamed_weights import WEIGHTS, StreamedWeights, Tell, write_cast
from loopos.models.load import save_json
from loopos.models.task_folder import HEAD

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_PRECISIONS: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CONFIG, _GENERATION = "config.json", "generation_config.json"
# What is no weight of the model and no report about another folder.
_COPIED = (".json", ".jinja", ".model", ".txt", ".py")
_WRITTEN_HERE = frozenset({_CONFIG, MODEL_DESCRIPTION, "recipe.json", f"{WEIGHTS}.index.json", "trainer_state.json"})


def write_hugging_face(folder: Path, out: Path, kind: str, dtype: torch.dtype, tell: Tell) -> None:
    """Fills the empty folder `out`. kind: what the model is, see `ShippedModel`. Raises `UserError` where f16 is too
    narrow, `OSError` when the disk is full.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in _WRITTEN_HERE:
            shutil.copyfile(file, out / file.name)
    config = _read(folder / _CONFIG)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    save_json(out / _CONFIG, config)
    if (folder / MODEL_DESCRIPTION).is_file():
        description = _read(folder / MODEL_DESCRIPTION)
        if "precision" in description:
            description["precision"] = _PRECISIONS[dtype]
        save_json(out / MODEL_DESCRIPTION, description)
    if (folder / HEAD).is_file():
        # The head decides, and is small: it keeps its fp32.
        shutil.copyfile(folder / HEAD, out / HEAD)
    if kind == "language" and not (out / _GENERATION).is_file():
        GenerationConfig.from_model_config(PreTrainedConfig.from_dict(config)).save_pretrained(out)
    write_cast(StreamedWeights(folder), out / WEIGHTS, dtype, tell)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
