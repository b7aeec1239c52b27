"""The objective of a policy (policy loss, clipped value loss, entropy, KL), and the state of its run for checkpoints.

Letters: M tokens of responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from loopos.config.rl import PpoTrainingSection
from loopos.functional.advantages import KlController, KlEstimator, kl_terms
from loopos.functional.packing import PackedLayout
from loopos.functional.policy_loss import clipped_value_terms, ratio_of
from loopos.rl.algorithms import PPO, Algorithm, PolicyInputs
from loopos.rl.experience import PolicyOutputs, ResponseBatch, ReusedForward
from loopos.rl.monitors import Monitor
from loopos.rl.rollouts import RolloutBatches
from loopos.training.distributed import World

_REPORTED = (
    "entropy",
    "clip_share",
    "clip_share_low",
    "clip_share_high",
    "value_clip_share",
    "approximate_kl",
    "ratio",
)


class ActorCritic(Protocol):
    """Computes log-probabilities, entropies (nats) and, with a critic, values, each `[M]`, with gradients."""

    def __call__(self, ids: Tensor, layout: PackedLayout, positions: Tensor, targets: Tensor) -> PolicyOutputs: ...


@dataclass
class Extremes:
    """The smallest and largest ratio of new to old probability since the last call of `taken`."""

    smallest: float = 1.0
    largest: float = 1.0

    def take(self, ratio: Tensor) -> None:
        low, high = torch.aminmax(ratio)
        self.smallest, self.largest = min(self.smallest, float(low)), max(self.largest, float(high))

    def taken(self) -> dict[str, float]:
        """Both by name; then resets them."""
        ratios = {"ratio_min": self.smallest, "ratio_max": self.largest}
        self.smallest = self.largest = 1.0
        return ratios


@dataclass
class PpoObjective:
    """policy + c_v·value − c_e·entropy (+ β·KL to the reference, if it is a loss), each the mean over all tokens of the
    minibatch (Schulman et al. 2017, equation 9); the policy term is the algorithm's, and the value term is there only
    with a critic. docs/metrics.md defines the names.

    `loss_normalization` of the policy term and the KL: "token"; "sequence", the mean over responses of the mean over
    their tokens (Shao et al. 2024); "constant", the sum over the number of responses times `max_new_tokens` (Liu et al.
    2025). Responses that are not learned count nowhere.
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
    reused: ReusedForward | None = None
    algorithm: Algorithm = PPO
    clip_epsilon_high: float | None = None
    loss_normalization: Literal["token", "sequence", "constant"] = "token"
    max_new_tokens: int = 1
    kl_importance: bool = False

    @classmethod
    def of(
        cls,
        settings: PpoTrainingSection,
        actor_critic: ActorCritic,
        algorithm: Algorithm,
        *,
        max_new_tokens: int,
        reused: ReusedForward | None = None,
    ) -> PpoObjective:
        """The objective for a config's `training` section. max_new_tokens: of a response. reused: stores forward
        passes for the first step.
        """
        return cls(
            actor_critic,
            clip_epsilon=settings.clip_epsilon,
            value_coefficient=settings.value_coefficient,
            value_clip=settings.value_clip,
            entropy_coefficient=settings.entropy_coefficient,
            dual_clip=settings.dual_clip,
            kl_loss=settings.penalty_estimator if settings.kl_in == "loss" and settings.kl_coefficient > 0 else None,
            kl_coefficient=settings.kl_coefficient,
            reused=reused,
            algorithm=algorithm,
            clip_epsilon_high=settings.clip_epsilon_high,
            loss_normalization=settings.loss_normalization,
            max_new_tokens=max_new_tokens,
            kl_importance=settings.kl_importance,
        )

    @property
    def weights(self) -> Mapping[str, float]:
        weights = {"policy_loss": 1.0}
        if self.algorithm.has_critic:
            weights["value_loss"] = self.value_coefficient
        if self.entropy_coefficient:
            weights["entropy"] = -self.entropy_coefficient
        if self.kl_loss is not None:
            weights["kl_loss"] = self.kl_coefficient
        return weights

    def counts(self, batch: ResponseBatch) -> Mapping[str, float]:
        reported = [name for name in _REPORTED if self.algorithm.has_critic or name != "value_clip_share"]
        lengths = [length for length, is_learned in zip(batch.lengths, batch.learned, strict=True) if is_learned]
        normalizers = {
            "token": sum(lengths),
            "sequence": len(lengths),
            "constant": len(lengths) * self.max_new_tokens,
        }
        counts = dict.fromkeys((*self.weights, *reported), float(sum(lengths)))
        for name in ("policy_loss", *(("kl_loss",) if self.kl_loss is not None else ())):
            counts[name] = float(normalizers[self.loss_normalization])
        return counts

    def loss(self, batch: ResponseBatch) -> Mapping[str, Tensor]:
        outputs = None if self.reused is None else self.reused.take(batch)
        if outputs is None:
            outputs = self.actor_critic(batch.ids, batch.layout, batch.positions, batch.targets)
        logprobs, entropies, values = outputs
        columns, factors, masked = batch.columns, self._factors(batch), _masked(batch)
        # In the first step the policy is its own old policy, so the ratio is exactly 1 in any packing.
        old = logprobs.detach() if batch.is_first else columns["old_logprobs"]
        policy = self.algorithm.policy_loss(
            PolicyInputs(
                logprobs=logprobs,
                old_logprobs=old,
                advantages=columns["advantages"],
                responses=batch.responses,
                clip_epsilon=self.clip_epsilon,
                clip_epsilon_high=self.clip_epsilon_high,
                dual_clip=self.dual_clip,
            )
        )
        self.extremes.take(policy.ratio)
        sums = {"policy_loss": factors(policy.loss).sum()}
        if values is not None:
            value = clipped_value_terms(values, columns["values"], columns["returns"], clip_range=self.value_clip)
            sums["value_loss"] = masked(value.loss).sum()
            sums["value_clip_share"] = masked(value.is_clipped).sum()
        clipped = masked(policy.is_clipped)
        entropy = masked(entropies).sum()
        sums |= {
            "entropy": entropy if self.entropy_coefficient else entropy.detach(),
            "clip_share": clipped.sum(),
            "clip_share_low": (clipped * (policy.ratio < 1)).sum(),
            "clip_share_high": (clipped * (policy.ratio > 1)).sum(),
            "approximate_kl": masked(policy.approximate_kl).sum(),
            "ratio": masked(policy.ratio).sum(),
        }
        if self.kl_loss is not None:
            kl = kl_terms(logprobs, columns["reference_logprobs"], self.kl_loss)
            # The gradient flows through the ratio too (DeepSeek-AI 2025, DeepSeek-V3.2, section 3.1).
            weighted = kl * ratio_of(logprobs - old) if self.kl_importance else kl
            sums["kl_loss"] = factors(weighted).sum()
        return sums

    def _factors(self, batch: ResponseBatch) -> Callable[[Tensor], Tensor]:
        """Multiplies token losses `[M]` by what the normalization gives each token within its response."""
        if self.loss_normalization != "sequence":
            return _masked(batch)
        pairs = zip(batch.lengths, batch.learned, strict=True)
        each = torch.tensor([is_learned / length for length, is_learned in pairs], device=batch.ids.device)
        return lambda values: values * each[batch.responses]

    def idle(self, batch: ResponseBatch) -> Tensor:
        outputs = self.actor_critic(batch.ids, batch.layout, batch.positions, batch.targets)
        return torch.stack([each.sum() for each in outputs if each is not None]).sum() * 0.0


