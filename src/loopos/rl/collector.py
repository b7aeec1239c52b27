"""Prompts → responses of the policy with all that is known of them: scores, log-probabilities, values.

Enters: prompts as token ids, settings of sampling. Leaves: `Rollout`s, the same on every process. Generation and the
passes of policy, reference and value model go over this process's share of the prompts. Left out: advantages
(`training.rollouts`), the models (`models.roles`).
Letters: L tokens of a response.

Best-of-n: the best of several answers of the first policy, by the reward. What training has to beat.

Enters: several answers to each prompt, how they are scored, perhaps a judge. Leaves: for each n its KL, the expected
reward, and what the judge says of the answers chosen. After Stiennon et al. 2020 and Nakano et al. 2021. Left out: the
frontier's plot.

A policy in training, measured on prompts that it is not trained on.

Enters: validation prompts, a collector, perhaps a judge that training does not see. Leaves: metrics and a record of
each answer. The first answers are kept: later ones are compared with them. Left out: what follows (`training`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from loopos.config.rl import RolloutSection
from loopos.data.batches import in_order
from loopos.data.preference_tokens import Origin
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.policy_metrics import (
    best_of_n_expected,
    best_of_n_kl,
    distinct_n,
    explained_variance,
    length_mean,
    repetition,
    win_rate,
)
from loopos.functional.advantages import KlEstimator, kl_terms
from loopos.generation.completions import decoded
from loopos.generation.settings import SamplingSettings
from loopos.rl.experience import ResponseRows, ReusedForward
from loopos.rl.rewards import Response, Rewards
from loopos.rl.roles import Roles
from loopos.rl.workers.protocol import Request, RolloutEngine

# Tokens of one forward pass without gradients.
_TOKENS = 2048


@dataclass(frozen=True)
class Rollout:
    """One response. `score`: Σ of the weighted rewards, `parts`: what it is made of. `logprobs` (the policy's, as it
    is), `engine_logprobs` (as generation gave them), `reference_logprobs`, `values`, `entropies` (nats): `[L]` on CPU.
    `staleness`: iterations that the policy which wrote it is behind.
    """

    response: Response
    score: float
    parts: dict[str, float]
    logprobs: Tensor
    engine_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    entropies: Tensor
    staleness: int = 0

    def kl(self, estimator: KlEstimator) -> float:
        """KL of the policy that wrote to the reference, nats: the sum over the tokens."""
        wrote = self.engine_logprobs if self.staleness else self.logprobs
        return float(kl_terms(wrote, self.reference_logprobs, estimator).sum())


class Collector:
    """Writes and judges responses with the models as they are now."""

    def __init__(
        self,
        engine: RolloutEngine,
        roles: Roles,
        rewards: Rewards,
        *,
        device: torch.device,
        words: Mapping[tuple[int, ...], Origin] = MappingProxyType({}),
        kept: ReusedForward | None = None,
        gather: Callable[[object], list[object]] = lambda value: [value],
    ) -> None:
        """words: what was asked, by the ids of the prompt that the template made of it; without it the ids' own text.
        kept: takes the pass of an iteration's responses that its first step would run again. gather(value) gives the
        values of all ranks; the engine gives each rank the answers to its own share.
        """
        self.engine, self.roles, self.rewards, self.device = engine, roles, rewards, device
        self._words, self._kept, self._gather = words, kept, gather

    def __call__(self, request: Request, *, iteration: int | None = None) -> list[Rollout]:
        """One rollout a prompt, in order, all ranks' together. iteration: that of training whose rollouts these are."""
        written, staleness = self._written(request, iteration)
        found: list[Rollout] = self._of_all(self._judged(written, staleness, iteration))
        return found

    def answers(self, request: Request) -> list[list[Response]]:
        """n responses to every prompt, all ranks' together, unscored."""
        written, n = [response for response, _ in self._written(request)[0]], request.n
        found: list[list[Response]] = self._of_all([written[first : first + n] for first in range(0, len(written), n)])
        return found

    def _of_all(self, mine: list[Any]) -> list[Any]:
        """What every rank has for its share of the prompts, in the prompts' order."""
        parts = [part for part in self._gather(mine) if isinstance(part, list)]
        return [part[index] for index in range(len(parts[0])) for part in parts if index < len(part)]

    def _written(self, request: Request, iteration: int | None = None) -> tuple[list[tuple[Response, Tensor]], int]:
        """What the policy writes for this process's share, with the log-probabilities that generation gives, `[L]`; and
        its staleness.
        """
        written = self.engine.write(request, iteration=iteration)
        tokenizer, found = self.engine.tokenizer, []
        for completion in written.completions:
            prompt = request.prompts[completion.prompt_index]
            origin = self._words.get(tuple(prompt)) or Origin(decoded(tokenizer, prompt), "")
            ended = completion.finish_reason in ("stop token", "stop string")
            response = Response(origin.text, prompt, completion.text, completion.token_ids, ended, origin.location)
            found.append((response, torch.tensor(completion.logprobs)))
        return found, written.staleness

    def _judged(
        self, written: Sequence[tuple[Response, Tensor]], staleness: int, iteration: int | None
    ) -> list[Rollout]:
        responses = [response for response, _ in written]
        scores = self.rewards(responses)
        passes = self._passes(responses, iteration)
        return [
            Rollout(
                response,
                scores["total"][index],
                {name: values[index] for name, values in scores.items() if name != "total"},
                engine_logprobs=engine_logprobs,
                staleness=staleness,
                **{name: column[index] for name, column in passes.items()},
            )
            for index, (response, engine_logprobs) in enumerate(written)
        ]

    @torch.no_grad()
    def _passes(self, responses: Sequence[Response], iteration: int | None) -> dict[str, list[Tensor]]:
        """Name → `[L]` of each response, by forward passes like those of training."""
        rows = ResponseRows([r.prompt_ids for r in responses], [r.ids for r in responses], self.device)
        found: dict[str, list[Tensor]] = {
            name: [torch.empty(0)] * len(responses)
            for name in ("logprobs", "reference_logprobs", "values", "entropies")
        }
        first = None
        if self._kept is not None and iteration is not None:
            first = self._kept.batch(rows, iteration)
        for batch in in_order(rows, tokens=_TOKENS) if first is None else [first]:
            arguments = (batch.ids, batch.layout, batch.places, batch.targets)
            with torch.set_grad_enabled(batch is first):
                outputs = self.roles.actor_critic(*arguments)
            if self._kept is not None and batch is first:
                self._kept.keep(batch, outputs)
            logprobs, entropies, values = (output.detach() for output in outputs)
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


