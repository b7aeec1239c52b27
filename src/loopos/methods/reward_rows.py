"""What a reward model learns from: comparisons of responses, or labels of steps. Apart from `reward_model`, whose run
is the same for both; each class here has what differs.

    Comparisons    score at the last token      −log σ(r_chosen − r_rejected)       pair metrics, normalized scores
    StepLabels     score at the end of a step   −y log σ(s) − (1 − y) log σ(−s)     step metrics, probabilities
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch

from loopos.config.reward_model import RewardModelConfig
from loopos.data.batches import ComparisonRows, Rows
from loopos.data.digest import comparisons_digest, stepwise_digest
from loopos.data.preference_tokens import PreferenceEncoder
from loopos.data.reading import DataReport
from loopos.data.stepwise_tokens import StepwiseRows, encode_stepwise
from loopos.data.supervised_tokens import RowPolicy
from loopos.evaluation.preference_metrics import PREFERENCE_METRIC_DIRECTION
from loopos.evaluation.preference_report import bucket_tables, measured, preferred_scores
from loopos.evaluation.process_rewards import Process, probabilities, step_scores
from loopos.evaluation.reward_predictor import comparison_scores
from loopos.evaluation.step_metrics import STEP_METRIC_DIRECTION, labeled, step_metrics
from loopos.methods.base import Direction
from loopos.models.attention import prompt_runs_once
from loopos.models.heads import PooledModel
from loopos.training.identity import Identity, of_preferences, of_step_labels
from loopos.training.objectives import PairObjective, StepObjective
from loopos.training.update import Objective

Scores = dict[int, list[list[float]]]
"""Index of each row → raw scores of its responses or steps, a list of k heads each."""


@dataclass
class RewardRows(ABC):
    """What a reward model learns from. `shares_prompts`: whether a prompt may be computed once for its responses."""

    config: RewardModelConfig
    encoder: PreferenceEncoder
    device: torch.device
    shares_prompts: bool = False
    metric: ClassVar[str]
    """Chooses the best checkpoint where the config names none."""
    directions: ClassVar[Mapping[str, Direction]]
    idle_keys: ClassVar[Mapping[str, object]] = {}
    """Keys of `reward` without effect → the values at which they ask for none."""

    @abstractmethod
    def encode(self, examples: Sequence[Any]) -> tuple[list[Any], DataReport]:
        """Examples as tokens. Raises `DataError`."""

    @abstractmethod
    def batches(self, rows: list[Any]) -> Rows[Any]:
        """Encoded rows as batches take them."""

    @abstractmethod
    def objective(self, model: PooledModel) -> Objective[Any]:
        """What is minimized."""

    @abstractmethod
    def identity(self, rows: list[Any], *, base: str) -> Identity:
        """What a resumed run must share."""

    @abstractmethod
    def digest(self, rows: list[Any]) -> str:
        """Of the validation rows."""

    @abstractmethod
    def scores(self, model: PooledModel, rows: list[Any], *, rank: int, world: int) -> Scores:
        """Raw scores of this rank's rows."""

    @abstractmethod
    def measured(self, rows: list[Any], scores: list[list[list[float]]]) -> tuple[dict[str, float], Any, Any]:
        """Metrics, and what the user's own metrics get: predictions and targets."""

    def tables(self, rows: list[Any], scores: list[list[list[float]]]) -> dict[str, Any] | None:
        """Tables for the report; None for none."""
        return None

    def description(self) -> dict[str, Any]:
        """What the model folder records in addition."""
        return {}

    def without_effect(self) -> list[str]:
        """Notes on keys that have no effect on these rows."""
        set_keys = self.config.reward.model_fields_set
        return [
            f"reward.{key} has no effect: the rows have step labels"
            for key, idle in self.idle_keys.items()
            if key in set_keys and getattr(self.config.reward, key) != idle
        ]


class Comparisons(RewardRows):
    """Comparisons of responses."""

    metric = "pair_accuracy"
    directions = PREFERENCE_METRIC_DIRECTION

    def encode(self, examples: Sequence[Any]) -> tuple[list[Any], DataReport]:
        return self.encoder.comparisons(examples)

    def batches(self, rows: list[Any]) -> ComparisonRows:
        reward = self.config.reward
        runs_once = prompt_runs_once((each.num_tokens for each in rows), on_cpu=self.device.type == "cpu")
        return ComparisonRows(
            rows,
            self.device,
            share_prompts=self.shares_prompts and runs_once,
            margins=reward.margins,
            soft_labels=reward.soft_labels,
        )

    def objective(self, model: PooledModel) -> PairObjective:
        return PairObjective(model, self.config.reward.center_rewards, self.config.reward.loss)

    def identity(self, rows: list[Any], *, base: str) -> Identity:
        return of_preferences(self.config, rows, self.encoder, base=base)

    def digest(self, rows: list[Any]) -> str:
        return comparisons_digest(rows)

    def scores(self, model: PooledModel, rows: list[Any], *, rank: int, world: int) -> Scores:
        return comparison_scores(model, self.batches(rows), rank=rank, world=world)

    def measured(self, rows: list[Any], scores: list[list[list[float]]]) -> tuple[dict[str, float], Any, Any]:
        return measured(rows, scores), *preferred_scores(rows, scores)

    def tables(self, rows: list[Any], scores: list[list[list[float]]]) -> dict[str, Any]:
        return bucket_tables(rows, scores)


class StepLabels(RewardRows):
    """Answers in steps, with labels: a process reward model."""

    metric = "step_accuracy"
    directions = STEP_METRIC_DIRECTION
    idle_keys: ClassVar[Mapping[str, object]] = {
        "center_rewards": 0.0, "loss": "bradley_terry", "margins": False, "normalize": False, "normalize_over": None,
    }  # fmt: skip

    @property
    def process(self) -> Process:
        """How steps are read and scored."""
        return Process.of(self.config.reward.process)

    def encode(self, examples: Sequence[Any]) -> tuple[list[Any], DataReport]:
        data = self.config.data
        return encode_stepwise(
            self.encoder.tokenizer,
            examples,
            separator=self.process.step_separator,
            template=self.encoder.template,
            max_length=self.encoder.max_length,
            policy=RowPolicy(data.over_length, data.max_dropped_share, data.on_bad_row),
        )

    def batches(self, rows: list[Any]) -> StepwiseRows:
        return StepwiseRows(rows, self.device, soft_labels=self.config.reward.soft_labels)

    def objective(self, model: PooledModel) -> StepObjective:
        return StepObjective(model)

    def identity(self, rows: list[Any], *, base: str) -> Identity:
        return of_step_labels(self.config, rows, self.encoder, base=base)

    def digest(self, rows: list[Any]) -> str:
        return stepwise_digest(rows)

    def scores(self, model: PooledModel, rows: list[Any], *, rank: int, world: int) -> Scores:
        return step_scores(model, self.batches(rows), rank=rank, world=world)

    def measured(self, rows: list[Any], scores: list[list[list[float]]]) -> tuple[dict[str, float], Any, Any]:
        means = [[sum(heads) / len(heads) for heads in each] for each in scores]
        labels = [row.labels for row in rows]
        found, targets = labeled(means, labels)
        return step_metrics(means, labels), numpy.array(probabilities(found.tolist())), targets

    def description(self) -> dict[str, Any]:
        return {"process": self.process.description()}
