"""Exports to folders that transformers, PEFT or LoopOS open; number formats; and merging an adapter before an export.

An adapter is merged in fp32. A run's `model/` holds merged weights in the training format: if that format is requested,
they are exported; for another one the adapter is merged again over its base, so that nothing is rounded twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from loopos.config.diagnostics import UserError
from loopos.config.paths import MANIFEST, MODEL_DESCRIPTION, RECIPE
from loopos.evaluation.progress import OnProgress
from loopos.models.adapter_folder import ADAPTER_WEIGHTS, open_adapter_folder
from loopos.models.backbone import Backbone
from loopos.models.folders import HEAD, OpenedModel, open_task_model, read_head, save_task_model
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, Pretrained, load_adapted
from loopos.models.resolve import ADAPTER_CONFIG, ModelRef
from loopos.models.task_layout import SCORE, layout_at
from loopos.storage.json_files import read_object, save_json
from loopos.storage.tensor_files import (
    INDEX,
    NAMED_WEIGHTS,
    WEIGHTS,
    StoredTensor,
    TensorSpec,
    folder_tensors,
    holds_weights,
    read_tensors,
    require_finite,
    save_tensors,
    usual_dtype,
    write_tensors,
)

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another format. Raises `UserError` for numbers that are not finite, or would not be."""
    require_finite(name, tensor)
    found = tensor.to(dtype)
    if dtype == torch.float16 and bool(found.isinf().any()):
        raise UserError(f"{name}: contains numbers up to {tensor.abs().max():.3g}, too large for f16; use --type bf16")
    return found


_PRECISIONS = {dtype: name for name, dtype in NUMBER_FORMATS.items()}
_CONFIG, _GENERATION = "config.json", "generation_config.json"
# Files of a model other than its weights and reports.
_COPIED = (".json", ".jinja", ".model", ".txt", ".py")
_WRITTEN_HERE = frozenset({_CONFIG, MANIFEST, MODEL_DESCRIPTION, RECIPE, INDEX, "trainer_state.json"})


def write_hugging_face(folder: Path, out: Path, kind: str, dtype: torch.dtype | None, on_progress: OnProgress) -> None:
    """Fills the empty folder `out`. kind: see `ModelRef`. dtype: the number format of the weights; None copies
    them unchanged, which quantized weights require. Raises `UserError` if f16 is too narrow, `OSError` if the disk is
    full.
    """
    if kind in ("head", "reward"):
        _write_task_model(folder, out, dtype, on_progress)
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in _WRITTEN_HERE:
            shutil.copyfile(file, out / file.name)
    config = read_object(folder / _CONFIG)
    # The weights get the default file name.
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
        write_cast(folder_tensors(folder), out, dtype, on_progress)


def _description(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    description = read_object(folder / MODEL_DESCRIPTION)
    if "precision" in description and dtype is not None:
        description["precision"] = _PRECISIONS[dtype]
    return description


def _write_task_model(folder: Path, out: Path, dtype: torch.dtype | None, on_progress: OnProgress) -> None:
    """A model with a head, in the layout that transformers opens correctly or refuses, whatever its layout in `folder`.
    The head decides the prediction and is small: it stays in fp32.
    """
    if dtype is None:
        model, tokenizer, description = open_task_model(folder, attention="padded")
        # Saving replaces a whole folder, and `out` contains files that are needed until the export ends.
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
    write_cast(stored, out, dtype, on_progress, dict.fromkeys(layout.head_specs(), layout.outputs.weight))


def write_cast(
    stored: Mapping[str, StoredTensor],
    out: Path,
    dtype: torch.dtype,
    on_progress: OnProgress,
    unchanged: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Writes tensors into one file of `out`, every stored floating-point one in `dtype`; those of other kinds, and what
    is `kept` besides, stay as they are. Raises `UserError` where f16 is too narrow, `OSError` when the disk is full.
    """
    specs = {
        name: TensorSpec(dtype if each.spec.dtype.is_floating_point else each.spec.dtype, each.spec.shape)
        for name, each in stored.items()
    }
    specs |= {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in unchanged.items()}
    counter = count()

    def tensor_of(name: str) -> Tensor:
        on_progress(next(counter), len(specs), name)
        if name in unchanged:
            return unchanged[name]
        tensor = stored[name].read()
        return cast(name, tensor, dtype) if tensor.is_floating_point() else tensor

    write_tensors(out, specs, tensor_of)
    on_progress(len(specs), len(specs), "")


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def require_adapter(model: ModelRef) -> Path:
    """The model's adapter. Raises `UserError` where it was not trained as one."""
    if model.adapter is None:
        raise UserError(
            f'{model.name}: no adapter here; expected the folder of a run with "trainable": "lora", or that of an '
            "adapter: export the whole model with --format huggingface"
        )
    if not (model.adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{model.adapter}: no {ADAPTER_WEIGHTS}; expected an adapter as safetensors")
    return model.adapter


def write_adapter(model: ModelRef, out: Path, dtype: torch.dtype | None) -> None:
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


_OPENERS = {
    "language": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
    "encoder": AutoModel,
}


def weights_folder(model: ModelRef, dtype: torch.dtype | None, scratch: Path) -> tuple[Path, str]:
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


def _merged(model: ModelRef, scratch: Path) -> Path:
    assert model.adapter is not None
    adapter = open_adapter_folder(model.adapter)
    folded = load_adapted(adapter, base=model.base, causal=model.architecture == "language")
    merged = OpenedModel(
        model=folded.model,
        tokenizer=_tokenizer(model, folded),
        description={**model.description, "precision": "fp32"} if model.description else {},
        precision="fp32",
        pooled=_with_head(model, folded) if model.architecture in ("head", "reward") else None,
    )
    merged.save(scratch / "merged")
    return scratch / "merged"


def _tokenizer(model: ModelRef, folded: Pretrained) -> PreTrainedTokenizerBase:
    """That of the run, which knows its chat template, before that of the adapter or its base."""
    if model.folder is None or not (model.folder / "tokenizer_config.json").is_file():
        return folded.tokenizer
    opened: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model.folder))
    return opened


def _with_head(model: ModelRef, folded: Pretrained) -> PooledModel:
    assert model.folder is not None
    weight = read_head(model.folder)
    # The backbone is written, not run: which way attention takes does not matter.
    backbone = Backbone(folded.model, attention="padded")
    pooled = PooledModel(backbone, num_outputs=len(weight), pooling=model.description["pooling"], seed=0)
    with torch.no_grad():
        pooled.head.weight.copy_(weight)
    return pooled


def _as_safetensors(model: ModelRef, scratch: Path) -> Path:
    """A checkpoint whose weights are a torch file, written as safetensors; torch's restricted reader opens it."""
    assert model.folder is not None
    folder = scratch / "safetensors"
    try:
        opened = _OPENERS[model.architecture].from_pretrained(str(model.folder), dtype="auto")
        opened.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(model.folder)).save_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(f"{model.name}: cannot be opened: {first}; expected weights as safetensors") from problem
    return folder
