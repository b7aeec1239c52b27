"""The objective of preference optimization: losses of pairs of responses as named sums and counts, what is reported
beside them, and what a step needs before its losses.

Letters: T tokens of a packed row, M tokens of responses, N responses, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.registry import loaded
from loopos.config.variants import LOSSES
from loopos.data.batches import Cursor, DerivedBatches
from loopos.data.response_batches import PreferenceBatch
from loopos.functional.language_loss import TokenLogprobs
from loopos.functional.packing import PackedLayout
from loopos.functional.preference_losses import LossSettings, Pairs, wpo_weights
from loopos.training.distributed import World

Logprobs = Callable[[Tensor, PackedLayout, Tensor, Tensor], TokenLogprobs]
"""(ids `[T]`, layout, positions `[M]`, targets `[M]`) → log-probabilities and entropies of the targets, `[M]` each."""

SFT = "sft"
"""The loss −log π(c|x), the mean over the tokens of all chosen responses of a step."""

_BY_PAIR = ("rewards_chosen", "rewards_rejected", "reward_margin", "accuracy", "ties")
_BY_RESPONSE = ("logprob_chosen", "logprob_rejected", "length_chosen", "length_rejected")
_BY_TOKEN = ("logprob_per_token_chosen", "logprob_per_token_rejected")


@dataclass(frozen=True)
class PreferenceObjective:
    """Σ_k w_k·L_k, each L_k the weighted mean over the pairs of a step (`sft`: over the tokens of chosen responses).

    `losses`: name → weight; a name is a row of `config.variants.LOSSES`. `reference`: computes the
    log-probabilities of the reference for batches that hold none. In the first step the policy is the reference: its
    log-probabilities are then the policy's own, so that all rewards are exactly 0 in any packing. `length_alpha`:
    weight of the tokens beyond the length of a pair's shorter response (LD-DPO: Liu et al. 2024, equation 8). `wpo`:
    every loss of a pair is multiplied by w(c)·w(r) of `wpo_weights`, for which the policy returns collisions; the
    counts stay those of the pairs (Zhou et al. 2024).
    """

    policy: Logprobs
    losses: Mapping[str, float]
    settings: LossSettings
    reference: Callable[[PreferenceBatch], Tensor] | None = None
    length_alpha: float = 1.0
    wpo: bool = False

    @property
    def needs_reference(self) -> bool:
        """Whether any loss reads the reference."""
        return any(LOSSES[name].reference for name in self.losses)

    @property
    def needs_ranks(self) -> bool:
        """Whether any loss compares ranks within the step."""
        return any(LOSSES[name].ranks for name in self.losses)

    @property
    def weights(self) -> Mapping[str, float]:
        return {"loss": 1.0} if len(self.losses) == 1 else dict(self.losses)

    def counts(self, batch: PreferenceBatch) -> Mapping[str, float]:
        pairs = batch.pairs
        weight = float(pairs.weights.sum())
        chosen_tokens, rejected_tokens = (
            float((batch.lengths[side] * pairs.weights).sum()) for side in (pairs.better, pairs.worse)
        )
        counts = dict.fromkeys((*_BY_PAIR, *_BY_RESPONSE), weight)
        counts |= {"logprob_per_token_chosen": chosen_tokens, "logprob_per_token_rejected": rejected_tokens}
        counts["entropy"] = float(len(batch.targets))
        if self.wpo:
            counts["wpo_weight"] = weight
        for name in self.losses:
            counts[self._name(name)] = chosen_tokens if name == SFT else weight
        return counts

    def _name(self, loss: str) -> str:
        return "loss" if len(self.losses) == 1 else loss

    def loss(self, batch: PreferenceBatch) -> Mapping[str, Tensor]:
        outputs = self.policy(batch.ids, batch.layout, batch.positions, batch.targets)
        logprobs = outputs.logprobs
        reference = self._reference(batch, logprobs)
        found = self.pairs(batch, logprobs, reference)
        reported = {"entropy": outputs.entropies.detach().sum()}
        weights = batch.pairs.weights
        if self.wpo:
            factors = self._wpo(batch, outputs)
            weights = weights * factors
            reported["wpo_weight"] = weights.sum()
        sums = {self._name(name): self._sum(name, batch, found, logprobs, weights) for name in self.losses}
        return sums | self._reported(batch, found, logprobs.detach()) | reported

    def idle(self, batch: PreferenceBatch) -> Tensor:
        outputs = self.policy(batch.ids, batch.layout, batch.positions, batch.targets)
        if self.needs_reference and batch.reference is None and self.reference is not None:
            self.reference(batch)
        return (outputs.logprobs.sum() + outputs.entropies.sum()) * 0.0

    def score(self, batch: PreferenceBatch) -> Pairs:
        """The pairs of a batch under the current weights."""
        logprobs = self.policy(batch.ids, batch.layout, batch.positions, batch.targets).logprobs
        return self.pairs(batch, logprobs, self._reference(batch, logprobs))

    def _reference(self, batch: PreferenceBatch, logprobs: Tensor) -> Tensor | None:
        if not self.needs_reference:
            return None
        if batch.is_first:
            return logprobs.detach()
        if batch.reference is not None:
            return batch.reference
        assert self.reference is not None, "a loss with a reference has one"
        return self.reference(batch)

    def pairs(self, batch: PreferenceBatch, logprobs: Tensor, reference: Tensor | None) -> Pairs:
        """The pairs of a batch from log-probabilities `[M]`."""
        data, lengths = batch.pairs, batch.lengths
        chosen, rejected = self._sides(batch, logprobs)
        if reference is None:
            chosen_reference, rejected_reference = torch.zeros_like(chosen), torch.zeros_like(rejected)
        else:
            chosen_reference, rejected_reference = self._sides(batch, reference)
        return Pairs(
            chosen,
            rejected,
            chosen_reference,
            rejected_reference,
            lengths[data.better],
            lengths[data.worse],
            data.probabilities,
            data.margins,
            batch.sorted_reference,
        )

    def _sides(self, batch: PreferenceBatch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and the rejected response of each pair, `[P]`."""
        data = batch.pairs
        whole = batch.per_response(logprobs)
        if self.length_alpha == 1.0:
            return whole[data.better], whole[data.worse]
        shorter = torch.minimum(batch.lengths[data.better], batch.lengths[data.worse])
        cumulated = torch.cat([logprobs.new_zeros(1), logprobs.float().cumsum(0)])
        ends = batch.lengths.long().cumsum(0)
        starts = ends - batch.lengths.long()
        sides = []
        for side in (data.better, data.worse):
            first = starts[side]
            head = cumulated[first + shorter.long()] - cumulated[first]
            sides.append(head + self.length_alpha * (whole[side] - head))
        return sides[0], sides[1]

    @staticmethod
    def _wpo(batch: PreferenceBatch, outputs: TokenLogprobs) -> Tensor:
        """w(c)·w(r) of each pair, `[P]`."""
        assert outputs.collisions is not None, "a policy with WPO returns collisions"
        weights = wpo_weights(outputs.logprobs, outputs.collisions, batch.response, batch.lengths)
        return weights[batch.pairs.better] * weights[batch.pairs.worse]

    def _sum(self, name: str, batch: PreferenceBatch, pairs: Pairs, logprobs: Tensor, weights: Tensor) -> Tensor:
        """Σ of a loss over the pairs. weights: of the pairs, `[P]`."""
        if name == SFT and self.length_alpha != 1.0:
            # A likelihood has no shorter response: every token of the chosen one counts.
            pairs = replace(pairs, chosen=batch.per_response(logprobs)[batch.pairs.better])
        found = loaded(LOSSES[name].function)(pairs, self.settings)
        if not isinstance(found, Tensor) or found.shape != pairs.chosen.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"preference.loss: {name} returned {shape}; expected one loss per pair, [{len(weights)}]")
        return (found * weights).sum()

    @torch.no_grad()
    def _reported(self, batch: PreferenceBatch, pairs: Pairs, logprobs: Tensor) -> dict[str, Tensor]:
        """What is logged beside the losses: implicit rewards β·log π/ρ (β·log π/|y| without a reference), the share of
        pairs whose chosen response has the larger one, log-probabilities and lengths.
        """
        weights, beta = batch.pairs.weights, self.settings.beta
        whole = batch.per_response(logprobs)
        chosen_logprob, rejected_logprob = whole[batch.pairs.better], whole[batch.pairs.worse]
        if self.needs_reference:
            chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
        else:
            chosen, rejected = beta * pairs.chosen / pairs.chosen_tokens, beta * pairs.rejected / pairs.rejected_tokens
        gap = chosen - rejected
        values = {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "reward_margin": gap,
            "accuracy": (torch.sign(gap) + 1.0) / 2.0,
            "ties": (gap == 0).float(),
            "logprob_chosen": chosen_logprob,
            "logprob_rejected": rejected_logprob,
            "logprob_per_token_chosen": chosen_logprob,
            "logprob_per_token_rejected": rejected_logprob,
            "length_chosen": pairs.chosen_tokens,
            "length_rejected": pairs.rejected_tokens,
        }
        return {name: (value * weights).sum() for name, value in values.items()}