def request_of(prompts: Sequence[Sequence[int]], sampling: SamplingSettings, n: int = 1) -> Request:
    """n responses to every prompt: each place draws numbers of its own, whoever writes there."""
    return Request([list(prompt) for prompt in prompts], [seeded(sampling, index) for index in range(len(prompts))], n)


def seeded(sampling: SamplingSettings, number: int) -> SamplingSettings:
    """The settings with a seed of their own for each number, such as an iteration."""
    return replace(sampling, seed=(sampling.seed * 1_000_003 + number) % 2**31)


def _importance(rollouts: Sequence[Rollout], mismatch: Tensor, cap: float | None) -> dict[str, float]:
    """How far behind the policy that wrote is, where it is, and how its tokens are weighed, where they are."""
    staleness = statistics.fmean(rollout.staleness for rollout in rollouts)
    told = {"staleness": staleness} if staleness else {}
    if cap is not None:
        told["importance_weight"] = float(mismatch.exp().clamp(max=cap).mean())
        told["importance_truncated"] = float((mismatch > math.log(cap)).float().mean())
    return told


def rollout_metrics(
    rollouts: Sequence[Rollout], *, estimator: KlEstimator, importance_cap: float | None = None
) -> dict[str, float]:
    """Figures of an iteration, as docs/metrics.md defines them; kl is nats a response, entropy nats a token. Raises
    `NonFiniteOutputs`.
    """
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
        **_importance(rollouts, mismatch, importance_cap),
    }
    distinct = distinct_n(tokens, 2)
    if distinct is not None:
        metrics["distinct_2"] = distinct
    for name in rollouts[0].parts:
        metrics[f"score_{name}"] = statistics.fmean(rollout.parts[name] for rollout in rollouts)
    unusable = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if unusable:
        named = ", ".join(f"{name} is {value}" for name, value in unusable.items())
        raise NonFiniteOutputs(
            f"the figures of {len(rollouts)} responses are not finite numbers: {named}; lower training.learning_rate, "
            "or bound the rewards with reward.score_clip"
        )
    return metrics


