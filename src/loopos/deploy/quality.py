"""How good a model is on rows: what a report tells before and after its weights were changed.

Enters: a model's place and a data file. Leaves: metrics by name. A model with a head gives its own (accuracy, mae …), a
reward model its agreement with people, a language model the loss of what training would learn and, of problems with
answers, how many it solves. Left out: options, records and printing (`cli.evaluate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from loopos.config.faults import UserError
from loopos.config.paths import MODEL_DESCRIPTION
from loopos.config.preferences import REWARD_TASK
from loopos.data import rows
from loopos.data.batches import PackedRows, in_order
from loopos.data.demonstrations import Demonstration
from loopos.data.supervised_rows import Example, read_supervised
from loopos.data.supervised_tokens import encode_supervised
from loopos.evaluation.checkers import checker
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.problem_metrics import judge_all, problem_metrics
from loopos.evaluation.reasoning import Reasoner
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.models.language_model import LanguageModel
from loopos.models.model_folder import model_folder, read_description

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mae", "rmse", "log_loss", "ece"})
# The metric that speaks for a model where none is named: the first of these that it has.
_USUAL = ("accuracy", "pair_accuracy", "subset_accuracy", "mae", "loss")
# Tokens of one forward pass.
_TOKENS = 2048


def measure(place: str, data: str, *, device: str = "cpu") -> dict[str, float]:
    """The metrics of the model at `place` on the rows of `data`. Raises `UserError` and `DataError`."""
    description: Mapping[str, object] = {}
    if any((Path(place) / name).is_file() for name in (MODEL_DESCRIPTION, f"model/{MODEL_DESCRIPTION}")):
        description = read_description(model_folder(place))
    if description.get("task") == REWARD_TASK:
        return dict(RewardPredictor.open(place, device=device).score_file(data, {}).metrics)
    if "pooling" in description:
        found = Predictor.open(place, device=device).evaluate_file(data, {})
        return {name: value for name, value in found.items() if isinstance(value, float)}
    return _language(Reasoner.open(place, device=device), data)


def usual_metric(metrics: Mapping[str, float]) -> str:
    """The metric by which models are chosen where none is named."""
    return next((name for name in _USUAL if name in metrics), next(iter(metrics)))


@torch.no_grad()
def _language(reasoner: Reasoner, data: str) -> dict[str, float]:
    examples, _ = read_supervised(rows.read(data), {}, step_format=reasoner.step_format)
    metrics: dict[str, float] = {}
    problems = [each for each in examples if isinstance(each, Demonstration)]
    if problems:
        answered = reasoner.answer(problems)
        verdicts = judge_all(answered, problems, step_format=reasoner.step_format, checker=checker("auto"))
        metrics["accuracy"] = problem_metrics(answered, verdicts, voted=True)["accuracy"]
    loss = _loss(reasoner, examples, data)
    return metrics | {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _loss(reasoner: Reasoner, examples: Sequence[Example], data: str) -> float:
    """Mean negative log-likelihood of the learned tokens, nats; rows over the model's positions are left out."""
    encoded, _ = encode_supervised(
        reasoner.tokenizer,
        examples,
        step_format=reasoner.step_format,
        max_length=reasoner.engine.max_positions,
        over_length="drop",
        max_dropped_share=1.0,
        template=reasoner.template,
    )
    if not encoded:
        raise UserError(f"{data}: no row that fits the model's {reasoner.engine.max_positions} positions")
    model = LanguageModel(reasoner.model).eval()
    total, count = 0.0, 0.0
    for batch in in_order(PackedRows([row.encoded() for row in encoded], None, reasoner.model.device), tokens=_TOKENS):
        assert batch.weights is not None, "supervised rows come with the weights of their tokens"
        total += float(model(batch.ids, batch.layout, batch.weights))
        count += float(batch.weights.sum())
    return total / count
