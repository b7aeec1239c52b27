"""Collects rollouts: generates responses to prompts, scores them, and computes log-probabilities and values.

Each process generates and scores its part of the prompts; all processes receive all rollouts. `PolicyCheck` measures a
policy on validation prompts, including best-of-n of the initial policy (Stiennon et al. 2020; Nakano et al. 2021).
Letters: L tokens of a response.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from loopos.config.rl import ResponseSection
from loopos.data.batches import in_order
from loopos.data.preference_tokens import Origin
from loopos.evaluation.checkers import pass_at_k
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.policy_metrics import (
    WinRate,
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
from loopos.generation.settings import SamplingParams
from loopos.rl.experience import ResponseRows, ReusedForward
from loopos.rl.reward_metrics import judged, reward_metrics
from loopos.rl.rewards import Response, Rewards
from loopos.rl.roles import ActorCritic, Reference
from loopos.rl.workers.protocol import Request, RolloutEngine

# Tokens per forward pass without gradients.
_TOKENS = 2048


@dataclass(frozen=True)
class Rollout:
    """One response. `score`: Σ of the weighted rewards, 0 without any, NaN where none judged; `parts`: its terms. `[L]`
    on CPU: `logprobs` (current policy), `engine_logprobs` (from generation), `entropies` (nats), and
    `reference_logprobs` and `values` where the run has a reference and a critic. `staleness`: number of iterations by
    which the generating policy is older.
    """

    response: Response
    score: float
    parts: dict[str, float]
    logprobs: Tensor
    engine_logprobs: Tensor
    entropies: Tensor
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    staleness: int = 0

    def kl(self, estimator: KlEstimator) -> float | None:
        """KL from the generating policy to the reference, in nats, summed over tokens; None without a reference."""
        if self.reference_logprobs is None:
            return None
        wrote = self.engine_logprobs if self.staleness else self.logprobs
        return float(kl_terms(wrote, self.reference_logprobs, estimator).sum())


@dataclass(frozen=True)
class ScoredResponse:
    """One response. `score`: Σ of the weighted rewards, NaN where none judged; `parts`: its terms."""

    response: Response
    score: float
    parts: dict[str, float]


class Models(Protocol):
    """The policy, with a value model or without, and what its KL is measured to."""

    @property
    def actor_critic(self) -> ActorCritic: ...
    @property
    def reference(self) -> Reference | None: ...


class Collector:
    """Generates and scores responses with the current models."""

    def __init__(
        self,
        engine: RolloutEngine,
        roles: Models | None,
        rewards: Rewards | None,
        *,
        device: torch.device,
        origins: Mapping[tuple[int, ...], Origin] = MappingProxyType({}),
        reused: ReusedForward | None = None,
        share_prompts: bool = False,
        gather: Callable[[object], list[object]] = lambda value: [value],
    ) -> None:
        """roles: None where only `answers` and `scored_answers` are called. rewards: None where only a judge scores.
        origins: prompt ids → the prompt's text and source; without it the text is decoded from the ids. reused: stores
        the forward pass over an iteration's responses for its first optimizer step. share_prompts: as in
        `ResponseRows`. gather(value): the values of all
        ranks; the engine generates only this rank's part.
        """
        self.engine, self.roles, self.rewards, self.device = engine, roles, rewards, device
        self._origins, self._reused, self._gather = origins, reused, gather
        self._shared_prompts = share_prompts
        self._seconds: dict[str, float] = {}

    def __call__(
        self, request: Request, *, iteration: int | None = None, reward_iteration: int | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order, from all ranks. iteration: the training iteration of these rollouts; None
        for others. reward_iteration: which iteration's weights of rewards count, where it is not `iteration`.
        """
        written, staleness = self._generated(request, iteration)
        weights_of = iteration if reward_iteration is None else reward_iteration
        found: list[Rollout] = self._of_all(self._scored(written, staleness, iteration, weights_of))
        return found

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def timing(self) -> dict[str, float]:
        """Seconds of this process since the last call: of generation, of rewards, and of the forward passes over the
        responses.
        """
        taken, self._seconds = self._seconds, {}
        return taken

    def answers(self, request: Request) -> list[list[Response]]:
        """n responses to every prompt, from all ranks, without scores."""
        written, n = [response for response, _ in self._generated(request)[0]], request.n
        found: list[list[Response]] = self._of_all([written[first : first + n] for first in range(0, len(written), n)])
        return found

    def scored_answers(self, request: Request, iteration: int | None = None) -> list[list[ScoredResponse]]:
        """`answers`, with their scores. iteration: of training, which weights of rewards depend on."""
        n = request.n
        scored = self._with_scores([response for response, _ in self._generated(request)[0]], iteration)
        found: list[list[ScoredResponse]]
        found = self._of_all([scored[first : first + n] for first in range(0, len(scored), n)])
        return found

    def _of_all(self, own: list[Any]) -> list[Any]:
        """Collects each rank's part and restores the order of the prompts."""
        parts = [part for part in self._gather(own) if isinstance(part, list)]
        return [part[index] for index in range(len(parts[0])) for part in parts if index < len(part)]

    def _generated(self, request: Request, iteration: int | None = None) -> tuple[list[tuple[Response, Tensor]], int]:
        """This rank's responses with the log-probabilities `[L]` from generation, and their staleness."""
        with self._timed("generation_seconds"):
            written = self.engine.write(request, iteration=iteration)
        tokenizer, found = self.engine.tokenizer, []
        for completion in written.completions:
            prompt = request.prompts[completion.prompt_index]
            origin = self._origins.get(tuple(prompt)) or Origin(decoded(tokenizer, prompt), "")
            ended = completion.finish_reason in ("stop", "stop string")
            text, ids = completion.text, completion.token_ids
            response = Response(origin.text, prompt, text, ids, ended, origin.location, origin.row)
            found.append((response, torch.tensor(completion.logprobs)))
        return found, written.staleness

    def _scored(
        self,
        written: Sequence[tuple[Response, Tensor]],
        staleness: int,
        iteration: int | None,
        reward_iteration: int | None,
    ) -> list[Rollout]:
        responses = [response for response, _ in written]
        with self._timed("reward_seconds"):
            scored = self._with_scores(responses, reward_iteration)
        with self._timed("forward_seconds"):
            passes = self._passes(responses, iteration)
        return [
            Rollout(
                each.response,
                each.score,
                each.parts,
                engine_logprobs=engine_logprobs,
                staleness=staleness,
                **{name: column[index] for name, column in passes.items()},
            )
            for index, (each, (_, engine_logprobs)) in enumerate(zip(scored, written, strict=True))
        ]

    def _with_scores(self, responses: Sequence[Response], iteration: int | None = None) -> list[ScoredResponse]:
        scores = {"total": [0.0] * len(responses)}
        if self.rewards is not None:
            scores = self.rewards(responses, iteration=iteration)
        parts = [name for name in scores if name != "total"]
        return [
            ScoredResponse(response, scores["total"][index], {name: scores[name][index] for name in parts})
            for index, response in enumerate(responses)
        ]

    @torch.no_grad()
    def _passes(self, responses: Sequence[Response], iteration: int | None) -> dict[str, list[Tensor]]:
        """Name → `[L]` of each response, by forward passes like those of training."""
        assert self.roles is not None, "rollouts have roles"
        prompts, ids = [r.prompt_ids for r in responses], [r.ids for r in responses]
        rows = ResponseRows(prompts, ids, self.device, share_prompts=self._shared_prompts)
        found: dict[str, list[Tensor]] = {}
        first = None
        if self._reused is not None and iteration is not None:
            first = self._reused.batch(rows, iteration)
        for batch in in_order(rows.by_group(), tokens=_TOKENS) if first is None else [first]:
            arguments = (batch.ids, batch.layout, batch.positions, batch.targets)
            with torch.set_grad_enabled(batch is first):
                outputs = self.roles.actor_critic(*arguments)
            if self._reused is not None and batch is first:
                self._reused.keep(batch, outputs)
            columns = dict(zip(("logprobs", "entropies", "values"), outputs, strict=True))
            columns["reference_logprobs"] = self.roles.reference(*arguments) if self.roles.reference else None
            lengths = [len(responses[row].ids) for row in batch.rows]
            for name, column in columns.items():
                if column is None:
                    continue
                found.setdefault(name, [torch.empty(0)] * len(responses))
                for row, part in zip(batch.rows, torch.split(column.detach().float().cpu(), lengths), strict=True):
                    found[name][row] = part
        return found


