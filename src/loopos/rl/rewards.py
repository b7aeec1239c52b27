"""The reward of a response: the weighted sum of a reward model's score and of reward functions.

Functions are user code and run only if the config names them. `functional.advantages` adds penalties per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.rl import PpoRewardSection, RolloutSection
from loopos.evaluation.own_code import OwnFunction, called_for, numbers_of, own_function
from loopos.evaluation.reward_predictor import Normalization, Scorer, raw_scores
from loopos.models.folders import check_same_tokens, open_reward_model

RewardFunction: TypeAlias = Callable[[Sequence["Response"]], list[float]]
"""Responses → a number each."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response to one prompt. `prompt_ids`: ids after the chat template. `ended`: by an end token or stop string,
    not by the token limit. `source`: file and line of the prompt, empty if unknown.
    """

    prompt: str
    prompt_ids: Sequence[int]
    text: str
    ids: Sequence[int]
    ended: bool
    source: str = ""


def reward_function(name: str) -> RewardFunction:
    """The function "module:function", called as `function(prompts, responses)`. Its return value is checked; its
    exceptions are reported with the row of the call. Raises `UserError`.
    """
    function = own_function(name, "reward function")

    def score(responses: Sequence[Response]) -> list[float]:
        if not responses:
            return []
        sources = [called_for(response.prompt, response.source) for response in responses]
        try:
            found = _called(function, responses, f"{len(responses)} responses, the first to {sources[0]}")
        except UserError:
            # Call the function for each row separately, to find the row that fails.
            for response, source in zip(responses, sources, strict=True) if len(responses) > 1 else ():
                _called(function, [response], source)
            raise
        return numbers_of(found, sources, function)

    return score


def _called(function: OwnFunction, responses: Sequence[Response], about: str) -> Any:
    return function([each.prompt for each in responses], [each.text for each in responses], about=about)


class ModelScores:
    """Normalized scores of a reward model: the mean over its heads minus `ensemble_penalty` times their standard
    deviation.
    """

    def __init__(
        self, model: Scorer, description: Mapping[str, Any], device: torch.device, *, ensemble_penalty: float = 0.0
    ) -> None:
        self.model, self.device, self.ensemble_penalty = model, device, ensemble_penalty
        self.normalization = Normalization.read(description)

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        rows = [[*response.prompt_ids, *response.ids] for response in responses]
        raw = raw_scores(self.model, rows, self.device)
        scores: list[float] = self.normalization(raw, ensemble_penalty=self.ensemble_penalty).tolist()
        return scores


class Rewards:
    """Σ weight · score of the reward model and the functions, minus the penalty for a missing end token, clipped to
    ±`score_clip`.
    """

    def __init__(self, model: ModelScores | None, section: PpoRewardSection, rollout: RolloutSection) -> None:
        """Raises `UserError` for a function that does not exist."""
        self.model, self.section = model, section
        self.missing_end_penalty = rollout.missing_end_penalty or 0.0
        self.functions = {each.name: (reward_function(each.name), each.weight) for each in section.functions}

    @classmethod
    def of(
        cls,
        model: Scorer | None,
        description: Mapping[str, Any],
        section: PpoRewardSection,
        rollout: RolloutSection,
        device: torch.device,
    ) -> Rewards:
        """With a reward model, whose folder's description says how to read its scores; None = only functions."""
        scores = None
        if model is not None:
            scores = ModelScores(model, description, device, ensemble_penalty=section.ensemble_penalty)
        return cls(scores, section, rollout)

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
        return ModelScores(opened.model.requires_grad_(False).to(device), opened.description, device)
    return reward_function(name)
