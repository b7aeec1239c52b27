"""The objectives of supervised training as named sums and counts: task heads, next tokens, preference pairs, step
labels, and the auxiliary loss of mixture-of-experts routers. `update.py` divides.

Letters: N sequences or responses, C outputs, P pairs, M steps, k reward heads, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from loopos.config.diagnostics import UserError
from loopos.config.registry import loaded
from loopos.config.sections import ModelSection
from loopos.config.variants import LOSSES, TASK_LOSSES
from loopos.data.batches import Batch, ComparisonBatch, PackedRows, in_step
from loopos.data.stepwise_tokens import StepwiseBatch
from loopos.data.targets import Targets
from loopos.data.tokens import Encoded
from loopos.functional import losses
from loopos.functional.packing import PackedLayout
from loopos.functional.preference_loss import center_rewards_sum, preferred, step_loss
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
MeasuredT = TypeVar("MeasuredT")


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
class NamedLoss:
    """A loss of `LOSSES`, imported. `options`: those of its parameters that the objective has values for."""

    name: str
    function: Callable[..., Tensor]
    options: tuple[str, ...]
    returns_sum: bool

    @classmethod
    def of(cls, name: str, known: Sequence[str]) -> NamedLoss:
        """The loss of this name. known: the parameters that the objective has values for. Raises `UserError`."""
        row = LOSSES[name]
        function = loaded(row.function)
        options = tuple(each for each in known if each in inspect.signature(function).parameters)
        return cls(name, function, options, row.returns == "sum")

    def summed(self, found: Tensor, shape: tuple[int, ...], weights: Tensor | None = None) -> Tensor:
        """The sum of what the function returned. shape: one number for each row, unless it returns their sum. weights:
        of the rows. Raises `UserError` for another shape: a mean over one forward pass is not the mean over the step.
        """
        if self.returns_sum:
            return found
        if not isinstance(found, Tensor) or found.shape != shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f'loss "{self.name}": its function returned {got}; expected {list(shape)}, one number for each '
                "row, not their sum or mean"
            )
        return found.sum() if weights is None else (found * weights).sum()


@dataclass(frozen=True)
class TaskObjective:
    """A loss of `LOSSES` over the outputs of a head: that of the task, or the one that `loss_name` names; targets of
    regression are standardized. One name: "loss".

    A loss may have the parameters class_weights, label_smoothing and delta. Its count is that of the task's own loss:
    the weights of the rows' classes where it takes them, else the number of targets.
    """

    model: Callable[[Tensor, PackedLayout, Tensor | None], Tensor]
    task: str
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    regression_loss: str = "mse"
    huber_delta: float = 1.0
    loss_name: str | None = None

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
        """The loss summed over outputs `[N, C]`; targets `[N]`, or `[N, C]` for multi-label tasks. Raises `UserError`
        for a loss of the user's that does not return one number per row.
        """
        loss = self._loss
        options = {name: self._option(name, outputs) for name in loss.options}
        found = loss.function(outputs[:, 0] if self.task == "regression" else outputs, targets, **options)
        return loss.summed(found, (len(outputs),))

    def count_of(self, targets: Tensor) -> float:
        """The divisor of `sum_of`: the weights of the rows' classes, or the number of targets."""
        if self.class_weights is not None and "class_weights" in self._loss.options:
            return losses.class_weight_sum(targets, self.class_weights.to(targets.device))
        return float(targets.numel())

    @cached_property
    def _loss(self) -> NamedLoss:
        name = self.loss_name or TASK_LOSSES.get(self.task, self.regression_loss)
        return NamedLoss.of(name, ("class_weights", "label_smoothing", "delta"))

    def _option(self, name: str, outputs: Tensor) -> Tensor | float | None:
        if name == "class_weights":
            return self.class_weights.to(outputs.device) if self.class_weights is not None else None
        return self.label_smoothing if name == "label_smoothing" else self.huber_delta

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
    return TaskObjective(
        model,
        task,
        weights,
        section.label_smoothing,
        section.regression_loss,
        section.huber_delta,
        loss_name=section.loss,
    )


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


def means_of(
    objective: Objective[MeasuredT], batches: Iterable[tuple[MeasuredT, bool]], world: World
) -> dict[str, float]:
    """What an objective computes of batches, as means over all ranks; 0 where nothing counts. Batches marked False do
    not count.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for batch, counted in batches:
        found, number = objective.loss(batch), objective.counts(batch)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + (float(value) if counted else 0.0)
            counts[name] = counts.get(name, 0.0) + (number[name] if counted else 0.0)
    total, number = world.sum_floats(sums), world.sum_floats(counts)
    return {name: total[name] / number[name] if number[name] else 0.0 for name in total}


@dataclass(frozen=True)
class PairObjective:
    """A loss of pairs of `LOSSES`, averaged over all heads, plus `center_rewards` times the mean of (r_b + r_w)².

    Names: "loss", "center_rewards" if its coefficient is not 0, and "pair_accuracy" of the mean score, which is only
    reported. A loss may have the parameters probabilities and margins.
    """

    model: Callable[[Tensor, PackedLayout], Tensor]
    center_rewards: float = 0.0
    loss_name: str = "bradley_terry"

    @cached_property
    def _loss(self) -> NamedLoss:
        return NamedLoss.of(self.loss_name, ("probabilities", "margins"))

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
        known = {"probabilities": batch.probabilities[:, None], "margins": batch.margins[:, None]}
        found = self._loss.function(better, worse, **{name: known[name] for name in self._loss.options})
        sums = {
            "loss": self._loss.summed(found, tuple(better.shape), each),
            "pair_accuracy": (preferred(better.mean(-1), worse.mean(-1)) * batch.weights).sum().detach(),
        }
        if self.center_rewards:
            sums["center_rewards"] = center_rewards_sum(better, worse, weights=each)
        return sums

    def idle(self, batch: ComparisonBatch) -> Tensor:
        return self.model(batch.ids, batch.layout).sum() * 0.0


class StepScores(Protocol):
    """Scores of the tokens at `positions`, `[M, k]`."""

    def __call__(self, ids: Tensor, layout: PackedLayout, *, positions: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class StepObjective:
    """The mean of `step_loss` over the labeled steps, averaged over all heads.

    Names: "loss", and "step_accuracy" of the mean score, which is only reported: whether a step counts as right by its
    score and by its label; a score of 0 and a label of ½ are half right.
    """

    model: StepScores
    weights: Mapping[str, float] = field(default_factory=lambda: {"loss": 1.0})

    def counts(self, batch: StepwiseBatch) -> Mapping[str, float]:
        return dict.fromkeys(("loss", "step_accuracy"), float(batch.is_labeled.sum()))

    def loss(self, batch: StepwiseBatch) -> Mapping[str, Tensor]:
        judged = batch.is_labeled
        scores = self.model(batch.ids, batch.layout, positions=batch.ends[judged])  # [M, k]
        labels = batch.labels[judged]  # [M]
        loss = step_loss(scores, labels[:, None].expand_as(scores)).sum() / scores.shape[1]
        agrees = (torch.sign(scores.detach().mean(-1)) * torch.sign(labels - 0.5) + 1.0) / 2.0
        return {"loss": loss, "step_accuracy": agrees.sum()}

    def idle(self, batch: StepwiseBatch) -> Tensor:
        return self.model(batch.ids, batch.layout, positions=batch.ends).sum() * 0.0