@dataclass(frozen=True)
class PreferenceBatches(DerivedBatches[PreferenceBatch]):
    """The comparisons of each step. objective: computes what a step needs before its losses; world: over which ranks
    are taken.
    """

    objective: PreferenceObjective
    world: World

    def step(self, cursor: Cursor) -> list[PreferenceBatch]:
        """This rank's micro-batches of the step at `cursor`."""
        found = self.batches.step(cursor)
        if cursor == Cursor() and self.objective.needs_reference:
            found = [replace(batch, is_first=True) for batch in found]
        return ranked(found, self.objective, self.world) if self.objective.needs_ranks else found


@torch.no_grad()
def ranked(batches: Sequence[PreferenceBatch], objective: PreferenceObjective, world: World) -> list[PreferenceBatch]:
    """The batches with the reference's difference of the same rank as each pair's own: over all pairs of all ranks, the
    k-th largest difference (chosen − rejected) of the policy meets the k-th largest of the reference.
    """
    own, reference = [], []
    for batch in batches:
        pairs = objective.score(batch)
        own.append((pairs.chosen - pairs.rejected).tolist())
        reference.append((pairs.chosen_reference - pairs.rejected_reference).tolist())
    parts = [part for part in world.gather_data_parallel((own, reference)) if isinstance(part, tuple)]
    every_own = torch.tensor([value for part in parts for values in part[0] for value in values])
    every_reference = torch.tensor([value for part in parts for values in part[1] for value in values])
    by_rank = torch.empty_like(every_reference)
    by_rank[every_own.argsort(stable=True)] = every_reference.sort(stable=True).values
    start = sum(len(values) for part in parts[: world.data_parallel[0]] for values in part[0])
    found = []
    for batch, values in zip(batches, own, strict=True):
        found.append(replace(batch, sorted_reference=by_rank[start : start + len(values)].to(batch.ids.device)))
        start += len(values)
    return found