def _masked(batch: ResponseBatch) -> Callable[[Tensor], Tensor]:
    """Sets values `[M]` of tokens without a loss to 0."""
    if all(batch.learned):
        return lambda values: values
    learned = torch.tensor(batch.learned, device=batch.ids.device)[batch.responses]
    return lambda values: values.where(learned, 0.0)


class Stateful(Protocol):
    """Saves its state as JSON and restores it."""

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class WrittenAhead(Protocol):
    """Responses that are requested before the policy needs them."""

    def drain(self) -> None:
        """Waits for all requests in flight, on every process."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors under names that start with "ahead-"."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None: ...


@dataclass
class PolicyState:
    """State of a PPO run beyond weights and optimizer: the current experience, β, the extremes of the ratio, the
    monitor and its alerts, the baseline of the policy check, the pass rates of prompts, responses of future
    iterations, and what rewards have used of their budgets.
    """

    batches: RolloutBatches
    controller: KlController
    objective: PpoObjective
    guards: Monitor
    check: Stateful | None
    ahead: WrittenAhead | None = None
    curriculum: Stateful | None = None
    alerts: list[str] = field(default_factory=list)
    rewards: Stateful | None = None
    _reward_states: list[dict[str, Any]] = field(default_factory=list)

    def synchronize(self, world: World) -> None:
        """Before a checkpoint, on all ranks: merges the extremes of the ratio and waits for responses of future
        iterations.
        """
        self.join_extremes(world)
        if self.ahead is not None:
            self.ahead.drain()
        if self.rewards is not None:
            self._reward_states = [each for each in world.gather(self.rewards.state()) if isinstance(each, dict)]

    def join_extremes(self, world: World) -> None:
        """Sets the extremes of the ratio to those over all ranks."""
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
            "alerts": list(self.alerts),
            "check": self.check.state() if self.check is not None else None,
            "ahead": self.ahead.state() if self.ahead is not None else None,
            "rewards": self._reward_states,
            **({"curriculum": self.curriculum.state()} if self.curriculum is not None else {}),
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
        # "alarms" in the checkpoints of older versions.
        self.alerts[:] = state["alerts"] if "alerts" in state else state["alarms"]
        if self.check is not None and state["check"] is not None:
            self.check.load(state["check"])
        if self.rewards is not None and state.get("rewards"):
            self.rewards.load({"ranks": state["rewards"]})
        if self.curriculum is not None and "curriculum" in state:
            self.curriculum.load(state["curriculum"])