def sampling_of(section: ResponseSection, *, stop_token_ids: Collection[int], seed: int) -> SamplingParams:
    """The sampling settings and stop criteria of responses."""
    return SamplingParams(
        temperature=section.temperature,
        top_k=section.top_k or 0,
        top_p=section.top_p,
        max_new_tokens=section.max_new_tokens,
        stop=tuple(section.stop),
        keep_stop=True,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        seed=seed,
    )


def request_of(prompts: Sequence[Sequence[int]], sampling: SamplingParams, n: int = 1) -> Request:
    """A request for n responses to every prompt. Each position has its own seed, on whichever worker it runs."""
    return Request([list(prompt) for prompt in prompts], [seeded(sampling, index) for index in range(len(prompts))], n)


def seeded(sampling: SamplingParams, number: int) -> SamplingParams:
    """The settings with a different seed for each number, such as an iteration."""
    return replace(sampling, seed=(sampling.seed * 1_000_003 + number) % 2**31)


def _importance(rollouts: Sequence[Rollout], mismatch: Tensor, cap: float | None) -> dict[str, float]:
    """Staleness, if there is any, and importance weights, if they are used."""
    staleness = statistics.fmean(rollout.staleness for rollout in rollouts)
    metrics = {"staleness": staleness} if staleness else {}
    if cap is not None:
        metrics["importance_weight"] = float(mismatch.exp().clamp(max=cap).mean())
        metrics["importance_truncated"] = float((mismatch > math.log(cap)).float().mean())
    return metrics


