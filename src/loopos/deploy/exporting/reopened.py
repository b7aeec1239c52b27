"""What was exported, opened again on a probe text: encoders, models with a head, and adapters.

Enters: a place of a model. Leaves: its outputs, in fp32 on CPU. Left out: language models (`language_check.py`), what
is made of two outputs (`verdict.py`), quality on data (`loopos evaluate`).
Letters: T tokens, V vocabulary, d features, C outputs.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from loopos.config.faults import UserError
from loopos.data.formats import Labelled
from loopos.data.rows import Row
from loopos.data.tokens import encode_labelled
from loopos.evaluation.outputs import outputs_of
from loopos.models.found_model import FoundKind
from loopos.models.load import load_pretrained
from loopos.models.task_folder import open_task_model

PROBE = (
    "The parcel came late and the box was open. Please answer within the hour: where is the invoice for March, and why "
    "was my card charged twice?"
)


@torch.no_grad()
def outputs_at(folder: Path, kind: FoundKind, rounded_to: torch.dtype | None = None) -> Tensor:
    """Outputs of a model folder for the probe: hidden states `[T, d]`, or `[1, C]` of a head. rounded_to: a
    number format that the weights, but for a head's, are rounded to first.
    """
    if kind in ("head", "reward"):
        model, tokenizer, description = open_task_model(folder)
        row = Labelled(PROBE, None, None, Row({}, "probe", None, 0))
        if rounded_to is not None:
            round_weights(model.backbone.model, rounded_to)
        encoded, _ = encode_labelled(tokenizer, [row], max_length=description["max_length"])
        return outputs_of(model, encoded, torch.device("cpu"))
    opener: Any = AutoModelForSequenceClassification if kind == "classifier" else AutoModel
    opened = opener.from_pretrained(str(folder), dtype=torch.float32).eval()
    if rounded_to is not None:
        round_weights(opened, rounded_to)
    return _run(opened, probe_ids(folder, opened.config))


@torch.no_grad()
def adapter_outputs(adapter: Path, base: str, folder: Path, rounded_to: torch.dtype | None = None) -> Tensor:
    """Logits `[T, V]`, or hidden states `[T, d]`, of an adapter that peft puts over its base. folder: the model's, for
    the tokenizer. rounded_to: a number format that the adapter's own weights are rounded to first.
    """
    from peft import PeftConfig, PeftModel

    causal = PeftConfig.from_pretrained(str(adapter)).task_type in (None, "CAUSAL_LM")
    opened = load_pretrained(base, causal=causal)
    of_base = {id(parameter) for parameter in opened.model.parameters()}
    with warnings.catch_warnings():
        # peft 0.21 reads a name of transformers that 5.23 deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = PeftModel.from_pretrained(opened.model, str(adapter)).eval()
    if rounded_to is not None:
        for parameter in model.parameters():
            if id(parameter) not in of_base:
                parameter.data = parameter.data.to(rounded_to).to(parameter.dtype)
    return _run(model, probe_ids(folder, opened.model.config))


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: torch.dtype, *, matrices_only: bool = False) -> None:
    """Rounds the weights to a number format and back, in place. matrices_only: vectors stay, as in a GGUF file."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.dim() > 1 or not matrices_only):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def probe_ids(folder: Path, config: Any) -> Tensor:
    """The probe's tokens `[1, T]`, at most as many as the model has positions for."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = tokenizer(PROBE)["input_ids"][: getattr(config.get_text_config(), "max_position_embeddings", None)]
    if not ids:
        raise UserError(f"{folder}: its tokenizer makes no token of the probe text; wanted one that fits the model")
    return torch.tensor([ids])


def _run(model: Any, ids: Tensor) -> Tensor:
    output = model(input_ids=ids)
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found.reshape(-1, found.shape[-1]).float()
