"""Collects rollouts: generates responses to prompts, scores them, and computes log-probabilities and values.

Each process generates and scores its part of the prompts; all processes receive all rollouts.
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
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.policy_metrics import (
    distinct_n,
    explained_variance,
    length_mean,
    repetition,
)
from loopos.functional.advantages import KlEstimator, kl_terms
from loopos.generation.completions import decoded
from loopos.generation.settings import SamplingParams
from loopos.rl.episodes import Episode, EpisodeCompletion, episode_metrics
from loopos.rl.experience import ResponseRows, ReusedForward
from loopos.rl.reward_metrics import reward_metrics
from loopos.rl.rewards import Response, Rewards
from loopos.rl.roles import ActorCritic, Reference
from loopos.rl.workers.protocol import Request, RolloutEngine, Task

# Tokens per forward pass without gradients.
_TOKENS = 2048


@dataclass(frozen=True)
class Rollout:
    """One response. `score`: Σ of the weighted rewards, 0 without any, NaN where none judged; `parts`: its terms. `[L]`
    on CPU: `engine_logprobs` (from generation); of a forward pass `logprobs` (current policy) and `entropies` (nats),
    None where there was none; and `reference_logprobs` and `values` where the run has a reference and a critic.
    `staleness`: number of iterations by which the generating policy is older. L counts the tokens that the model wrote.
    """

    response: Response
    score: float
    parts: dict[str, float]
    engine_logprobs: Tensor
    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    staleness: int = 0

    def kl(self, estimator: KlEstimator) -> float | None:
        """KL from the generating policy to the reference, in nats, summed over tokens; None without a reference."""
        if self.reference_logprobs is None:
            return None
        wrote = self.engine_logprobs if self.staleness or self.logprobs is None else self.logprobs
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
        reads_forward: bool = True,
        gather: Callable[[object], list[object]] = lambda value: [value],
    ) -> None:
        """roles: None where only `answers` and `scored_answers` are called. rewards: None where only a judge scores.
        origins: prompt ids → the prompt's text and source; without it the text is decoded from the ids. reused: stores
        the forward pass over an iteration's responses for its first optimizer step. share_prompts: as in
        `ResponseRows`. reads_forward: whether an iteration's responses need a forward pass that is not reused.
        gather(value): the values of all ranks; the engine generates only this rank's part.
        """
        self.engine, self.roles, self.rewards, self.device = engine, roles, rewards, device
        self._origins, self._reused, self._gather = origins, reused, gather
        self._shared_prompts, self._reads_forward = share_prompts, reads_forward
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
            if isinstance(completion, EpisodeCompletion):
                assert request.tasks is not None, "episodes are of tasks"
                found.append(_played(completion.episode, request.tasks[completion.prompt_index]))
                continue
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
            passes = self._passes(responses, iteration, is_training=reward_iteration is not None)
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
    def _passes(
        self, responses: Sequence[Response], iteration: int | None, *, is_training: bool
    ) -> dict[str, list[Tensor]]:
        """Name → `[L]` of each response, by forward passes like those of training."""
        assert self.roles is not None, "rollouts have roles"
        prompts, ids = [r.prompt_ids for r in responses], [r.ids for r in responses]
        masks = None
        if any(r.mask is not None for r in responses):
            masks = [r.mask or [True] * len(r.ids) for r in responses]
        rows = ResponseRows(prompts, ids, self.device, share_prompts=self._shared_prompts, masks=masks)
        found: dict[str, list[Tensor]] = {}
        first = None
        if self._reused is not None and iteration is not None:
            first = self._reused.batch(rows, iteration)
        if first is None and is_training and not self._reads_forward:
            return found
        for batch in in_order(rows.by_group(), tokens=_TOKENS) if first is None else [first]:
            arguments = (batch.ids, batch.layout, batch.positions, batch.targets)
            with torch.set_grad_enabled(batch is first):
                outputs = self.roles.actor_critic(*arguments)
            if self._reused is not None and batch is first:
                self._reused.keep(batch, outputs)
            columns = dict(zip(("logprobs", "entropies", "values"), outputs, strict=True))
            columns["reference_logprobs"] = self.roles.reference(*arguments) if self.roles.reference else None
            for name, column in columns.items():
                if column is None:
                    continue
                found.setdefault(name, [torch.empty(0)] * len(responses))
                for row, part in zip(
                    batch.rows, torch.split(column.detach().float().cpu(), list(batch.lengths)), strict=True
                ):
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


def request_of(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams, n: int = 1, *, tasks: Sequence[Task] | None = None
) -> Request:
    """A request for n responses to every prompt. Each position has its own seed, on whichever worker it runs. tasks: of
    each prompt, for an environment.
    """
    settings = [seeded(sampling, index) for index in range(len(prompts))]
    return Request([list(prompt) for prompt in prompts], settings, n, None if tasks is None else list(tasks))


def _played(episode: Episode, task: Task) -> tuple[Response, Tensor]:
    """An episode as a response, with the log-probabilities of the tokens that the model wrote."""
    prompt = episode.messages[episode.num_prompt_messages - 1].content
    response = Response(
        prompt, episode.prompt_ids, episode.text, episode.ids, episode.ended, task.source, task.row, episode=episode
    )
    wrote = [value for value, is_written in zip(episode.logprobs, episode.mask, strict=True) if is_written]
    return response, torch.tensor(wrote)


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
    metrics = {
        **answer_metrics(rollouts, is_rewarded=is_rewarded),
        **_kl_mean(rollouts, estimator),
        **_forward_metrics(rollouts, importance_cap),
    }
    _require_finite(metrics, len(rollouts), is_rewarded=is_rewarded)
    return metrics


def _forward_metrics(rollouts: Sequence[Rollout], importance_cap: float | None) -> dict[str, float]:
    """What a forward pass over the responses measures; empty where there was none."""
    entropies = [each.entropies for each in rollouts if each.entropies is not None]
    pairs = [(each.logprobs, each.engine_logprobs) for each in rollouts if each.logprobs is not None]
    if not pairs:
        return {}
    mismatch = torch.cat([logprobs - by_engine for logprobs, by_engine in pairs])
    return {
        "entropy": float(torch.cat(entropies).mean()),
        "logprob_mismatch": float(mismatch.abs().mean()),
        **_importance(rollouts, mismatch, importance_cap),
    }


def answer_metrics(answers: Sequence[Rollout | ScoredResponse], *, is_rewarded: bool = True) -> dict[str, float]:
    """Metrics of responses and their scores, as docs/metrics.md defines them. is_rewarded: whether the scores are
    rewards. Raises `NonFiniteOutputs`.
    """
    tokens = [answer.response.written for answer in answers]
    episodes = [answer.response.episode for answer in answers if answer.response.episode is not None]
    metrics = {
        **(reward_metrics(answers) if is_rewarded else {}),
        "response_length": length_mean(tokens),
        "eos_rate": statistics.fmean(answer.response.ended for answer in answers),
        "repetition": repetition(tokens),
        **(episode_metrics(episodes) if episodes else {}),
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
    each = torch.split(advantages, [rollout.response.num_tokens for rollout in rollouts])
    return [
        {
            "iteration": iteration,
            "prompt": rollout.response.prompt,
            "response": rollout.response.text,
            "ended": rollout.response.ended,
            **conversation(rollout.response),
            "tokens": rollout.response.num_tokens,
            "reward": rollout.score,
            **{f"score_{name}": score for name, score in rollout.parts.items()},
            "advantage": float(own.mean()),
        }
        for rollout, own in zip(rollouts, each, strict=True)
    ]


def conversation(response: Response) -> dict[str, Any]:
    """What the model and the tools said after the prompt, in an episode."""
    episode = response.episode
    if episode is None:
        return {}
    messages = [message.as_template() for message in episode.messages[episode.num_prompt_messages :]]
    return {"messages": messages, "finish_reason": episode.finish_reason, "tool_tokens": episode.mask.count(False)}


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