def _kl_mean(rollouts: Sequence[Rollout], estimator: KlEstimator) -> dict[str, float]:
    """{"kl": mean}; empty without a reference."""
    found = [kl for rollout in rollouts if (kl := rollout.kl(estimator)) is not None]
    return {"kl": statistics.fmean(found)} if found else {}


def rollout_metrics(
    rollouts: Sequence[Rollout],
    *,
    estimator: KlEstimator,
    importance_cap: float | None = None,
    is_rewarded: bool = True,
) -> dict[str, float]:
    """Metrics of an iteration, as docs/metrics.md defines them; kl in nats per response, entropy in nats per token.
    is_rewarded: whether the scores are rewards. Raises `NonFiniteOutputs`.
    """
    mismatch = torch.cat([each.logprobs - each.engine_logprobs for each in rollouts])
    metrics = {
        **answer_metrics(rollouts, is_rewarded=is_rewarded),
        **_kl_mean(rollouts, estimator),
        "entropy": float(torch.cat([rollout.entropies for rollout in rollouts]).mean()),
        "logprob_mismatch": float(mismatch.abs().mean()),
        **_importance(rollouts, mismatch, importance_cap),
    }
    _require_finite(metrics, len(rollouts), is_rewarded=is_rewarded)
    return metrics


def answer_metrics(answers: Sequence[Rollout | ScoredResponse], *, is_rewarded: bool = True) -> dict[str, float]:
    """Metrics of responses and their scores, as docs/metrics.md defines them. is_rewarded: whether the scores are
    rewards. Raises `NonFiniteOutputs`.
    """
    tokens = [answer.response.ids for answer in answers]
    metrics = {
        **(reward_metrics(answers) if is_rewarded else {}),
        "response_length": length_mean(tokens),
        "eos_rate": statistics.fmean(answer.response.ended for answer in answers),
        "repetition": repetition(tokens),
    }
    distinct = distinct_n(tokens, 2)
    if distinct is not None:
        metrics["distinct_2"] = distinct
    _require_finite(metrics, len(answers), is_rewarded=is_rewarded)
    return metrics


