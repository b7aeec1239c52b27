"""Comparisons that the policy makes itself: it writes answers to prompts, a reward scores them, and the best and the
worst answer of each prompt are the comparison of the next steps (OAIF: Guo et al. 2024; iterative DPO where a round has
many steps).

For the training loop a round is an epoch, whose rows are written by the policy as it is at its first step.
Letters: k answers to a prompt, K comparisons of a round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.preference import PreferenceConfig
from loopos.data.digest import prompts_digest, records_digest
from loopos.data.preference_tokens import EncodedComparison, PreferenceEncoder
from loopos.data.preferences import Pair
from loopos.data.prompts import WithPrompt, distinct_prompts
from loopos.data.reading import DataReport
from loopos.data.response_batches import PreferenceBatch
from loopos.generation.settings import SamplingParams
from loopos.models.folders import OpenedReward, check_same_tokens, open_reward_model
from loopos.models.load import fingerprint
from loopos.rl.collector import Collector, ScoredResponse, answer_metrics, request_of, seeded
from loopos.rl.rollouts import RolloutPlan
from loopos.rl.rounds import Rounds

# So often a round is written anew if no prompt has answers of different rewards.
_MOST_ATTEMPTS = 10


@dataclass(frozen=True)
class OnlineSources:
    """What a policy answers, and the reward models that score it, with the fingerprints of their weights. `encoder`:
    knows where each prompt comes from.
    """

    prompts: list[list[int]]
    tokens: DataReport
    encoder: PreferenceEncoder
    rewards: list[OpenedReward]
    fingerprints: list[str]

    @classmethod
    def open(
        cls, config: PreferenceConfig, examples: Iterable[WithPrompt], encoder: PreferenceEncoder
    ) -> OnlineSources:
        """The prompts of `examples`, each once. encoder: of the comparisons. Raises `UserError` for a reward model with
        other tokens, `DataError` as `encode_prompts`.
        """
        assert config.online is not None
        own = encoder.leaving_room(config.online.max_new_tokens)
        prompts, tokens = own.prompts(distinct_prompts(examples))
        rewards = []
        for location in config.data.reward_models:
            rewards.append(open_reward_model(location))
            check_same_tokens(encoder.tokenizer, rewards[-1].tokenizer, f"data.reward_model: {location}")
        found = [fingerprint(opened.model.backbone.model) for opened in rewards]
        return cls(prompts, tokens, own, rewards, found)

    def digest(self, *, with_columns: bool) -> str:
        """Of the prompts in their order, and with the columns of their rows where a reward reads them."""
        rows = [self.encoder.origins[tuple(ids)].row for ids in self.prompts] if with_columns else []
        return f"{prompts_digest(self.prompts)} {records_digest(rows)}" if rows else prompts_digest(self.prompts)


def plan_of(config: PreferenceConfig, *, num_prompts: int, rank: int, world: int) -> RolloutPlan:
    """The sizes of the rounds: as many prompts as `every` steps have comparisons. `num_epochs` counts passes over the
    prompts.
    """
    training, online = config.training, config.online
    assert online is not None
    prompts = training.batch_size * training.gradient_accumulation * world * online.every
    return RolloutPlan(
        num_prompts=num_prompts,
        batch_size=prompts * online.responses_per_prompt,
        inner_epochs=1,
        minibatches=online.every,
        accumulation=training.gradient_accumulation,
        rank=rank,
        world=world,
        seed=training.seed,
        shuffle=training.shuffle,
        iterations=-(-training.num_epochs * num_prompts // prompts),
        responses_per_prompt=online.responses_per_prompt,
    )


def compared(answers: Sequence[Sequence[ScoredResponse]]) -> list[EncodedComparison]:
    """The best against the worst answer of each prompt, the first of equal ones; their margin is the difference of the
    scores. Prompts whose answers have equal scores, or the same tokens, are left out. An answer without tokens, or that
    no reward judged, is none.
    """
    found = []
    for index, each in enumerate(answers):
        if not _comparable(each):
            continue
        best, worst = _extremes(each)
        responses = [list(best.response.ids), list(worst.response.ids)]
        if best.score == worst.score or responses[0] == responses[1]:
            continue
        pair = Pair(0, 1, margin=best.score - worst.score)
        found.append(EncodedComparison(list(best.response.prompt_ids), responses, (pair,), index))
    return found


def round_metrics(
    answers: Sequence[Sequence[ScoredResponse]], comparisons: Sequence[EncodedComparison]
) -> dict[str, float]:
    """Metrics of a round, as docs/metrics.md defines them. Raises `NonFiniteOutputs`."""
    metrics = answer_metrics([answer for each in answers for answer in each])
    metrics |= {"pairs": float(len(comparisons)), "no_signal": 1.0 - len(comparisons) / len(answers)}
    for side, name in enumerate(("chosen", "rejected") if comparisons else ()):
        chosen = [_extremes(answers[each.index])[side] for each in comparisons]
        metrics[f"reward_{name}"] = statistics.fmean(answer.score for answer in chosen)
        metrics[f"length_{name}"] = statistics.fmean(len(answer.response.ids) for answer in chosen)
    return metrics


def _comparable(answers: Sequence[ScoredResponse]) -> list[ScoredResponse]:
    """The answers with tokens that were judged."""
    return [answer for answer in answers if answer.response.ids and not math.isnan(answer.score)]


def _extremes(answers: Sequence[ScoredResponse]) -> tuple[ScoredResponse, ScoredResponse]:
    """The best and the worst of the answers that can be compared."""
    written = _comparable(answers)
    return max(written, key=lambda one: one.score), min(written, key=lambda one: one.score)


@dataclass(frozen=True)
class RoundWriter:
    """Writes the comparisons of rounds. `record`: logs a round's metrics and seconds."""

    collector: Collector
    plan: RolloutPlan
    prompts: Sequence[list[int]]
    sampling: SamplingParams
    record: Callable[[Mapping[str, float], float], None]

    def __call__(self, number: int) -> list[EncodedComparison]:
        """The comparisons of a round by the policy as it is, the same on every rank. Raises `UserError` where the
        reward never tells answers apart.
        """
        each = self.plan.responses_per_prompt
        prompts = [self.prompts[index] for index in self.plan.prompts_of(number)[::each]]
        for attempt in range(_MOST_ATTEMPTS):
            began, sampling = time.monotonic(), seeded(self.sampling, number)
            if attempt:
                sampling = seeded(sampling, attempt)
            answers = self.collector.scored_answers(request_of(prompts, sampling, each), number)
            comparisons = compared(answers)
            metrics = round_metrics(answers, comparisons)
            self.record({"iteration": number, **metrics}, time.monotonic() - began)
            if comparisons:
                return comparisons
        raise UserError(
            f"round {number + 1}: in {_MOST_ATTEMPTS} attempts the {each} answers to each of {len(prompts)} prompts "
            "have equal rewards, so there is nothing to learn from; raise online.responses_per_prompt or "
            "online.temperature, or take another reward"
        )


class RoundBatches(Rounds[EncodedComparison, PreferenceBatch]):
    """The comparisons of rounds."""

    def tensors_of(self, rows: Sequence[EncodedComparison]) -> Mapping[str, Tensor]:
        """Ids and lengths of prompt, best and worst answer, and margins."""
        texts = [ids for each in rows for ids in (each.prompt, *each.responses)]
        return {
            "ids": torch.tensor([token for ids in texts for token in ids]),
            "lengths": torch.tensor([len(ids) for ids in texts]),
            "indices": torch.tensor([each.index for each in rows]),
            "margins": torch.tensor([each.pairs[0].margin for each in rows], dtype=torch.float64),
        }

    def rows_from(self, tensors: Mapping[str, Tensor]) -> list[EncodedComparison]:
        texts = [part.tolist() for part in torch.split(tensors["ids"], tensors["lengths"].tolist())]
        numbers = zip(tensors["indices"].tolist(), tensors["margins"].tolist(), strict=True)
        return [
            EncodedComparison(prompt, [best, worst], (Pair(0, 1, margin=margin),), index)
            for (index, margin), prompt, best, worst in zip(numbers, texts[::3], texts[1::3], texts[2::3], strict=True)
        ]
