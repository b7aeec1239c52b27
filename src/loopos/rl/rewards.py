"""The reward of a response: the weighted sum of a reward model's score and of reward functions.

Functions are user code and run only if the config names them. `functional.advantages` adds penalties per token.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.own_function import OwnFunction, own_function
from loopos.config.reward_options import GIVEN, check_options, parameter_names, takes_rows
from loopos.config.rewards import PpoRewardSection
from loopos.config.rl import RolloutSection
from loopos.config.variants import REWARDS
from loopos.data.stepwise_tokens import StepwiseRows, encode_steps
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.own_code import called_for, numbers_of
from loopos.evaluation.process_rewards import Process, process_of, step_scores
from loopos.evaluation.reward_predictor import Normalization, raw_scores
from loopos.functional.advantages import overlong_penalty
from loopos.models.folders import RewardEnsemble, check_same_tokens, open_reward_model
from loopos.models.heads import PooledModel
from loopos.rl.episodes import Episode
from loopos.rl.reward_functions import NotOfARow, Scores

FRACTION = "fraction_"
"""Begins the names of parts that are no scores, but 1 where something holds of a response."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response to one prompt. `prompt_ids`: ids after the chat template. `ended`: by an end token or stop string,
    not by the token limit. `source`: file and line of the prompt, empty if unknown. `row`: column → value of the row of
    data that the prompt comes from. `episode`: what was played, where an environment is: then `ids` also has the tokens
    of tools, and `text` is the model's last message.
    """

    prompt: str
    prompt_ids: Sequence[int]
    text: str
    ids: Sequence[int]
    ended: bool
    source: str = ""
    row: Mapping[str, object] = field(default_factory=dict)
    token_count: int | None = None
    episode: Episode | None = None

    @property
    def mask(self) -> list[bool] | None:
        """Which of `ids` the model wrote; None for all."""
        return None if self.episode is None else self.episode.mask

    @property
    def written(self) -> Sequence[int]:
        """The tokens that the model wrote."""
        if self.mask is None:
            return self.ids
        return [token for token, is_written in zip(self.ids, self.mask, strict=True) if is_written]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model wrote; `token_count` where they are not kept."""
        return len(self.written) if self.token_count is None else self.token_count

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The messages of the episode, those of its prompt included; None without an environment."""
        return None if self.episode is None else [message.as_template() for message in self.episode.messages]


@dataclass(frozen=True, slots=True)
class RewardRun:
    """The run that rewards score for. `folder`: where a reward may keep what it must not compute twice; None outside a
    run. `iterations`: of the whole run, over which weights change. `label`: of the one reward that gets this.
    """

    folder: Path | None = None
    rank: int = 0
    iterations: int = 1
    label: str = ""


ENVIRONMENT = "environment"
"""Names the part of a score that is the environment's own reward."""
UNJUDGED = math.nan
"""The score of a response that a reward did not judge."""


class RewardFunction:
    """Responses → a number each, or None where the function did not judge."""

    def __init__(
        self,
        function: OwnFunction,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
        timeout: float | None = None,
        on_timeout: Literal["unjudged", "error"] = "unjudged",
        run: RewardRun | None = None,
    ) -> None:
        """timeout: of a call, in seconds. Raises `UserError` for options that the function does not have."""
        for problem in check_options(function.function, options):
            hint = f"; {problem.hint}" if problem.hint else ""
            raise function.error(f"options.{problem.name}: got {problem.actual}; expected {problem.expected}{hint}")
        if isinstance(function.function, type):
            made = function(**options, about="its options")
            if hasattr(made, "open_run"):
                made.open_run(run or RewardRun())
            function, options = OwnFunction(function.label, made), {}
        self.function, self.options, self.timeout, self.on_timeout = function, options, timeout, on_timeout
        self.takes_rows = takes_rows(function.function)
        self._given = [name for name in GIVEN if name in parameter_names(function.function)]

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        """The numbers, checked. Raises `UserError`."""
        return [*self.scores(responses).values]

    def scores(self, responses: Sequence[Response]) -> Scores:
        """The numbers, checked, and fractions; exceptions are reported with the row of the call. Raises `UserError`."""
        if not responses:
            return Scores([])
        sources = [called_for(response.prompt, response.source) for response in responses]
        about = f"{len(responses)} responses, the first to {sources[0]}"
        try:
            found = self._called(responses, about)
        except (MissingRequirement, NotOfARow):
            raise
        except UserError:
            # Call the function for each row separately, to find the row that fails.
            for response, source in zip(responses, sources, strict=True):
                self._one_row(response, source)
            raise
        if found is _TIMED_OUT:
            if self.on_timeout == "error":
                raise self.function.error(f"ran for more than {self.timeout:g} s (timeout)\n    for {about}")
            return Scores([None] * len(responses), {"timeout": [True] * len(responses)})
        fractions = found.fractions if isinstance(found, Scores) else {}
        values = numbers_of(found.values if isinstance(found, Scores) else found, sources, self.function)
        return Scores(values, fractions)

    def _one_row(self, response: Response, source: str) -> None:
        try:
            self._called([response], source)
        except UserError as problem:
            if source in str(problem):
                raise
            raise UserError(f"{problem}\n    for {source}") from problem

    def _called(self, responses: Sequence[Response], about: str) -> Any:
        """What the function returns, or `_TIMED_OUT`."""
        arguments: list[Any] = [[each.prompt for each in responses], [each.text for each in responses]]
        if self.takes_rows:
            arguments.append([dict(each.row) for each in responses])
        named = {**self.options, **{name: [getattr(each, name) for each in responses] for name in self._given}}

        def call() -> Any:
            returned = self.function(*arguments, about=about, **named)
            if not inspect.isawaitable(returned):
                return returned
            awaited = OwnFunction(self.function.label, lambda: asyncio.run(_awaited(returned, self.timeout)))
            return awaited(about=about)

        if self.timeout is None and not inspect.iscoroutinefunction(self.function.function):
            return call()
        return _in_thread(call, self.timeout)


