"""The reward of a response: the weighted sum of a reward model's score and of reward functions.

Functions are user code and run only if the config names them. `functional.advantages` adds penalties per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.own_function import OwnFunction, own_function
from loopos.config.rl import PpoRewardSection, RolloutSection
from loopos.config.variants import REWARDS
from loopos.data.stepwise_tokens import StepwiseRows, encode_steps
from loopos.evaluation.checkers import checker
from loopos.evaluation.own_code import called_for, numbers_of
from loopos.evaluation.process_rewards import Process, process_of, step_scores
from loopos.evaluation.reward_predictor import Normalization, raw_scores
from loopos.functional.advantages import overlong_penalty
from loopos.models.folders import RewardEnsemble, check_same_tokens, open_reward_model
from loopos.models.heads import PooledModel


@dataclass(frozen=True, slots=True)
class Response:
    """One response to one prompt. `prompt_ids`: ids after the chat template. `ended`: by an end token or stop string,
    not by the token limit. `source`: file and line of the prompt, empty if unknown. `row`: column → value of the row of
    data that the prompt comes from.
    """

    prompt: str
    prompt_ids: Sequence[int]
    text: str
    ids: Sequence[int]
    ended: bool
    source: str = ""
    row: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """Responses → a number each. `takes_rows`: whether the function gets the rows of data."""

    function: OwnFunction
    takes_rows: bool

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        """The numbers, checked; exceptions are reported with the row of the call. Raises `UserError`."""
        if not responses:
            return []
        sources = [called_for(response.prompt, response.source) for response in responses]
        try:
            found = self._called(responses, f"{len(responses)} responses, the first to {sources[0]}")
        except UserError:
            # Call the function for each row separately, to find the row that fails.
            for response, source in zip(responses, sources, strict=True) if len(responses) > 1 else ():
                self._called([response], source)
            raise
        return numbers_of(found, sources, self.function)

    def _called(self, responses: Sequence[Response], about: str) -> Any:
        prompts, texts = [each.prompt for each in responses], [each.text for each in responses]
        if self.takes_rows:
            return self.function(prompts, texts, [dict(each.row) for each in responses], about=about)
        return self.function(prompts, texts, about=about)


def reward_function(name: str) -> RewardFunction:
    """The function of the table, or "module:function", called as `function(prompts, responses)`, or as
    `function(prompts, responses, rows)` where it has a third parameter. Raises `UserError`.
    """
    if ":" in name:
        function = own_function(name, "reward function")
    else:
        function = OwnFunction(f"reward function {name}", REWARDS[name].load())
    return RewardFunction(function, takes_rows(function.function))


def takes_rows(function: Callable[..., Any]) -> bool:
    """Whether a function has a third parameter by position: one without a default, or one called `rows`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        # A function of C without a signature.
        return False
    by_position = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return len(by_position) > 2 and (by_position[2].default is inspect.Parameter.empty or by_position[2].name == "rows")


Rows: TypeAlias = Sequence[Mapping[str, object]]


def _answers_checked(name: str, responses: Sequence[str], rows: Rows) -> list[float]:
    """The verdict of a checker on each response, against the column `answer` of its row."""
    check, found = checker(name), []
    for response, row in zip(responses, rows, strict=True):
        column = next((each for each in row if each.lower() == "answer"), None)
        if column is None:
            known = ", ".join(row) or "none"
            raise UserError(f'reward function {name}: got a row without a column "answer" (columns: {known})')
        found.append(check(response, str(row[column]), row))
    return found


def automatic_answer(prompts: Sequence[str], responses: Sequence[str], rows: Rows) -> list[float]:
    """1 where the response is the row's answer, compared as a number, as a letter or as text by what the answer is."""
    return _answers_checked("auto", responses, rows)


def exact_answer(prompts: Sequence[str], responses: Sequence[str], rows: Rows) -> list[float]:
    """1 where the response is the row's answer as text, without regard to case, spaces and quotes."""
    return _answers_checked("exact", responses, rows)


def numeric_answer(prompts: Sequence[str], responses: Sequence[str], rows: Rows) -> list[float]:
    """1 where the response states the number of the row's answer."""
    return _answers_checked("numeric", responses, rows)


def choice_answer(prompts: Sequence[str], responses: Sequence[str], rows: Rows) -> list[float]:
    """1 where the response chooses the letter of the row's answer."""
    return _answers_checked("choice", responses, rows)


def math_answer(prompts: Sequence[str], responses: Sequence[str], rows: Rows) -> list[float]:
    """1 where the response equals the row's answer as mathematics (package math-verify, extra rewards)."""
    return _answers_checked("math_verify", responses, rows)


def reasoning_gym_answer(prompts: Sequence[str], responses: Sequence[str], rows: Rows) -> list[float]:
    """The score of reasoning-gym's own scorer of the row's task, from 0 to 1 (package reasoning-gym, extra rewards)."""
    return _answers_checked("reasoning_gym", responses, rows)


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
    """Σ weight · score of the reward model and the functions, minus the penalties for a missing end token and for a
    response near the longest, clipped to ±`score_clip`.
    """

    def __init__(self, model: ModelScores | None, section: PpoRewardSection, rollout: RolloutSection) -> None:
        """Raises `UserError` for a function that does not exist."""
        self.model, self.section = model, section
        self.missing_end_penalty = rollout.missing_end_penalty or 0.0
        self.max_new_tokens, self.overlong_tokens = rollout.max_new_tokens, rollout.overlong_tokens
        self.overlong_weight = rollout.overlong_penalty
        self.functions = {each.name: (reward_function(each.name), each.weight) for each in section.functions}

    @classmethod
    def of(
        cls,
        model: PooledModel | RewardEnsemble | None,
        description: Mapping[str, Any],
        section: PpoRewardSection,
        rollout: RolloutSection,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Rewards:
        """With a reward model, whose folder's description says how to read its scores; None = only functions."""
        scores = None
        if model is not None:
            scores = ModelScores(model, description, device, tokenizer, ensemble_penalty=section.ensemble_penalty)
        return cls(scores, section, rollout)

    @property
    def read_rows(self) -> bool:
        """Whether any function gets the rows of data."""
        return any(function.takes_rows for function, _ in self.functions.values())

    def _overlong(self, response: Response) -> float:
        return overlong_penalty(len(response.ids), longest=self.max_new_tokens, buffer=self.overlong_tokens)

    def __call__(self, responses: Sequence[Response]) -> dict[str, list[float]]:
        """`total`, and its unweighted parts by name: `model` (normalized) and each function."""
        if not responses:
            return {"total": []}
        parts: dict[str, list[float]] = {}
        totals = [0.0] * len(responses)
        if self.model is not None:
            parts["model"] = self.model(responses)
            totals = [total + self.section.model_weight * s for total, s in zip(totals, parts["model"], strict=True)]
        for name, (function, weight) in self.functions.items():
            parts[name] = function(responses)
            totals = [total + weight * score for total, score in zip(totals, parts[name], strict=True)]
        totals = [
            total if response.ended else total - self.missing_end_penalty
            for total, response in zip(totals, responses, strict=True)
        ]
        if self.overlong_tokens:
            totals = [
                total - self.overlong_weight * self._overlong(response)
                for total, response in zip(totals, responses, strict=True)
            ]
        bound = self.section.score_clip
        if bound is not None:
            totals = [min(max(total, -bound), bound) for total in totals]
        return {"total": totals, **parts}


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
    return reward_function(name)
