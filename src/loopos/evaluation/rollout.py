"""Prompts → responses of the policy with all that is known of them: scores, log-probabilities, values.

Enters: prompts as token ids, settings of sampling. Leaves: `Rollout`s, the same on every process. Generation and the
passes of policy, reference and value model go over this process's share of the prompts. Left out: advantages
(`training.rollouts`), the models (`models.roles`).
Letters: L tokens of a response.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loopos.config.ppo_sections import RolloutSection
from loopos.data.batches import in_order
from loopos.data.responses import ResponseRows
from loopos.evaluation.policy_metrics import distinct_n, explained_variance, length_mean, repetition
from loopos.evaluation.rewards import Response, Rewards
from loopos.functional.advantages import KlEstimator, kl_terms
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingSettings
from loopos.models.roles import Roles

# Tokens of one forward pass without gradients.
_TOKENS = 2048


@dataclass(frozen=True)
class Rollout:
    """One response. `score`: Σ of the weighted rewards, `parts`: what it is made of. `logprobs` (the policy's, as it
    wrote), `engine_logprobs` (as generation gave them), `reference_logprobs`, `values`, `entropies` (nats): `[L]` on
    CPU.
    """

    response: Response
    score: float
    parts: dict[str, float]
    logprobs: Tensor
    engine_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    entropies: Tensor

    def kl(self, estimator: KlEstimator) -> float:
        """KL to the reference, nats: the sum over the tokens."""
        return float(kl_terms(self.logprobs, self.reference_logprobs, estimator).sum())


class Collector:
    """Writes and judges responses with the models as they are now."""

    def __init__(
        self,
        engine: Engine,
        roles: Roles,
        rewards: Rewards,
        *,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        gather: Callable[[object], list[object]] = lambda value: [value],
    ) -> None:
        """share: (rank, ranks): this process answers every `ranks`-th prompt; gather(value) gives the values of all
        ranks.
        """
        self.engine, self.roles, self.rewards, self.device = engine, roles, rewards, device
        self._share, self._gather = share, gather

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: SamplingSettings) -> list[Rollout]:
        """One rollout a prompt, in order, all ranks' together."""
        found: list[Rollout] = self._of_all(self._judged(self._written(self._mine(prompts), sampling)))
        return found

    def answers(self, prompts: Sequence[Sequence[int]], sampling: SamplingSettings, n: int) -> list[list[Response]]:
        """n responses to every prompt, all ranks' together, unscored."""
        written = [response for response, _ in self._written(self._mine(prompts), sampling, n)]
        found: list[list[Response]] = self._of_all([written[first : first + n] for first in range(0, len(written), n)])
        return found

    def _mine(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        rank, ranks = self._share
        return list(prompts[rank::ranks])

    def _of_all(self, mine: list[Any]) -> list[Any]:
        """What every rank has for its share of the prompts, in the prompts' order."""
        parts = [part for part in self._gather(mine) if isinstance(part, list)]
        return [part[place] for place in range(len(parts[0])) for part in parts if place < len(part)]

    def _written(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSettings, n: int = 1
    ) -> list[tuple[Response, Tensor]]:
        """What the policy writes, with the log-probabilities that generation gives, `[L]`."""
        # Each place among all ranks' prompts draws numbers of its own, whichever rank it falls to.
        rank, ranks = self._share
        each = [seeded(sampling, rank + ranks * place) for place in range(len(prompts))]
        completions = self.engine.generate(prompts, each, n=n)
        tokenizer, found = self.engine.tokenizer, []
        for completion in completions:
            prompt = prompts[completion.prompt_index]
            asked = str(tokenizer.decode(list(prompt), skip_special_tokens=True))
            ended = completion.finish_reason in ("stop token", "stop string")
            response = Response(asked, prompt, completion.text, completion.token_ids, ended)
            found.append((response, torch.tensor(completion.logprobs)))
        return found

    def _judged(self, written: Sequence[tuple[Response, Tensor]]) -> list[Rollout]:
        responses = [response for response, _ in written]
        scores = self.rewards(responses)
        passes = self._passes(responses)
        return [
            Rollout(
                response,
                scores["total"][place],
                {name: values[place] for name, values in scores.items() if name != "total"},
                engine_logprobs=engine_logprobs,
                **{name: column[place] for name, column in passes.items()},
            )
            for place, (response, engine_logprobs) in enumerate(written)
        ]

    @torch.no_grad()
    def _passes(self, responses: Sequence[Response]) -> dict[str, list[Tensor]]:
        """Name → `[L]` of each response, by forward passes like those of training."""
        rows = ResponseRows([r.prompt_ids for r in responses], [r.ids for r in responses], self.device)
        found: dict[str, list[Tensor]] = {
            name: [torch.empty(0)] * len(responses)
            for name in ("logprobs", "reference_logprobs", "values", "entropies")
        }
        for batch in in_order(rows, tokens=_TOKENS):
            arguments = (batch.ids, batch.layout, batch.places, batch.targets)
            logprobs, entropies, values = self.roles.actor_critic(*arguments)
            columns = {"logprobs": logprobs, "entropies": entropies, "values": values,
                       "reference_logprobs": self.roles.reference(*arguments)}  # fmt: skip
            lengths = [len(responses[row].ids) for row in batch.rows]
            for name, column in columns.items():
                for row, part in zip(batch.rows, torch.split(column.float().cpu(), lengths), strict=True):
                    found[name][row] = part
        return found


def sampling_of(section: RolloutSection, *, stop_token_ids: Collection[int], seed: int) -> SamplingSettings:
    """How the tokens of a response are chosen, and what ends it."""
    return SamplingSettings(
        temperature=section.temperature,
        top_k=section.top_k or 0,
        top_p=section.top_p,
        max_new_tokens=section.max_new_tokens,
        stop=tuple(section.stop),
        keep_stop=True,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        seed=seed,
    )


def seeded(sampling: SamplingSettings, number: int) -> SamplingSettings:
    """The settings with a seed of their own for each number, such as an iteration."""
    return replace(sampling, seed=(sampling.seed * 1_000_003 + number) % 2**31)


def rollout_metrics(rollouts: Sequence[Rollout], *, estimator: KlEstimator) -> dict[str, float]:
    """Figures of an iteration, as docs/metrics.md defines them; kl is nats a response, entropy nats a token."""
    tokens = [rollout.response.ids for rollout in rollouts]
    mismatch = torch.cat([each.logprobs - each.engine_logprobs for each in rollouts])
    metrics = {
        "reward": statistics.fmean(rollout.score for rollout in rollouts),
        "reward_std": statistics.pstdev(rollout.score for rollout in rollouts),
        "kl": statistics.fmean(rollout.kl(estimator) for rollout in rollouts),
        "entropy": float(torch.cat([rollout.entropies for rollout in rollouts]).mean()),
        "response_length": length_mean(tokens),
        "end_share": statistics.fmean(rollout.response.ended for rollout in rollouts),
        "repetition": repetition(tokens),
        "logprob_mismatch": float(mismatch.abs().mean()),
    }
    distinct = distinct_n(tokens, 2)
    if distinct is not None:
        metrics["distinct_2"] = distinct
    for name in rollouts[0].parts:
        metrics[f"score_{name}"] = statistics.fmean(rollout.parts[name] for rollout in rollouts)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    return metrics


def variance_explained(values: Tensor, returns: Tensor) -> dict[str, float]:
    """{"explained_variance": 1 − Var(R − V) / Var(R)}; empty for constant returns."""
    found = explained_variance(values.numpy(), returns.numpy())
    return {} if found is None else {"explained_variance": found}
