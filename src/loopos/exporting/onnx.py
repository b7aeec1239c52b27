"""Exports an encoder, a sequence classifier, or a LoopOS model with a head as one ONNX graph.

torch's exporter writes `model.onnx` from a traced program (`torch.export`), with its weights beside it. Inputs are
padded batches `input_ids`, `attention_mask` and, if the model has segment embeddings, `token_type_ids`. Language models
are not supported, as they need a cache. Letters: B texts, T tokens of the longest, d hidden size, C outputs.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.extras import install_command
from loopos.models.folders import read_head
from loopos.models.load import load_pretrained
from loopos.models.modeling_loopos import LoopOSForSequenceClassification
from loopos.models.resolve import Architecture, ModelRef
from loopos.models.task_layout import layout_at

FILE = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_COPIED = (
    "config.json",
    "loopos.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
_MOST_TEXTS = 4096
_LONGEST = 8192


def check_onnx(model: ModelRef) -> None:
    """Raises `UserError` for a language model, `MissingRequirement` if a package is not installed."""
    if model.architecture == "language":
        raise UserError(
            f"{model.name}: a language model; --format onnx holds encoders and models with a head: use --format gguf"
        )
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingRequirement(f"--format onnx needs {', '.join(missing)}; run\n  {install_command('onnx')}")


class WholeText(nn.Module):
    """Padded batches → the model's outputs for each text."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """`[B, T]` each → logits or scores `[B, C]`, or hidden states `[B, T, d]` of an encoder."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output: Any = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments)
        if hasattr(output, "logits"):
            logits: Tensor = output.logits
            return logits
        hidden: Tensor = output.last_hidden_state
        return hidden


def whole_text(folder: Path, kind: Architecture) -> WholeText:
    """The model in `folder`, in fp32. Raises `UserError` for a broken folder."""
    if kind == "classifier":
        opened = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=torch.float32)
        return _ready(WholeText(opened))
    backbone = load_pretrained(str(folder)).model
    if kind == "encoder":
        return _ready(WholeText(backbone))
    # LoopOS's own model for every pooling: it finds tokens by the mask, wherever pads are, and none by its id.
    layout, tokenizer = layout_at(folder, read_head(folder))
    return _ready(WholeText(replace(layout, kind="own", classifier=None).module(backbone, tokenizer.pad_token_id)))


def _ready(model: WholeText) -> WholeText:
    _text_config(model).use_cache = False
    return model.eval()


def write_onnx(folder: Path, kind: Architecture, out: Path) -> str:
    """Fills the empty folder `out`; returns the graph's file name. Raises `UserError` if torch cannot trace the model,
    `OSError` if the disk is full.
    """
    model = whole_text(folder, kind)
    example = _example(model)
    config = _text_config(model)
    texts = torch.export.Dim("texts", min=1, max=_MOST_TEXTS)
    tokens = torch.export.Dim("tokens", min=2, max=min(_LONGEST, getattr(config, "max_position_embeddings", _LONGEST)))
    try:
        with warnings.catch_warnings():
            # The exporter warns about its internal names, and about packages for images that no model here uses.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(example.values()),
                str(out / FILE),
                input_names=list(example),
                output_names=["hidden_states" if kind == "encoder" else "logits"],
                dynamic_shapes=tuple({0: texts, 1: tokens} for _ in example),
                dynamo=True,
                external_data=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"{folder}: torch cannot write this model as ONNX: {first}; use --format huggingface"
        ) from problem
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if kind in ("head", "reward"):
        _write_task_files(folder, out)
    return FILE


def _write_task_files(folder: Path, out: Path) -> None:
    """The tokenizer, and a config that describes the graph's outputs: the graph computes the head, so no code is
    needed.
    """
    layout, tokenizer = layout_at(folder, read_head(folder))
    config = replace(layout, kind="native", classifier=None).config(tokenizer.pad_token_id)
    config.architectures = None
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _text_config(model: WholeText) -> Any:
    """The text part of the transformer's config, also below a LoopOS head."""
    opened: Any = model.model
    backbone: Any = opened.base_model if isinstance(opened, LoopOSForSequenceClassification) else opened
    return backbone.config.get_text_config()


def _example(model: WholeText) -> dict[str, Tensor]:
    """Two texts of different length, to trace the program."""
    config = _text_config(model)
    ids = torch.arange(2 * 7).reshape(2, 7) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    example = {"input_ids": ids, "attention_mask": mask}
    if (getattr(config, "type_vocab_size", None) or 0) > 1:
        example["token_type_ids"] = torch.zeros_like(ids)
    return example


def onnx_outputs(file: Path, ids: Tensor) -> Tensor:
    """The graph's output for one text `[1, T]`: `[1, C]`, or `[T, d]`."""
    found = onnx_logits(
        file, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    )
    return found.reshape(-1, found.shape[-1])


def onnx_logits(file: Path, batch: Mapping[str, Tensor]) -> Tensor:
    """The graph's output for a batch of `[B, T]` each, by onnxruntime on CPU: `[B, C]`, or `[B, T, d]`. Ignores inputs
    that the graph does not have.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = {each.name for each in session.get_inputs()}
    [found] = session.run(None, {name: value.numpy() for name, value in batch.items() if name in names})
    return torch.from_numpy(found)