def rollout_records(rollouts: Sequence[Rollout], advantages: Tensor, iteration: int) -> list[dict[str, Any]]:
    """One record per rollout, for rollouts.jsonl. advantages: of all their tokens, one rollout after another, `[M]`;
    a record has the mean over the rollout's tokens.
    """
    each = torch.split(advantages, [len(rollout.response.ids) for rollout in rollouts])
    return [
        {
            "iteration": iteration,
            "prompt": rollout.response.prompt,
            "response": rollout.response.text,
            "ended": rollout.response.ended,
            "tokens": len(rollout.response.ids),
            "reward": rollout.score,
            **{f"score_{name}": score for name, score in rollout.parts.items()},
            "advantage": float(own.mean()),
        }
        for rollout, own in zip(rollouts, each, strict=True)
    ]


def _require_finite(metrics: Mapping[str, float], number: int, *, is_rewarded: bool) -> None:
    """Raises `NonFiniteOutputs` for metrics of `number` responses that are not finite."""
    unusable = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if unusable:
        named = ", ".join(f"{name} is {value}" for name, value in unusable.items())
        raise NonFiniteOutputs(
            f"metrics of {number} responses are not finite: {named}; lower training.learning_rate"
            + (", or bound the rewards with reward.score_clip" if is_rewarded else "")
        )


def variance_explained(values: Tensor | None, returns: Tensor | None) -> dict[str, float]:
    """{"explained_variance": 1 − Var(R − V) / Var(R)}; empty for constant returns, and without a critic."""
    if values is None or returns is None:
        return {}
    found = explained_variance(values.numpy(), returns.numpy())
    return {} if found is None else {"explained_variance": found}


Judge = Callable[[Sequence[Response]], list[float]]


def best_of_n(
    answers: Sequence[Sequence[Response]], score: Judge, numbers: Sequence[int], judge: Judge | None
) -> list[dict[str, Any]]:
    """Best-of-n by reward, for each n in `numbers`: `kl`; `reward`, the unbiased expected score of the best of n;
    `judge`, the judge's mean score of the best of each prompt's first n. answers: for every prompt at least as many
    responses as the largest n.
    """
    flat = [response for responses in answers for response in responses]
    scores = iter(score(flat))
    scored = [(responses, [next(scores) for _ in responses]) for responses in answers]
    # A prompt counts with all its answers, or not at all.
    scored = [(responses, row) for responses, row in scored if len(judged(row)) == len(row)]
    answers, table = [responses for responses, _ in scored], [row for _, row in scored]
    found: list[dict[str, Any]] = []
    for n in numbers if table else ():
        metrics: dict[str, Any] = {"n": n, "kl": best_of_n_kl(n), "reward": best_of_n_expected(table, n)}
        if judge is not None:
            chosen = [
                responses[max(range(n), key=lambda index, scored=scored: scored[index])]  # type: ignore[misc]
                for responses, scored in zip(answers, table, strict=True)
            ]
            metrics["judge"] = statistics.fmean(judge(chosen))
        found.append(metrics)
    return found


