"""The objectives of supervised training as named sums and counts: task heads, next tokens, preference pairs, and the
auxiliary loss of mixture-of-experts routers. `update.py` divides.

Letters: N sequences or responses, C outputs, P pairs, k reward heads, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from loopos.config.diagnostics import UserError
from loopos.config.sections import ModelSection
from loopos.data.batches import Batch, ComparisonBatch, PackedRows, in_step
from loopos.data.targets import Targets
from loopos.data.tokens import Encoded
from loopos.functional import losses
from loopos.functional.packing import PackedLayout
from loopos.functional.preference_loss import bradley_terry_sum, center_rewards_sum, preferred
from loopos.training.distributed import World
from loopos.training.update import Objective


class Routing(Protocol):
    """How the routers distributed the tokens of a pass, as `models.backbone.Routing`."""

    @property
    def auxiliary_loss(self) -> Tensor: ...

    @property
    def load(self) -> Tensor: ...


class Recorder(Protocol):
    """Records the routing of a model's last pass."""

    def take(self, layout: PackedLayout) -> Routing: ...


class Routed(Protocol):
    """A model and the recorder of its routers; None without routers."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def routers(self) -> Recorder | None: ...


class Packed(Protocol):
    """A batch of packed rows."""

    @property
    def layout(self) -> PackedLayout: ...


BatchT = TypeVar("BatchT", bound=Packed)


@dataclass(frozen=True)
class RouterObjective(Generic[BatchT]):
    """loss + c·(E·Σ_e f_e·P_e), where f_e is the fraction of tokens sent to expert e and P_e its mean probability
    (Fedus et al. 2021, equations 4 to 6; over the k experts of a token and all layers, as in transformers).

    f and P are those of one forward pass; passes are weighted by their number of tokens.
    """

    objective: Objective[BatchT]
    recorder: Recorder
    coefficient: float

    @property
    def weights(self) -> Mapping[str, float]:
        extra = {"router_aux_loss": self.coefficient} if self.coefficient else {}
        return {**self.objective.weights, **extra}

    def counts(self, batch: BatchT) -> Mapping[str, float]:
        tokens = float(batch.layout.num_tokens)
        return {**self.objective.counts(batch), "router_aux_loss": tokens, "expert_load": tokens}

    def loss(self, batch: BatchT) -> Mapping[str, Tensor]:
        sums = self.objective.loss(batch)
        routing = self.recorder.take(batch.layout)
        tokens = batch.layout.num_tokens
        return {**sums, "router_aux_loss": routing.auxiliary_loss * tokens, "expert_load": routing.load * tokens}

    def idle(self, batch: BatchT) -> Tensor:
        return self.objective.idle(batch)


def with_router_loss(objective: Objective[BatchT], backbone: Routed, coefficient: float) -> Objective[BatchT]:
    """Adds the loss and load of the model's routers to an objective; returns the objective unchanged for a model
    without routers. Raises `UserError` if a router loss is configured for such a model.
    """
    if backbone.routers is not None:
        return RouterObjective(objective, backbone.routers, coefficient)
    if coefficient:
        raise UserError(
            f"training.router_aux_loss: got {coefficient:g}, but {type(backbone.model).__name__} has no routers of "
            "experts whose logits are known; set it to 0"
        )
    return objective


@dataclass(frozen=True)
class TaskObjective:
    """Cross-entropy, binary cross-entropy, or (on standardized targets) squared or Huber error. One name: "loss"."""

    model: Callable[[Tensor, PackedLayout, Tensor | None], Tensor]
    task: str
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    regression_loss: str = "mse"
    huber_delta: float = 1.0

    @property
    def weights(self) -> Mapping[str, float]:
        return {"loss": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, float]:
        assert batch.targets is not None
        return {"loss": self.count_of(batch.targets)}

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        assert batch.targets is not None
        return {"loss": self.sum_of(self.model(batch.ids, batch.layout, batch.token_types), batch.targets)}

    def idle(self, batch: Batch) -> Tensor:
        return self.model(batch.ids, batch.layout, batch.token_types).sum() * 0.0

    def sum_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over outputs `[N, C]`; targets `[N]`, or `[N, C]` for multi-label tasks."""
        if self.task == "classification":
            weights = self.class_weights.to(outputs.device) if self.class_weights is not None else None
            return losses.cross_entropy_sum(
                outputs, targets, class_weights=weights, label_smoothing=self.label_smoothing
            )
        if self.task == "multi_label":
            return losses.binary_cross_entropy_sum(outputs, targets)
        if self.regression_loss == "huber":
            return losses.huber_sum(outputs[:, 0], targets, delta=self.huber_delta)
        return losses.squared_error_sum(outputs[:, 0], targets)

    def count_of(self, targets: Tensor) -> float:
        """The divisor of `sum_of`: the weights of the rows' classes, or the number of targets."""
        if self.task == "classification" and self.class_weights is not None:
            return losses.class_weight_sum(targets, self.class_weights.to(targets.device))
        return float(targets.numel())

    def mean_of(self, outputs: Tensor, targets: Tensor) -> float:
        """The loss of existing outputs, as training would report it."""
        return float(self.sum_of(outputs, targets)) / self.count_of(targets)


