"""The objective of proximal policy optimization: clipped policy loss, clipped value loss, entropy, KL.

Enters: batches of experience, an actor and critic. Leaves: sums and counts by name. Left out: advantages, the models.
Letters: M tokens of responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from loopos.config.ppo_sections import PpoTrainingSection
from loopos.data.kept_pass import KeptPass
from loopos.data.responses import ResponseBatch
from loopos.functional.advantages import KlEstimator, kl_terms
from loopos.functional.packing import PackedLayout
from loopos.functional.policy_loss import clipped_policy_terms, clipped_value_terms

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
    kept: KeptPass | None = None

    @classmethod
    def of(
        cls, settings: PpoTrainingSection, actor_critic: ActorCritic, *, kept: KeptPass | None = None
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
