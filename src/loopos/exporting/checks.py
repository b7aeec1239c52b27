"""Checks of an export: opens it again on probe texts and compares its outputs with the model's, in fp32 on CPU.

An exact export that differs is refused; a lossy one that differs too much gets a warning. Language models:
`language_check.py`.
Letters: T tokens, V vocabulary, d features, C or O outputs, N texts.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging as transformers_logging

from loopos.config.diagnostics import UserError
from loopos.data.formats import Labeled
from loopos.data.rows import Row
from loopos.data.tokens import encode_labeled
from loopos.evaluation.outputs import interpret, outputs_of
from loopos.evaluation.reward_predictor import Normalization
from loopos.exporting import onnx as onnx_file
from loopos.models.description import read_description
from loopos.models.folders import open_task_model
from loopos.models.load import load_pretrained
from loopos.models.modeling_loopos import LoopOSForSequenceClassification
from loopos.models.resolve import Architecture
from loopos.models.task_layout import layout_in

LEAST_SAME: Mapping[str, float] = {"q8_0": 0.9, "q4_0": 0.8}
"""Lossy number format → minimum fraction of positions where the export's top prediction equals the model's."""
UNLIKE_EXIT_CODE = 6
"""For a lossy export below that fraction, which is written nevertheless."""
# Two runs of the same computation in fp32 differ by less than a tenth of this fraction of the largest output.
_ROUNDING = 1e-4


class ExportDiffers(UserError):
    """An export in an exact number format whose outputs differ from the model's."""

    exit_code: int = 1


@dataclass(frozen=True)
class Check:
    """largest: the largest difference of the outputs (logits, or hidden states of an encoder). scale: the largest
    output of the original. same: the fraction of positions with the same top prediction.

    beyond: the largest difference from the original with its weights rounded to the export's number format, which
    rounding does not explain; None if not computed. texts: results for greedy text, one per program. diagnostics:
    differences that no rounding explains.
    """

    largest: float
    scale: float
    same: float
    beyond: float | None = None
    texts: tuple[str, ...] = ()
    diagnostics: tuple[str, ...] = ()

    def summary(self) -> str:
        outputs = (
            f"outputs differ by at most {self.largest:.3g} (largest output {self.scale:.3g}); same top prediction at "
            f"{self.same:.1%} of positions"
        )
        return "; ".join([outputs, *self.texts])


def compared(
    original: Tensor | Sequence[Tensor],
    again: Tensor | Sequence[Tensor],
    rounded: Tensor | Sequence[Tensor] | None = None,
    *,
    tolerance: float = _ROUNDING,
) -> Check:
    """Compares outputs `[..., C]` of the original, of the export, and of the original with rounded weights; or several
    of each, in the same order. tolerance: the fraction of the largest output that arithmetic explains.
    """
    first, second = _several(original), _several(again)
    third = first if rounded is original else [] if rounded is None else _several(rounded)
    scale = max(float(each.abs().max()) for each in first)
    likeliest = [
        (one.argmax(-1) == other.argmax(-1)).double().flatten() for one, other in zip(first, second, strict=True)
    ]
    same = sum(float(each.sum()) for each in likeliest) / sum(len(each) for each in likeliest)
    largest = _largest(first, second)
    beyond = _largest(third, second) if third else None
    diagnostics = []
    if beyond is not None and not beyond <= tolerance * scale:
        diagnostics.append(
            f"outputs differ by up to {beyond:.3g}; expected at most {tolerance * scale:.2g}, because the "
            "weights were rounded in the same way"
        )
    return Check(largest, scale, same, beyond, diagnostics=tuple(diagnostics))


