"""What was exported, opened again and held against what it was made from, on a probe text.

Enters: two places of one model. Leaves: the largest difference of their outputs. Both run in fp32 on CPU, one after the
other. Left out: quality on data (`loopos evaluate`).
Letters: T tokens, V vocabulary, C outputs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loopos.config.faults import UserError
from loopos.data.formats import Labelled
from loopos.data.rows import Row
from loopos.data.tokens import encode_labelled
from loopos.evaluation.outputs import outputs_of
from loopos.models.found_model import FoundKind
from loopos.models.load import load_pretrained
from loopos.models.quantized_folder import holds_codes
from loopos.models.task_folder import open_task_model

PROBE = (
    "The parcel came late and the box was open. Please answer within the hour: where is the invoice for March, and why "
    "was my card charged twice?"
)
# What transformers takes for granted of a Qwen3, since its GGUF reader does not look the size of a head up.
_ASSUMED_HEAD = 128


@dataclass(frozen=True)
class Check:
    """largest: the largest difference of the outputs (logits, or hidden states of an encoder). scale: the largest
    output of the original. same: the share of places where the likeliest token or class is the same.
    """

    largest: float
    scale: float
    same: float

    def said(self) -> str:
        return (
            f"outputs differ by at most {self.largest:.3g} (largest output {self.scale:.3g}); same top prediction at "
            f"{self.same:.1%} of positions"
        )


def compared(original: Tensor, again: Tensor) -> Check:
    """Outputs `[..., C]` of both."""
    same = (original.argmax(-1) == again.argmax(-1)).double().mean()
    return Check(float((original - again).abs().max()), float(original.abs().max()), float(same))


@torch.no_grad()
def outputs_at(folder: Path, kind: FoundKind) -> Tensor:
    """Outputs of a model folder for the probe: logits `[T, V]`, hidden states `[T, d]`, or `[1, C]` of a head."""
    if kind in ("head", "reward"):
        model, tokenizer, description = open_task_model(folder)
        row = Labelled(PROBE, None, None, Row({}, "probe", None, 0))
        encoded, _ = encode_labelled(tokenizer, [row], max_length=description["max_length"])
        return outputs_of(model, encoded, torch.device("cpu"))
    config = AutoConfig.from_pretrained(str(folder))
    if holds_codes(config):
        # transformers opens codes where torchao is installed alone.
        return _run(load_pretrained(str(folder), causal=True, quantized=True).model, probe_ids(folder, config))
    openers: dict[FoundKind, Any] = {"language": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
    opened = openers.get(kind, AutoModel).from_pretrained(str(folder), dtype=torch.float32).eval()
    return _run(opened, probe_ids(folder, opened.config))


@torch.no_grad()
def gguf_outputs(file: Path, folder: Path) -> Tensor:
    """Logits `[T, V]` of a GGUF file, by transformers' own reader. folder: the model's, for the probe's tokens."""
    config = AutoConfig.from_pretrained(str(folder))
    unusual = config.model_type == "qwen3" and config.head_dim != _ASSUMED_HEAD
    said = {"config": config} if unusual else {}
    opened = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **said)
    opened.eval()  # type: ignore[no-untyped-call]
    return _run(opened, probe_ids(folder, config))


@torch.no_grad()
def adapter_outputs(adapter: Path, base: str, folder: Path) -> Tensor:
    """Logits `[T, V]`, or hidden states `[T, d]`, of an adapter that peft puts over its base. folder: the model's."""
    from peft import PeftConfig, PeftModel

    causal = PeftConfig.from_pretrained(str(adapter)).task_type == "CAUSAL_LM"
    opened = load_pretrained(base, causal=causal)
    with warnings.catch_warnings():
        # peft 0.21 reads a name of transformers that 5.23 deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = PeftModel.from_pretrained(opened.model, str(adapter)).eval()
    return _run(model, probe_ids(folder, opened.model.config))


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
