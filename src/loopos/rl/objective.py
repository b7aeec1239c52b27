"""The objective of proximal policy optimization: clipped policy loss, clipped value loss, entropy, KL.

Enters: batches of experience, an actor and critic. Leaves: sums and counts by name. Left out: advantages, the models.
Letters: M tokens of responses.

What a run of PPO carries from step to step besides weights and optimizer.

Enters: its moving parts. Leaves: tensors and JSON for a checkpoint, and the parts put back to where one left them. Left
out: the files (`checkpoint.py`), weights and optimizer (`run_state.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from loopos.config.rl import PpoTrainingSection
from loopos.functional.advantages import KlController, KlEstimator, kl_terms
from loopos.functional.packing import PackedLayout
from loopos.functional.policy_loss import clipped_policy_terms, clipped_value_terms
from loopos.rl.experience import ResponseBatch, ReusedForward
from loopos.rl.monitors import Monitor
from loopos.rl.rollouts import RolloutBatches
from loopos.training.distributed import World

_REPORTED = ("entropy", "clip_share", "value_clip_share", "approximate_kl", "ratio")


class ActorCritic(Protocol):
    """What gives log-probabilities, entropies (nats) and values, each `[M]`, with their gradient."""

    def __call__(
        self, ids: Tensor, layout: PackedLayout, places: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass
class Extremes:
    """The smallest and largest ratio of new to old probability since they were last asked for."""

    smallest: float = 1.0
    largest: float = 1.0

    def take(self, ratio: Tensor) -> None:
        low, high = torch.aminmax(ratio)
        self.smallest, self.largest = min(self.smallest, float(low)), max(self.largest, float(high))

    def taken(self) -> dict[str, float]:
        """Both, by name; then they begin anew."""
        told = {"ratio_min": self.smallest, "ratio_max": self.largest}
        self.smallest = self.largest = 1.0
        return told


@dataclass
class PpoObjective:
    """policy + c_v·value − c_e·entropy (+ β·KL to the reference, where it is penalised as a loss), each the mean over
    all tokens of the minibatch (Schulman et al. 2017, equation 9). docs/metrics.md defines the names.
    """

    actor_critic: ActorCritic
    clip_epsilon: float
    value_coefficient: float
    value_clip: float | None = None
    entropy_coefficient: float = 0.0
    dual_clip: float | None = None
    kl_loss: KlEstimator | None = None
    kl_coefficient: float = 0.0
    extremes: Extremes = field(default_factory=Extremes)
    kept: ReusedForward | None = None

    @classmethod
    def of(
        cls, settings: PpoTrainingSection, actor_critic: ActorCritic, *, kept: ReusedForward | None = None
    ) -> PpoObjective:
        """The objective that a config's `training` section asks for. kept: where passes for the first step are."""
        return cls(
            actor_critic,
            clip_epsilon=settings.clip_epsilon,
            value_coefficient=settings.value_coefficient,
            value_clip=settings.value_clip,
            entropy_coefficient=settings.entropy_coefficient,
            dual_clip=settings.dual_clip,
            kl_loss=settings.penalty_estimator if settings.kl_in == "loss" else None,
            kl_coefficient=settings.kl_coefficient,
            kept=kept,
        )

    @property
    def weights(self) -> Mapping[str, float]:
        weights = {"policy_loss": 1.0, "value_loss": self.value_coefficient}
        if self.entropy_coefficient:
            weights["entropy"] = -self.entropy_coefficient
        if self.kl_loss is not None:
            weights["kl_loss"] = self.kl_coefficient
        return weights

    def counts(self, batch: ResponseBatch) -> Mapping[str, float]:
        return {name: float(len(batch.targets)) for name in (*self.weights, *_REPORTED)}

    def loss(self, batch: ResponseBatch) -> Mapping[str, Tensor]:
        outputs = None if self.kept is None else self.kept.take(batch)
        if outputs is None:
            outputs = self.actor_critic(batch.ids, batch.layout, batch.places, batch.targets)
        logprobs, entropies, values = outputs
        columns = batch.columns
        # The policy that wrote the responses is its own old policy, whatever else its batches were packed with.
        old = logprobs.detach() if batch.is_first else columns["old_logprobs"]
        policy = clipped_policy_terms(
            logprobs, old, columns["advantages"], clip_epsilon=self.clip_epsilon, dual_clip=self.dual_clip
        )
        value = clipped_value_terms(values, columns["values"], columns["returns"], clip_range=self.value_clip)
        self.extremes.take(policy.ratio)
        sums = {
            "policy_loss": policy.loss.sum(),
            "value_loss": value.loss.sum(),
            "entropy": entropies.sum() if self.entropy_coefficient else entropies.sum().detach(),
            "clip_share": policy.is_clipped.sum(),
            "value_clip_share": value.is_clipped.sum(),
            "approximate_kl": policy.approximate_kl.sum(),
            "ratio": policy.ratio.sum(),
        }
        if self.kl_loss is not None:
            sums["kl_loss"] = kl_terms(logprobs, columns["reference_logprobs"], self.kl_loss).sum()
        return sums

    def idle(self, batch: ResponseBatch) -> Tensor:
        found = self.actor_critic(batch.ids, batch.layout, batch.places, batch.targets)
        return torch.stack([each.sum() for each in found]).sum() * 0.0


