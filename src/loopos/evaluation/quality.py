"""Measures a model folder: size and quality.

The model is opened as any user would open it, so that the figures are those of the files. A model with a head has its
own metrics (accuracy, mae …), a reward model its agreement with people, a language model the perplexity of running
text, or for rows the loss of the learned tokens and the fraction of problems solved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from loopos.config.compression import Recipe
from loopos.config.diagnostics import UserError
from loopos.data import rows
from loopos.data.batches import PackedRows, in_order
from loopos.data.corpus import read_corpus
from loopos.data.demonstrations import Demonstration
from loopos.data.rows import is_plain_text, read_plain_text
from loopos.data.supervised_rows import Example, read_supervised
from loopos.data.supervised_tokens import RowPolicy, encode_supervised
from loopos.evaluation.answer_check import judge_all, problem_metrics
from loopos.evaluation.checkers import checker
from loopos.evaluation.perplexity import text_loss
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.reasoning import Reasoner
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.models.folders import OpenedModel
from loopos.models.language_ensemble import next_token_loss
from loopos.models.load import NUMBER_FORMATS
from loopos.models.quantized import num_weights
from loopos.models.resolve import ModelRef, resolve_trained

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mae", "rmse", "log_loss", "ece"})
# The metric that represents a model by default: the first of these that it has.
_USUAL = ("accuracy", "pair_accuracy", "step_accuracy", "subset_accuracy", "mae", "loss")
DROPPED = "dropped_rows"
# Tokens of one forward pass.
_TOKENS = 2048


@dataclass(frozen=True)
class Measured:
    """`weight_bytes`: of the parameters as stored. `metrics`: of the evaluation data; empty without any."""

    parameters: int
    weight_bytes: int
    precision: str
    metrics: dict[str, float]


def sizes_of(opened: OpenedModel, precision: str) -> tuple[int, int]:
    """Number of parameters, and their bytes as stored: codes as codes, everything else in the format `precision`."""
    head = 0 if opened.pooled is None else opened.pooled.head.weight.numel()
    parameters = list(opened.model.parameters())
    codes = sum(each.numel() for each in parameters if not each.is_floating_point())
    others = sum(each.numel() for each in parameters if each.is_floating_point()) + head
    return num_weights(opened.model) + head, codes + others * NUMBER_FORMATS[precision].itemsize


def metrics_of(
    opened: OpenedModel, source: str | ModelRef, recipe: Recipe, *, precision: str | None
) -> dict[str, float]:
    """The model's metrics on the data that the recipe names: labeled rows, comparisons, or running text for a language
    model; empty without data. precision: of a model with a head, which is opened again; None for its own. Raises
    `UserError` for data that does not fit the model.
    """
    if recipe.evaluate is None:
        return {}
    found: Mapping[str, Any]
    if opened.pooled is None:
        found = _text_metrics(opened, recipe.evaluate, recipe)
    else:
        found = _task_metrics(source, recipe.evaluate, opened.model.device.type, precision)
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def row_metrics(source: str | ModelRef, data: str, *, device: str = "cpu") -> dict[str, float]:
    """The metrics of a model on rows: labeled, comparisons, or training rows of a language model. For the last, rows
    that the loss skips are counted as `dropped_rows` (see `dropped_summary`). Raises `UserError` and `DataError`.
    """
    ref = resolve_trained(source)
    if ref.kind == "language":
        return _language_metrics(Reasoner.open(ref, device=device), data)
    found = _task_metrics(ref, data, device)
    return {name: value for name, value in found.items() if isinstance(value, float)}


def dropped_summary(data: str, measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each model, by name, whose loss skips rows of the data."""
    return [
        f"{data}: {values[DROPPED]:,.0f} rows exceed the positions of {name} or have nothing to learn; its loss and "
        "perplexity skip them"
        for name, values in measured.items()
        if DROPPED in values
    ]


def usual_metric(metrics: Mapping[str, float]) -> str:
    """The metric by which models are compared by default."""
    return next((name for name in _USUAL if name in metrics), next(iter(metrics)))


@torch.no_grad()
def probe(model: PreTrainedModel) -> torch.Tensor:
    """The model's output for a fixed row of tokens, `[L, V]` or `[L, d]` in fp32, to check that it reopens
    unchanged.
    """
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, 9), generator=draw).to(model.device)
    was_training = model.training
    model.train(False)
    output = model(input_ids=ids)
    model.train(was_training)
    found: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found[0].float().cpu()


def text_of(source: str) -> str:
    """Running text from a file, or the texts of rows, separated by blank lines. Raises `DataError`."""
    if is_plain_text(source):
        return read_plain_text(source)
    return "\n\n".join(read_corpus(source, {}).documents)


def _text_metrics(opened: OpenedModel, source: str, recipe: Recipe) -> dict[str, float]:
    found = text_loss(opened.model, opened.tokenizer, text_of(source), window=recipe.window, stride=recipe.stride)
    return {name: value for name, value in found.to_dict().items() if name not in ("window", "stride")}


def _task_metrics(model: str | ModelRef, source: str, device: str, precision: str | None = None) -> Mapping[str, Any]:
    """All metrics of a model with a head, names and tables included."""
    ref = resolve_trained(model)
    if ref.kind == "reward":
        return RewardPredictor.open(ref, device=device).score_file(source, {}).metrics
    return Predictor.open(ref, device=device, precision=precision).evaluate_file(source)


@torch.no_grad()
def _language_metrics(reasoner: Reasoner, data: str) -> dict[str, float]:
    examples, _ = read_supervised(rows.read(data), {}, step_format=reasoner.step_format)
    metrics: dict[str, float] = {}
    problems = [each for each in examples if isinstance(each, Demonstration)]
    if problems:
        answered = reasoner.answer(problems)
        verdicts = judge_all(answered, problems, step_format=reasoner.step_format, checker=checker("auto"))
        metrics["accuracy"] = problem_metrics(answered, verdicts, voted=True)["accuracy"]
    if reasoner.voters:
        return metrics
    loss, dropped = _loss(reasoner, examples, data)
    metrics |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return metrics | ({DROPPED: float(dropped)} if dropped else {})


def _loss(reasoner: Reasoner, examples: Sequence[Example], data: str) -> tuple[float, int]:
    """Mean negative log-likelihood of the learned tokens, nats, and the number of rows skipped: those that exceed the
    model's positions, and those without a token to learn.
    """
    encoded, report = encode_supervised(
        reasoner.tokenizer,
        examples,
        step_format=reasoner.step_format,
        max_length=reasoner.engine.max_positions,
        policy=RowPolicy(max_dropped_share=1.0),
        template=reasoner.template,
    )
    if not encoded:
        raise UserError(f"{data}: no row fits the model's {reasoner.engine.max_positions} positions")
    model = next_token_loss(reasoner.model)
    total, count = 0.0, 0.0
    for batch in in_order(PackedRows([row.encoded() for row in encoded], None, reasoner.model.device), tokens=_TOKENS):
        assert batch.weights is not None, "supervised rows come with the weights of their tokens"
        total += float(model(batch.ids, batch.layout, batch.weights))
        count += float(batch.weights.sum())
    return total / count, report.read - report.used
