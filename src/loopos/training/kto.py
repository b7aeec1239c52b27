"""KTO: learning from single answers that are good or bad (Ethayarajh et al. 2024).

Letters: M tokens of answers, N answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loopos.data.answer_batches import AnswerBatch, AnswerRows
from loopos.data.batches import Cursor, DerivedBatches
from loopos.functional.preference_losses import kto_losses
from loopos.training.distributed import World
from loopos.training.preference_objective import Logprobs


@dataclass(frozen=True)
class KtoObjective:
    """The mean of `kto_losses` over the answers of a step. Reported beside it: rewards β·log π/ρ, log-probabilities and
    lengths of desirable and undesirable answers, the baseline, and the share of answers on the right side of it.
    """

    policy: Logprobs
    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Callable[[AnswerBatch], Tensor] | None = None

    @property
    def weights(self) -> Mapping[str, float]:
        return {"loss": 1.0}

    def counts(self, batch: AnswerBatch) -> Mapping[str, float]:
        number, good = float(len(batch.rows)), float(batch.desirable.sum())
        tokens, good_tokens = float(len(batch.targets)), float((batch.lengths * batch.desirable).sum())
        counts = {"loss": number, "kl": number, "accuracy": number, "entropy": tokens}
        for name in ("rewards", "logprob", "length"):
            counts |= {f"{name}_desirable": good, f"{name}_undesirable": number - good}
        counts["logprob_per_token_desirable"] = good_tokens
        return counts | {"logprob_per_token_undesirable": tokens - good_tokens}

    def loss(self, batch: AnswerBatch) -> Mapping[str, Tensor]:
        logprobs, entropies, _ = self.policy(batch.ids, batch.layout, batch.positions, batch.targets)
        reference = self._reference(batch, logprobs)
        whole = batch.per_answer(logprobs)
        ratios = whole - batch.per_answer(reference)
        losses = kto_losses(
            ratios,
            batch.desirable,
            ratios.new_tensor(batch.baseline),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        rewards, good = (self.beta * ratios).detach(), batch.desirable.float()
        sides = torch.sign(rewards - self.beta * batch.baseline) * (2.0 * good - 1.0)
        sums = {
            "loss": losses.sum(),
            "kl": ratios.new_tensor(batch.baseline * len(batch.rows)),
            "accuracy": ((sides + 1.0) / 2.0).sum(),
            "entropy": entropies.detach().sum(),
        }
        logprobs = whole.detach()
        columns = {"rewards": rewards, "logprob": logprobs, "length": batch.lengths, "logprob_per_token": logprobs}
        for name, column in columns.items():
            sums[f"{name}_desirable"] = (column * good).sum()
            sums[f"{name}_undesirable"] = (column * (1.0 - good)).sum()
        return sums

    def idle(self, batch: AnswerBatch) -> Tensor:
        outputs = self.policy(batch.ids, batch.layout, batch.positions, batch.targets)
        if batch.reference is None and self.reference is not None:
            self.reference(batch)
        return (outputs.logprobs.sum() + outputs.entropies.sum()) * 0.0

    @torch.no_grad()
    def ratios(self, batch: AnswerBatch) -> Tensor:
        """log π/ρ of the answers of a batch, `[N]`, without gradient."""
        logprobs = self.policy(batch.ids, batch.layout, batch.positions, batch.targets).logprobs
        return batch.per_answer(logprobs - self._reference(batch, logprobs))

    def _reference(self, batch: AnswerBatch, logprobs: Tensor) -> Tensor:
        if batch.is_first:
            return logprobs.detach()
        if batch.reference is not None:
            return batch.reference
        assert self.reference is not None, "KTO has a reference"
        return self.reference(batch)


@dataclass(frozen=True)
class KtoBatches(DerivedBatches[AnswerBatch]):
    """The answers of each step with its baseline: max(0, the mean of log π/ρ over the mismatched pairs of the step),
    over all micro-batches and ranks. mismatched: the same rows with their mismatched answers.
    """

    mismatched: AnswerRows
    objective: KtoObjective
    world: World

    def step(self, cursor: Cursor) -> list[AnswerBatch]:
        """This rank's micro-batches of the step at `cursor`."""
        found = self.batches.step(cursor)
        if cursor == Cursor():
            return [replace(batch, is_first=True) for batch in found]
        ratios = [self.objective.ratios(self.mismatched(batch.rows)).tolist() for batch in found]
        # Summed in the order of the rows, so that no split of the step changes the last bit.
        parts = self.world.gather_data_parallel(
            [
                (row, value)
                for batch, values in zip(found, ratios, strict=True)
                for row, value in zip(batch.rows, values, strict=True)
            ]
        )
        values = [value for _, value in sorted(pair for part in parts for pair in part)]  # type: ignore[attr-defined]
        baseline = max(0.0, sum(values) / len(values)) if values else 0.0
        return [replace(batch, baseline=baseline) for batch in found]