class Stateful(Protocol):
    """What gives its state as JSON and takes it back."""

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class WrittenAhead(Protocol):
    """Responses that are begun before the policy gets to them."""

    def drain(self) -> None:
        """Waits for all that is in flight, on every process."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Under names that begin with "ahead-"."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None: ...


@dataclass
class PolicyState:
    """The rollouts in use and the place in them, β, the extremes of the ratio, the guards with the alarms that they
    sounded, what the check of the policy remembers, and the responses of iterations to come.
    """

    batches: RolloutBatches
    controller: KlController
    objective: PpoObjective
    guards: Monitor
    check: Stateful | None
    ahead: WrittenAhead | None = None
    alerts: list[str] = field(default_factory=list)

    def synchronise(self, world: World) -> None:
        """What a checkpoint needs, on all ranks: the extremes of the ratio, whole responses of iterations to come."""
        self.join_extremes(world)
        if self.ahead is not None:
            self.ahead.drain()

    def join_extremes(self, world: World) -> None:
        """The extremes of the ratio become those of all ranks."""
        extremes = self.objective.extremes
        gathered = [pair for pair in world.gather((extremes.smallest, extremes.largest)) if isinstance(pair, tuple)]
        extremes.smallest, extremes.largest = min(low for low, _ in gathered), max(high for _, high in gathered)

    def tensors(self) -> Mapping[str, Tensor]:
        return {**self.batches.tensors(), **(self.ahead.tensors() if self.ahead is not None else {})}

    def state(self) -> dict[str, Any]:
        return {
            "rollouts": self.batches.state(),
            "kl_coefficient": self.controller.coefficient,
            "ratios": [self.objective.extremes.smallest, self.objective.extremes.largest],
            "guards": self.guards.state(),
            "alarms": list(self.alerts),
            "check": self.check.state() if self.check is not None else None,
            "ahead": self.ahead.state() if self.ahead is not None else None,
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("ahead-")}
        self.batches.load(own, state["rollouts"])
        if self.ahead is not None and state["ahead"] is not None:
            self.ahead.load(tensors, state["ahead"])
        self.controller.coefficient = state["kl_coefficient"]
        in_use = state["rollouts"]["kl_coefficient"]
        self.objective.kl_coefficient = self.controller.coefficient if in_use is None else in_use
        self.objective.extremes.smallest, self.objective.extremes.largest = state["ratios"]
        self.guards.load(state["guards"])
        self.alerts[:] = state["alarms"]
        if self.check is not None and state["check"] is not None:
            self.check.load(state["check"])