def task_objective(
    model: Callable[[Tensor, PackedLayout, Tensor | None], Tensor],
    section: ModelSection,
    task: str,
    targets: Targets,
    num_outputs: int,
) -> TaskObjective:
    """The objective for a config's `model` section; "balanced" class weights are computed from the training rows."""
    weights = None
    if section.class_weights == "balanced":
        weights = balanced_weights(targets.train, num_outputs)
    elif section.class_weights is not None:
        weights = torch.tensor(section.class_weights)
    return TaskObjective(model, task, weights, section.label_smoothing, section.regression_loss, section.huber_delta)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weight N / (C·n_c) of each class c with n_c of N rows, so that all classes have equal weight (King and Zeng
    2001).

    labels `[N]` → `[C]`. A class without rows gets N / C, which is never used.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * counts.clamp_min(1))).float()


# Tokens of one forward pass of validation.
_TOKENS = 2048


class NextTokenLoss(Protocol):
    """Computes the weighted sum of next-token losses of a row, in nats."""

    def __call__(self, ids: Tensor, layout: PackedLayout, weights: Tensor | None = None) -> Tensor: ...


class NextToken:
    """The mean negative log-likelihood of the trained tokens, nats: Σ w·(−log p) / Σ w. One name: "loss"."""

    def __init__(self, model: NextTokenLoss) -> None:
        self.model = model
        self.weights: Mapping[str, float] = {"loss": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The sum of the weights; without weights, the number of tokens that have a predecessor."""
        if batch.weights is None:
            return {"loss": float(batch.num_tokens - len(batch.rows))}
        return {"loss": float(batch.weights.sum())}

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": self.model(batch.ids, batch.layout, batch.weights)}

    def idle(self, batch: Batch) -> Tensor:
        return self.model(batch.ids, batch.layout, batch.weights) * 0.0


@torch.no_grad()
def mean_loss(objective: NextToken, rows: Sequence[Encoded], *, device: torch.device, world: World) -> float:
    """Mean loss of rows (nats per trained token) over all ranks, in batches of rows of similar length."""
    sums = {"loss": 0.0, "count": 0.0}
    packed = PackedRows(rows, None, device)
    for batch, counts in in_step(packed, tokens=_TOKENS, rank=world.data_parallel[0], world=world.data_parallel[1]):
        loss = float(objective.loss(batch)["loss"])
        if counts:
            sums["loss"] += loss
            sums["count"] += objective.counts(batch)["loss"]
    total = world.sum_floats(sums)
    return total["loss"] / total["count"]


@dataclass(frozen=True)
class PairObjective:
    """Bradley–Terry loss averaged over all heads, plus `center_rewards` times the mean of (r_b + r_w)². Names: "loss",
    "center_rewards" if its coefficient is not 0, and "pair_accuracy" of the mean score, which is only reported.
    """

    model: Callable[[Tensor, PackedLayout], Tensor]
    center_rewards: float = 0.0

    @property
    def weights(self) -> Mapping[str, float]:
        return {"loss": 1.0, "center_rewards": self.center_rewards} if self.center_rewards else {"loss": 1.0}

    def counts(self, batch: ComparisonBatch) -> Mapping[str, float]:
        weight = float(batch.weights.sum())
        return dict.fromkeys((*self.weights, "pair_accuracy"), weight)

    def loss(self, batch: ComparisonBatch) -> Mapping[str, Tensor]:
        scores = self.model(batch.ids, batch.layout)  # [N, k]
        better, worse = scores[batch.better], scores[batch.worse]  # [P, k]
        each = batch.weights[:, None] / scores.shape[1]
        sums = {
            "loss": bradley_terry_sum(
                better, worse, probabilities=batch.probabilities[:, None], margins=batch.margins[:, None], weights=each
            ),
            "pair_accuracy": (preferred(better.mean(-1), worse.mean(-1)) * batch.weights).sum().detach(),
        }
        if self.center_rewards:
            sums["center_rewards"] = center_rewards_sum(better, worse, weights=each)
        return sums

    def idle(self, batch: ComparisonBatch) -> Tensor:
        return self.model(batch.ids, batch.layout).sum() * 0.0
