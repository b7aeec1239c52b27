"""A model that reads whole texts, as one ONNX graph: an encoder, a sequence classifier, or a LoopOS model with a head.

Enters: a model folder. Leaves: `model.onnx` with its weights beside it, made by torch's own exporter from a traced
program (`torch.export`), and the tokenizer. Inputs are padded batches `input_ids`, `attention_mask` and, where the
model has embeddings of segments, `token_type_ids`; the output is what the model's kind says. Left out: language
models, which need a cache to say text (`gguf_file.py`), half precision.
Letters: B texts, T tokens of the longest, d hidden size, C outputs.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from loopos.config.extras import install_command
from loopos.config.faults import EnvironmentFault, UserError
from loopos.models.found_model import FoundKind, FoundModel
from loopos.models.load import load_pretrained
from loopos.models.model_folder import read_description
from loopos.models.task_folder import read_head

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


def check_onnx(model: FoundModel) -> None:
    """Raises `UserError` for a model that says text, `EnvironmentFault` where a package is not installed."""
    if model.kind == "language":
        raise UserError(
            f"{model.given}: a language model; --format onnx holds encoders and models with a head: use --format gguf"
        )
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentFault(f"--format onnx needs {', '.join(missing)}; run\n  {install_command('onnx')}")


class WholeText(nn.Module):
    """Padded batches → what the model says of each text."""

    def __init__(self, model: PreTrainedModel, *, pooling: str | None = None, head: Tensor | None = None) -> None:
        """pooling, head: of a model of LoopOS; without them the model's own outputs are given."""
        super().__init__()
        self.model, self.pooling = model, pooling
        self.head = None if head is None else nn.Parameter(head, requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """`[B, T]` each → logits or scores `[B, C]`, or hidden states `[B, T, d]` of an encoder."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output: Any = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments)
        if hasattr(output, "logits"):
            logits: Tensor = output.logits
            return logits
        hidden: Tensor = output.last_hidden_state
        if self.head is None or self.pooling is None:
            return hidden
        return pooled(hidden, attention_mask, self.pooling) @ self.head.T


def pooled(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector a text, over its real tokens, as `models.heads.pool`. hidden `[B, T, d]`, mask `[B, T]` with pads on
    the right → `[B, d]`.
    """
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(hidden.shape[0]), mask.sum(1) - 1]
    real = mask.unsqueeze(-1).to(hidden.dtype)
    if how == "mean":
        return (hidden * real).sum(1) / real.sum(1)
    return hidden.masked_fill(real == 0, float("-inf")).amax(1)


def whole_text(folder: Path, kind: FoundKind) -> WholeText:
    """The model in `folder`, in fp32. Raises `UserError` for a broken folder."""
    if kind == "classifier":
        opened = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=torch.float32)
        return _ready(WholeText(opened))
    backbone = load_pretrained(str(folder)).model
    if kind == "encoder":
        return _ready(WholeText(backbone))
    head, pooling = read_head(folder).float(), read_description(folder)["pooling"]
    return _ready(WholeText(backbone, pooling=pooling, head=head))


def _ready(model: WholeText) -> WholeText:
    model.model.config.use_cache = False
    return model.eval()


def write_onnx(folder: Path, kind: FoundKind, out: Path) -> str:
    """Fills the empty folder `out`; returns the graph's file name. Raises `UserError` where torch cannot trace the
    model, `OSError` when the disk is full.
    """
    model = whole_text(folder, kind)
    example = _example(model)
    config = model.model.config.get_text_config()
    texts = torch.export.Dim("texts", min=1, max=_MOST_TEXTS)
    tokens = torch.export.Dim("tokens", min=2, max=min(_LONGEST, getattr(config, "max_position_embeddings", _LONGEST)))
    try:
        with warnings.catch_warnings():
            # The exporter speaks of its own inner names, and of packages for pictures that no model here uses.
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
    return FILE


def _example(model: WholeText) -> dict[str, Tensor]:
    """Two texts of unlike length, by which the program is traced."""
    config = model.model.config.get_text_config()
    ids = torch.arange(2 * 7).reshape(2, 7) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    example = {"input_ids": ids, "attention_mask": mask}
    if (getattr(config, "type_vocab_size", None) or 0) > 1:
        example["token_type_ids"] = torch.zeros_like(ids)
    return example


def onnx_outputs(file: Path, ids: Tensor) -> Tensor:
    """What the graph says of one text `[1, T]`, by onnxruntime on CPU: `[1, C]`, or `[T, d]`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    wanted = {each.name for each in session.get_inputs()}
    [found] = session.run(None, {name: value.numpy() for name, value in given.items() if name in wanted})
    return torch.from_numpy(found).reshape(-1, found.shape[-1])
