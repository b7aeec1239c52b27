"""A model folder measured: size, speed, and what it can do.

Enters: the place of a model, and data. Leaves: `Measured`. The model is opened as anyone would open it, so that the
figures are those of the files. Left out: what was done to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loopos.config.faults import UserError
from loopos.config.pruning import PruningRecipe
from loopos.data.corpus import read_corpus
from loopos.data.plain_text import is_plain_text, read_plain_text
from loopos.deploy.opened import OpenedModel, open_model, probe
from loopos.deploy.speed import reading_rate, writing_rate
from loopos.evaluation.perplexity import text_loss
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.models.load import NUMBER_FORMATS, cast_parameters

# Of a row in the report; what else the metrics hold (a confusion table, names) is for `loopos evaluate`.
Metrics = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """`weight_bytes`: of the parameters in the format they are kept in. `reading`, `writing`: tokens a second; writing
    is None for models that write none. `metrics`: of the evaluation data; empty without any. `said`: what the model
    gives to a fixed row.
    """

    parameters: int
    weight_bytes: int
    precision: str
    reading: float
    writing: float | None
    metrics: Metrics = field(default_factory=dict)
    said: torch.Tensor = field(default_factory=lambda: torch.zeros(0), repr=False, compare=False)


def measure(place: str, recipe: PruningRecipe, *, device: str, note: Callable[[str], None]) -> Measured:
    """Opens a model and measures it on what the recipe's `evaluate` names. Raises `UserError` for data that does not
    fit the model.
    """
    opened = open_model(place)
    said = probe(opened.model)
    parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    if opened.pooled is not None:
        parameters += opened.pooled.head.weight.numel()
    size = NUMBER_FORMATS[opened.precision].itemsize
    cast_parameters(opened.model, NUMBER_FORMATS[_run_in(opened)])
    model = opened.model.to(torch.device(device)).eval()  # type: ignore[arg-type]
    reading = reading_rate(model)
    writing = writing_rate(model, opened.tokenizer) if opened.pooled is None else None
    metrics: Metrics = {}
    # Last: perplexity leaves the packed attention in the model.
    if recipe.evaluate is not None:
        note(f"measuring {place} on {recipe.evaluate}")
        if opened.pooled is None:
            metrics = _text_metrics(opened, recipe.evaluate, recipe)
        else:
            metrics = _task_metrics(place, opened.description, recipe.evaluate, device)
    return Measured(parameters, parameters * size, opened.precision, reading, writing, metrics, said)


def _run_in(opened: OpenedModel) -> str:
    """The format that every command of LoopOS runs the model in when nothing else is asked for."""
    return opened.precision if opened.description else "fp32"


def _text_metrics(opened: OpenedModel, source: str, recipe: PruningRecipe) -> Metrics:
    found = text_loss(opened.model, opened.tokenizer, text_of(source), window=recipe.window, stride=recipe.stride)
    return {name: float(value) for name, value in found.told().items() if name not in ("window", "stride")}


def text_of(source: str) -> str:
    """A file of running text, or the texts of a file of rows, parted by blank lines. Raises `DataError`."""
    if is_plain_text(source):
        return read_plain_text(source)
    return "\n\n".join(read_corpus(source, {}).documents)


def _task_metrics(place: str, description: Mapping[str, Any], source: str, device: str) -> Metrics:
    found: Mapping[str, Any]
    if "label_space" in description:
        found = Predictor.open(place, device=device).evaluate_file(source)
    elif "score_mean" in description:
        found = RewardPredictor.open(place, device=device).score_file(source, {}).metrics
    else:
        raise UserError(
            f"{place}: a model with a head of an unknown kind; wanted a classifier, regressor or reward model"
        )
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