def _several(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _largest(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


def judge(check: Check, type_name: str, model: str) -> str:
    """The warning about an export, or "". type_name: its number format. Raises `ExportDiffers` for an exact format
    whose outputs or texts differ by more than rounding explains.
    """
    least = LEAST_SAME.get(type_name)
    if least is None:
        if check.diagnostics:
            raise ExportDiffers(
                f"{model}: the export differs from the original model:\n"
                + "".join(f"  {diagnostic}\n" for diagnostic in check.diagnostics)
                + "nothing was written"
            )
        return ""
    if check.same < least:
        return (
            f"{type_name} changes the model's predictions: the top prediction is the same at {check.same:.1%} of "
            f"positions, expected at least {least:.0%}; use a wider --type: q8_0, f16 or bf16"
        )
    return ""


PROBE = (
    "The parcel came late and the box was open. Please answer within the hour: where is the invoice for March, and why "
    "was my card charged twice?"
)


@torch.no_grad()
def outputs_at(folder: Path, kind: Architecture, rounded_to: torch.dtype | None = None) -> Tensor:
    """Outputs of a model folder for the probe: hidden states `[T, d]`, or `[1, C]` of a head. rounded_to: a number
    format to which the weights, except a head's, are rounded first.
    """
    if kind in ("head", "reward"):
        model, tokenizer, description = open_task_model(folder)
        row = Labeled(PROBE, None, None, Row({}, "probe", None, 0))
        if rounded_to is not None:
            round_weights(model.backbone.model, rounded_to)
        encoded, _ = encode_labeled(tokenizer, [row], max_length=description["max_length"])
        return outputs_of(model, encoded, torch.device("cpu"))
    opener: Any = AutoModelForSequenceClassification if kind == "classifier" else AutoModel
    opened = opener.from_pretrained(str(folder), dtype=torch.float32).eval()
    if rounded_to is not None:
        round_weights(opened, rounded_to)
    return _run(opened, probe_ids(folder, opened.config))


@torch.no_grad()
def adapter_outputs(adapter: Path, base: str, folder: Path, rounded_to: torch.dtype | None = None) -> Tensor:
    """Logits `[T, V]`, or hidden states `[T, d]`, of a PEFT adapter over its base. folder: the model's, for the
    tokenizer. rounded_to: a number format to which the adapter's weights are rounded first.
    """
    from peft import PeftConfig, PeftModel

    causal = PeftConfig.from_pretrained(str(adapter)).task_type in (None, "CAUSAL_LM")
    opened = load_pretrained(base, causal=causal)
    of_base = {id(parameter) for parameter in opened.model.parameters()}
    with warnings.catch_warnings():
        # peft 0.21 uses a name that transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = PeftModel.from_pretrained(opened.model, str(adapter)).eval()
    if rounded_to is not None:
        for parameter in model.parameters():
            if id(parameter) not in of_base:
                parameter.data = parameter.data.to(rounded_to).to(parameter.dtype)
    return _run(model, probe_ids(folder, opened.model.config))


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: torch.dtype, *, matrices_only: bool = False) -> None:
    """Rounds the weights to a number format and back, in place. matrices_only: not vectors, as in a GGUF file."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.dim() > 1 or not matrices_only):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def probe_ids(folder: Path, config: Any) -> Tensor:
    """The probe's tokens `[1, T]`, limited to the model's positions."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = tokenizer(PROBE)["input_ids"][: getattr(config.get_text_config(), "max_position_embeddings", None)]
    if not ids:
        raise UserError(
            f"{folder}: its tokenizer makes no token of the probe text; use the tokenizer that fits the model"
        )
    return torch.tensor([ids])


def _run(model: Any, ids: Tensor) -> Tensor:
    output = model(input_ids=ids)
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found.reshape(-1, found.shape[-1]).float()


PROBES = (PROBE, "Thank you.", f"{PROBE} {PROBE} {PROBE}", "It broke after two days!")
# Fractions of the largest value and of the targets' spread for values; two programs computing the same in fp32.


@dataclass(frozen=True)
class TaskCheck(Check):
    """largest: the largest difference of the answers. scale: the largest answer. unit: what the answers are. program:
    the program that opened the export.
    """

    unit: str = ""
    program: str = ""

    def summary(self) -> str:
        reach = f" (largest value {self.scale:.3g})" if self.unit != "probabilities" else ""
        likeliest = f", same top class for {self.same:.0%} of texts" if self.unit == "probabilities" else ""
        return f"{self.unit} differ by at most {self.largest:.3g}{reach}{likeliest}; opened by {self.program}"


def checked(folder: Path, out: Path, output_format: str, *, exact: bool) -> TaskCheck:
    """Compares the export `out`, of --format huggingface or onnx, with the model in `folder`. exact: whether it keeps
    all numbers. A diagnostic: the export's program answers differently from LoopOS on the same weights, or an exact
    export differs from the model.
    """
    description = read_description(folder)
    original, program, diagnostics = answers_at(folder), "LoopOS", list[str]()
    if output_format == "onnx":
        program, found = "onnxruntime", _onnx_answers(out, folder)
    else:
        found = answers_at(out)
        # Quantized codes would need torchao, and a bare folder opens only in LoopOS.
        if _opens_in_transformers(out):
            program, own = "transformers' pipeline", found
            found = transformers_answers(out)
            diagnostics += _diagnostic(program, found, own, description)
    if exact and not diagnostics:
        diagnostics += _diagnostic(program, found, original, description)
    units = {"classification": "probabilities", "multi_label": "probabilities", "regression": "values"}
    same = (found.argmax(-1) == original.argmax(-1)).double().mean()
    return TaskCheck(
        largest=float((found - original).abs().max()),
        scale=float(original.abs().max()),
        same=float(same),
        diagnostics=tuple(diagnostics),
        unit=units.get(description["task"], "scores"),
        program=program,
    )


def _diagnostic(program: str, found: Tensor, expected: Tensor, description: dict[str, Any]) -> list[str]:
    """A difference that no rounding explains; empty if there is none."""
    scale = 1.0
    if description["task"] == "regression":
        scale = max(float(expected.abs().max()), float(description["target_std"]))
    largest = float((found - expected).abs().max())
    if largest <= _ROUNDING * scale:
        return []
    return [f"opened by {program}, its answers differ by up to {largest:.3g}; expected at most {_ROUNDING * scale:.1g}"]


def answers_at(folder: Path) -> Tensor:
    """LoopOS's own answers to the probe texts `[N, O]`, in fp32."""
    model, tokenizer, description = open_task_model(folder)
    rows = [Labeled(text, None, None, Row({}, "probe", None, index)) for index, text in enumerate(PROBES)]
    encoded, _ = encode_labeled(tokenizer, rows, max_length=description["max_length"])
    return meaning(outputs_of(model, encoded, torch.device("cpu")), description)


def meaning(outputs: Tensor, description: dict[str, Any]) -> Tensor:
    """Outputs of a head `[N, C]` → probabilities, values or normalized scores `[N, O]`."""
    if description["task"] == "reward":
        return Normalization.read(description)(outputs).double()[:, None]
    scaling = {f"target_{name}": description[f"target_{name}"] for name in ("mean", "std")}
    return torch.from_numpy(interpret(description["task"], outputs, **scaling)).reshape(len(outputs), -1)


def _opens_in_transformers(folder: Path) -> bool:
    return layout_in(folder) != "bare" and not _holds_codes(folder)


def _holds_codes(folder: Path) -> bool:
    return '"quantization_config"' in (folder / "config.json").read_text(encoding="utf-8")


def transformers_answers(folder: Path) -> Tensor:
    """Answers of `pipeline("text-classification")` to the probe texts in one padded batch `[N, O]`."""
    own = layout_in(folder) == "own"
    opener: Any = LoopOSForSequenceClassification if own else AutoModelForSequenceClassification
    longest = read_description(folder)["max_length"]
    limits: dict[str, Any] = {} if longest is None else {"truncation": True, "max_length": longest}
    with _quiet():
        model = opener.from_pretrained(str(folder), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), config=model.config)
        run: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        answers = run(list(PROBES), top_k=None, batch_size=len(PROBES), **limits)
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    by_label = [{each["label"]: each["score"] for each in answer} for answer in answers]
    return torch.tensor([[scores[label] for label in labels] for scores in by_label], dtype=torch.float64)


def _onnx_answers(out: Path, folder: Path) -> Tensor:
    """Answers of onnxruntime to the probe texts, padded on the right `[N, O]`."""
    description = read_description(folder)
    longest = description["max_length"]
    limits: dict[str, Any] = {} if longest is None else {"truncation": True, "max_length": longest}
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    batch = tokenizer(list(PROBES), padding=True, return_tensors="pt", **limits)
    logits = onnx_file.onnx_logits(out / onnx_file.FILE, dict(batch))
    task = description["task"]
    if task in ("regression", "reward"):
        return logits.double()
    return torch.from_numpy(interpret(task, logits))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' message about a class that is not its own."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