def variance_explained(values: Tensor, returns: Tensor) -> dict[str, float]:
    """{"explained_variance": 1 − Var(R − V) / Var(R)}; empty for constant returns."""
    found = explained_variance(values.numpy(), returns.numpy())
    return {} if found is None else {"explained_variance": found}


Judge = Callable[[Sequence[Response]], list[float]]


def best_of_n(
    answers: Sequence[Sequence[Response]], score: Judge, numbers: Sequence[int], judge: Judge | None
) -> list[dict[str, Any]]:
    """answers: for every prompt as many responses as the largest of `numbers`, or more. For each n: `kl`; `reward`: the
    expected score of the best of n, without bias; `judge`: its mean score of the best of each prompt's first n.
    """
    flat = [response for responses in answers for response in responses]
    scores = iter(score(flat))
    table = [[next(scores) for _ in responses] for responses in answers]
    found: list[dict[str, Any]] = []
    for n in numbers:
        told: dict[str, Any] = {"n": n, "kl": best_of_n_kl(n), "reward": best_of_n_expected(table, n)}
        if judge is not None:
            chosen = [
                responses[max(range(n), key=lambda place, scored=scored: scored[place])]  # type: ignore[misc]
                for responses, scored in zip(answers, table, strict=True)
            ]
            told["judge"] = statistics.fmean(judge(chosen))
        found.append(told)
    return found


class PolicyCheck:
    """Asks the same prompts each time, with the same seeds."""

    def __init__(
        self,
        collector: Collector,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        judge: Judge | None,
        *,
        estimator: KlEstimator,
        kl_limit: float | None,
    ) -> None:
        """kl_limit: nats a response above which "reward_within_kl" is −inf."""
        self.collector, self.prompts, self.sampling, self.judge = collector, prompts, sampling, judge
        self.estimator, self.kl_limit = estimator, kl_limit
        self._first: dict[str, list[float]] = {}

    def measure(self, *, is_start: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and records of all prompts, the same on every rank. "judge" is the mean of the judge's scores,
        "win_rate" the share of prompts whose answer scores higher by it than before training, ties half;
        "reward_win_rate" the same by the reward. is_start: these are the answers before training, which later ones are
        compared with; without them there are no win rates.
        """
        rollouts = self.collector(request_of(self.prompts, self.sampling))
        metrics = rollout_metrics(rollouts, estimator=self.estimator)
        if self.kl_limit is not None:
            metrics["reward_within_kl"] = metrics["reward"] if metrics["kl"] <= self.kl_limit else -math.inf
        scores = {"reward": [rollout.score for rollout in rollouts]}
        if self.judge is not None:
            scores["judge"] = self.judge([rollout.response for rollout in rollouts])
            metrics["judge"] = statistics.fmean(scores["judge"])
        if self._first:
            metrics["reward_win_rate"] = win_rate(scores["reward"], self._first["reward"]).rate
            if self.judge is not None:
                metrics["win_rate"] = win_rate(scores["judge"], self._first["judge"]).rate
        if is_start:
            self._first = scores
        records = [
            {
                "prompt": rollout.response.prompt,
                "response": rollout.response.text,
                "ended": rollout.response.ended,
                "kl": rollout.kl(self.estimator),
                **{name: values[index] for name, values in scores.items()},
            }
            for index, rollout in enumerate(rollouts)
        ]
        return metrics, records

    def best_of_n(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """`best_of_n` on these prompts, with the policy as it is now; of 1 too, where the comparison begins. Nothing
        for no numbers.
        """
        if not numbers:
            return []
        every = sorted({1, *numbers})
        answers = self.collector.answers(request_of(self.prompts, self.sampling, every[-1]))
        return best_of_n(answers, lambda responses: self.collector.rewards(responses)["total"], every, self.judge)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: the scores of the answers before training."""
        return {"first": self._first}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self._first = dict(state["first"])
