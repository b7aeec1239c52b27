"""An exported model with a head, opened again by the program that it is for, and held against LoopOS's own answers.

Enters: the folder that was exported and the export. Leaves: the largest difference of probabilities, values or scores
on probe texts of unlike lengths, in padded batches and in fp32. Left out: other kinds of model (`reopened.py`).
Letters: N texts, O outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging as transformers_logging

from loopos.data.formats import Labelled
from loopos.data.rows import Row
from loopos.data.tokens import encode_labelled
from loopos.deploy.exporting import onnx_file
from loopos.deploy.exporting.reopened import PROBE
from loopos.deploy.exporting.verdict import Check
from loopos.evaluation.outputs import interpret, outputs_of
from loopos.evaluation.reward_scores import Normalisation
from loopos.models.model_folder import read_description
from loopos.models.modeling_loopos import LoopOSForSequenceClassification
from loopos.models.task_folder import open_task_model
from loopos.models.task_layout import layout_in

PROBES = (PROBE, "Thank you.", f"{PROBE} {PROBE} {PROBE}", "It broke after two days!")
# Of two programs that compute the same in fp32; of values, as a share of the largest one and of the targets' spread.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class TaskCheck(Check):
    """largest: the largest difference of the answers. scale: the largest answer. unit: what they are. program: what
    opened the export.
    """

    unit: str = ""
    program: str = ""

    def said(self) -> str:
        reach = f" (they reach {self.scale:.3g})" if self.unit != "probabilities" else ""
        likeliest = f", the same likeliest class of {self.same:.0%} of texts" if self.unit == "probabilities" else ""
        return f"largest difference of the {self.unit} {self.largest:.3g}{reach}{likeliest}; opened by {self.program}"


def checked(folder: Path, out: Path, output_format: str, *, exact: bool) -> TaskCheck:
    """Compares the export `out`, of --format huggingface or onnx, with the model in `folder`. exact: whether it keeps
    every number. A fault: the program that the export is for answers otherwise than LoopOS does on the same weights, or
    an exact export otherwise than the model.
    """
    description = read_description(folder)
    original, program, faults = answers_at(folder), "LoopOS", list[str]()
    if output_format == "onnx":
        program, found = "onnxruntime", _onnx_answers(out, folder)
    else:
        found = answers_at(out)
        # Codes need torchao there, and a bare folder opens by LoopOS only.
        if _opens_in_transformers(out):
            program, own = "transformers' pipeline", found
            found = transformers_answers(out)
            faults += _fault(program, found, own, description)
    if exact and not faults:
        faults += _fault(program, found, original, description)
    units = {"classification": "probabilities", "multi_label": "probabilities", "regression": "values"}
    same = (found.argmax(-1) == original.argmax(-1)).double().mean()
    return TaskCheck(
        largest=float((found - original).abs().max()),
        scale=float(original.abs().max()),
        same=float(same),
        faults=tuple(faults),
        unit=units.get(description["task"], "scores"),
        program=program,
    )


def _fault(program: str, found: Tensor, expected: Tensor, description: dict[str, Any]) -> list[str]:
    """What no rounding explains; empty where there is nothing."""
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
    rows = [Labelled(text, None, None, Row({}, "probe", None, place)) for place, text in enumerate(PROBES)]
    encoded, _ = encode_labelled(tokenizer, rows, max_length=description["max_length"])
    return meaning(outputs_of(model, encoded, torch.device("cpu")), description)


def meaning(outputs: Tensor, description: dict[str, Any]) -> Tensor:
    """Outputs of a head `[N, C]` → probabilities, values or normalised scores `[N, O]`."""
    if description["task"] == "reward":
        return Normalisation.read(description)(outputs).double()[:, None]
    scaling = {f"target_{name}": description[f"target_{name}"] for name in ("mean", "std")}
    return torch.from_numpy(interpret(description["task"], outputs, **scaling)).reshape(len(outputs), -1)


def _opens_in_transformers(folder: Path) -> bool:
    return layout_in(folder) != "bare" and not _holds_codes(folder)


def _holds_codes(folder: Path) -> bool:
    return '"quantization_config"' in (folder / "config.json").read_text(encoding="utf-8")


def transformers_answers(folder: Path) -> Tensor:
    """What `pipeline("text-classification")` says of the probe texts in one padded batch `[N, O]`."""
    own = layout_in(folder) == "own"
    opener: Any = LoopOSForSequenceClassification if own else AutoModelForSequenceClassification
    longest = read_description(folder)["max_length"]
    limits: dict[str, Any] = {} if longest is None else {"truncation": True, "max_length": longest}
    with _quiet():
        model = opener.from_pretrained(str(folder), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), config=model.config)
        run: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        answers = run(list(PROBES), top_k=None, batch_size=len(PROBES), **limits)
    labels = [model.config.id2label[place] for place in range(model.config.num_labels)]
    by_label = [{each["label"]: each["score"] for each in answer} for answer in answers]
    return torch.tensor([[scores[label] for label in labels] for scores in by_label], dtype=torch.float64)


def _onnx_answers(out: Path, folder: Path) -> Tensor:
    """What onnxruntime says of the probe texts, padded on either side `[N, O]`."""
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
    """transformers' words about a class that is none of its own are for other users of it."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