def passing_metrics(scores: Sequence[float], number: int) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, … and `number` (Chen et al. 2021, equation 1), of `number` scores to each prompt, one
    prompt after another; empty unless every score is 0 or 1.
    """
    if not set(scores) <= {0.0, 1.0}:
        return {}
    right = [int(sum(scores[start : start + number])) for start in range(0, len(scores), number)]
    powers = {2**exponent for exponent in range(number.bit_length())}
    numbers = sorted({*powers, number})
    return {f"pass@{k}": statistics.fmean(pass_at_k(number, each, k) for each in right) for k in numbers}


class PolicyCheck:
    """Measures the policy on the same prompts with the same seeds each time."""

    def __init__(
        self,
        collector: Collector,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        judge: Judge | None,
        *,
        estimator: KlEstimator,
        kl_limit: float | None,
        responses: int = 1,
    ) -> None:
        """kl_limit: nats per response above which "reward_within_kl" is −inf. responses: to each prompt."""
        self.responses = responses
        self.collector, self.prompts, self.sampling, self.judge = collector, prompts, sampling, judge
        self.estimator, self.kl_limit = estimator, kl_limit
        self._first: dict[str, list[float]] = {}

    def measure(self, *, is_start: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and one record per prompt, the same on every rank. "judge": the judge's mean score. "win_rate": the
        fraction of prompts whose response the judge scores higher than the response before training, with its 95%
        interval "win_rate_low" to "win_rate_high"; ties count half. "reward_win_rate": the same by reward. is_start:
        store these responses as the baseline; without a baseline there are no win rates. With several responses to a
        prompt, judge, win rates and records are of the first one.
        """
        every = self.collector(
            request_of([each for each in self.prompts for _ in range(self.responses)], self.sampling)
        )
        rollouts = every[:: self.responses]
        is_rewarded = self.collector.rewards is not None
        metrics = rollout_metrics(every, estimator=self.estimator, is_rewarded=is_rewarded)
        if self.responses > 1 and is_rewarded:
            metrics |= passing_metrics([rollout.score for rollout in every], self.responses)
        if self.kl_limit is not None:
            metrics["reward_within_kl"] = metrics["reward"] if metrics["kl"] <= self.kl_limit else -math.inf
        scores = {"reward": [rollout.score for rollout in rollouts]} if is_rewarded else {}
        if self.judge is not None:
            scores["judge"] = self.judge([rollout.response for rollout in rollouts])
            metrics["judge"] = statistics.fmean(scores["judge"])
        if self._first:
            if is_rewarded and (won := _won(scores["reward"], self._first["reward"])) is not None:
                metrics["reward_win_rate"] = won.rate
            if self.judge is not None and (won := _won(scores["judge"], self._first["judge"])) is not None:
                metrics |= {"win_rate": won.rate, "win_rate_low": won.low, "win_rate_high": won.high}
        if is_start:
            self._first = scores
        records = [
            {
                "prompt": rollout.response.prompt,
                "response": rollout.response.text,
                "ended": rollout.response.ended,
                **({"kl": kl} if (kl := rollout.kl(self.estimator)) is not None else {}),
                **{name: _or_null(values[index]) for name, values in scores.items()},
            }
            for index, rollout in enumerate(rollouts)
        ]
        return metrics, records

    def best_of_n(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """`best_of_n` on these prompts with the current policy, always including n = 1; empty for no numbers."""
        if not numbers:
            return []
        every = sorted({1, *numbers})
        rewards = self.collector.rewards
        assert rewards is not None, "the best of n is chosen by rewards"
        answers = self.collector.answers(request_of(self.prompts, self.sampling, every[-1]))
        return best_of_n(answers, lambda responses: rewards(responses)["total"], every, self.judge)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: the scores of the responses before training."""
        return {"first": {name: [*map(_or_null, scores)] for name, scores in self._first.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores `state`."""
        first = state["first"].items()
        self._first = {name: [math.nan if each is None else each for each in scores] for name, scores in first}


def _won(ours: Sequence[float], baseline: Sequence[float]) -> WinRate | None:
    """The win rate over the prompts that both were judged on; None without any."""
    pairs = [pair for pair in zip(ours, baseline, strict=True) if len(judged(pair)) == 2]
    return win_rate(*zip(*pairs, strict=True)) if pairs else None


def _or_null(score: float) -> float | None:
    return None if math.isnan(score) else score