_TIMED_OUT: Any = object()


async def _awaited(returned: Awaitable[Any], timeout: float | None) -> Any:
    """The result of a coroutine, which is cancelled at the limit."""
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await returned
    except TimeoutError:
        # One that the user's own code raised is an error of it.
        if limit.expired():
            return _TIMED_OUT
        raise


def _in_thread(call: Callable[[], Any], timeout: float | None) -> Any:
    """The result of a call in a thread of its own, where no event loop runs. At the limit the thread is left behind:
    Python cannot end one.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except UserError as problem:
            future.set_exception(problem)

    thread = Thread(target=run, daemon=True, name="reward")
    thread.start()
    # A coroutine ends itself at the limit.
    thread.join(None if timeout is None else timeout + 0.05)
    if thread.is_alive():
        return _TIMED_OUT
    if not future.done():
        raise UserError("a reward function ended its thread; expected that it returns")
    return future.result()


def reward_function(
    name: str,
    *,
    options: Mapping[str, Any] = MappingProxyType({}),
    timeout: float | None = None,
    on_timeout: Literal["unjudged", "error"] = "unjudged",
    run: RewardRun | None = None,
) -> RewardFunction:
    """The function of the table, or "module:function", called as `function(prompts, responses)`, or as
    `function(prompts, responses, rows)` where it has a third parameter. Raises `UserError`.
    """
    if ":" in name:
        function = own_function(name, "reward function")
    else:
        function = OwnFunction(f"reward function {name}", REWARDS[name].load())
    return RewardFunction(function, options=options, timeout=timeout, on_timeout=on_timeout, run=run)


class ModelScores:
    """Normalized scores of a reward model: the mean over its heads minus `ensemble_penalty` times their standard
    deviation. Of a process reward model the probability that its steps give, which is not normalized.
    """

    def __init__(
        self,
        model: PooledModel | RewardEnsemble,
        description: Mapping[str, Any],
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ensemble_penalty: float = 0.0,
    ) -> None:
        """tokenizer: of policy and reward model; splits the texts of responses for a process reward model."""
        self.model, self.device, self.tokenizer, self.ensemble_penalty = model, device, tokenizer, ensemble_penalty
        self.normalization, self.process = Normalization.read(description), process_of(description)

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        if self.process is not None:
            return self._of_steps(self.process, responses)
        rows = [[*response.prompt_ids, *response.ids] for response in responses]
        raw = raw_scores(self.model, rows, self.device)
        scores: list[float] = self.normalization(raw, ensemble_penalty=self.ensemble_penalty).tolist()
        return scores

    def _of_steps(self, process: Process, responses: Sequence[Response]) -> list[float]:
        """The score that the steps of each response give."""
        answers = [(response.prompt_ids, process.steps_of(response.text)) for response in responses]
        encoded = encode_steps(self.tokenizer, answers, separator=process.step_separator)
        raw = step_scores(self.model, StepwiseRows(encoded, self.device))
        heads = [torch.tensor(raw[index]) for index in range(len(encoded))]
        penalty = self.ensemble_penalty
        return [process.score(self.normalization(each, ensemble_penalty=penalty).tolist()) for each in heads]


class Rewards:
    """Σ weight · score of the reward model and the functions that judged, minus the penalties for a missing end token
    and for a response near the longest, clipped to ±`score_clip`; `UNJUDGED` where none did. As in TRL, the others keep
    their weights where one did not judge.
    """

    def __init__(
        self,
        model: ModelScores | None,
        section: PpoRewardSection,
        rollout: RolloutSection,
        run: RewardRun | None = None,
        *,
        environment_weight: float | None = None,
    ) -> None:
        """environment_weight: of the environment's own reward, if it has one. Raises `UserError` for a function that
        does not exist, and for options that it does not have.
        """
        self.environment_weight = environment_weight
        self.model, self.section, self.run = model, section, run or RewardRun()
        self.missing_end_penalty = rollout.missing_end_penalty or 0.0
        self.max_new_tokens, self.overlong_tokens = rollout.max_new_tokens, rollout.overlong_tokens
        self.overlong_weight = rollout.overlong_penalty
        self.functions = {
            each.key: reward_function(
                each.name,
                options=each.options,
                timeout=each.timeout,
                on_timeout=each.on_timeout,
                run=replace(self.run, label=each.key),
            )
            for each in section.functions
        }

    @classmethod
    def of(
        cls,
        model: PooledModel | RewardEnsemble | None,
        description: Mapping[str, Any],
        section: PpoRewardSection,
        rollout: RolloutSection,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase,
        run: RewardRun | None = None,
        *,
        environment_weight: float | None = None,
    ) -> Rewards:
        """With a reward model, whose folder's description says how to read its scores; None = only functions.
        environment_weight: as for the constructor.
        """
        scores = None
        if model is not None:
            scores = ModelScores(model, description, device, tokenizer, ensemble_penalty=section.ensemble_penalty)
        return cls(scores, section, rollout, run, environment_weight=environment_weight)

    @property
    def read_rows(self) -> bool:
        """Whether any function gets the rows of data."""
        return any(function.takes_rows for function in self.functions.values())

    def weights(self, iteration: int | None) -> dict[str, float]:
        """The weight of each function in an iteration, w + (w_end − w)·i/(I − 1); the last ones without an iteration,
        so that validations are compared by one measure.
        """
        last = self.run.iterations - 1
        part = 1.0 if iteration is None or last < 1 else min(iteration / last, 1.0)
        found = {}
        for each in self.section.functions:
            end = each.weight if each.weight_end is None else each.weight_end
            found[each.key] = each.weight + (end - each.weight) * part
        return found

    def __call__(self, responses: Sequence[Response], *, iteration: int | None = None) -> dict[str, list[float]]:
        """`total`, and its unweighted parts by name: `model` (normalized) and each function, `UNJUDGED` where it did
        not judge; and `fraction_NAME_…`, 1 or 0, what functions report. iteration: of training. Raises `UserError`,
        `NonFiniteOutputs`.
        """
        if not responses:
            return {"total": []}
        parts: dict[str, list[float]] = {}
        fractions: dict[str, list[float]] = {}
        weights = {"model": self.section.model_weight, **self.weights(iteration)}
        if self.environment_weight is not None:
            weights[ENVIRONMENT] = self.environment_weight
            parts[ENVIRONMENT] = [_of_episode(response) for response in responses]
        if self.model is not None:
            parts["model"] = self.model(responses)
            if not all(map(math.isfinite, parts["model"])):
                raise NonFiniteOutputs("the reward model's scores are not finite; use precision fp32")
        for name, function in self.functions.items():
            found = function.scores(responses)
            parts[name] = [UNJUDGED if value is None else value for value in found.values]
            for what, holds in found.fractions.items():
                fractions[f"{FRACTION}{name}_{what}"] = [float(each) for each in holds]
        totals = []
        for index, response in enumerate(responses):
            judged = [weights[name] * part[index] for name, part in parts.items() if not math.isnan(part[index])]
            totals.append(self._bounded(sum(judged), response) if judged else UNJUDGED)
        return {"total": totals, **parts, **fractions}

    def state(self) -> dict[str, Any]:
        """The state of this rank's functions that have one, for a checkpoint."""
        made = {name: function.function.function for name, function in self.functions.items()}
        return {
            "rank": self.run.rank,
            "functions": {name: each.state() for name, each in made.items() if hasattr(each, "state")},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores this rank's part of the states of all `ranks`."""
        own = [each["functions"] for each in state["ranks"] if each["rank"] == self.run.rank]
        for name, found in own[0].items() if own else ():
            made: Any = self.functions[name].function.function if name in self.functions else None
            if hasattr(made, "load"):
                made.load(found)

    def _bounded(self, total: float, response: Response) -> float:
        total -= 0.0 if response.ended else self.missing_end_penalty
        if self.overlong_tokens:
            longest, buffer = self.max_new_tokens, self.overlong_tokens
            total -= self.overlong_weight * overlong_penalty(response.num_tokens, longest=longest, buffer=buffer)
        bound = self.section.score_clip
        return total if bound is None else min(max(total, -bound), bound)


def _of_episode(response: Response) -> float:
    reward = None if response.episode is None else response.episode.reward
    return UNJUDGED if reward is None else reward


def judge_of(
    name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, is_function: bool
) -> Callable[[Sequence[Response]], list[float]]:
    """A judge that training does not use: a function "module:function", or the folder of another reward model, which
    must have the same tokenizer. Raises `UserError`.
    """
    if not is_function:
        opened = open_reward_model(name)
        check_same_tokens(tokenizer, opened.tokenizer, "evaluation.judge")
        return ModelScores(opened.model.requires_grad_(False).to(device), opened.description, device, tokenizer)
    function = reward_function(name)

    def judged(responses: Sequence[Response]) -> list[float]:
        found = []
        for response, score in zip(responses, function(responses), strict=True):
            if score is None:
                about = called_for(response.prompt, response.source)
                raise function.function.error(f"returned None; a judge scores every response\n    for {about}")
            found.append(score)
        return found

    return judged
