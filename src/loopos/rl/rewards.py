"""What a response is worth: the score of a reward model and of functions, weighted and summed.

Enters: prompts and responses as tokens and text. Leaves: a score each. Functions are the user's own code, and run only
where they are asked for by name. Left out: penalties by token (`functional.advantages`).
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
    """One response to one prompt: what was asked, and the ids that the template made of it. `ended`: by an end token or
    a stop string, not at the limit of tokens. `place`: the file and line of the prompt, empty where it has none.
    """

    prompt: str
    prompt_ids: Sequence[int]
    text: str
    ids: Sequence[int]
    ended: bool
    place: str = ""


def reward_function(name: str) -> RewardFunction:
    """The function of a name "module:function", called as `function(prompts, responses)`. What it returns is checked,
    and what it raises is told with the row it was called for. Raises `UserError`.
    """
    function = own_function(name, "reward function")

    def score(responses: Sequence[Response]) -> list[float]:
        if not responses:
            return []
        places = [called_for(response.prompt, response.place) for response in responses]
        try:
            found = _called(function, responses, f"{len(responses)} responses, the first to {places[0]}")
        except UserError:
            # Which row it was, the function says when it is called for each alone.
            for response, place in zip(responses, places, strict=True) if len(responses) > 1 else ():
                _called(function, [response], place)
            raise
        return numbers_of(found, places, function)

    return score


def _called(function: OwnFunction, responses: Sequence[Response], about: str) -> Any:
    return function([each.prompt for each in responses], [each.text for each in responses], about=about)


class ModelScores:
    """Normalised scores of a reward model: the mean of its heads less `ensemble_penalty` of their spread."""

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
    """Σ weight · score of the reward model and the functions, less what a missing end costs, at most ±`score_clip`."""

    def __init__(self, model: ModelScores | None, section: PpoRewardSection, rollout: RolloutSection) -> None:
        """Raises `UserError` for a function that is not there."""
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
        """With the raw scores of `model`, whose folder's description says how they are read; None = functions alone."""
        scores = None
        if model is not None:
            scores = ModelScores(model, description, device, ensemble_penalty=section.ensemble_penalty)
        return cls(scores, section, rollout)

    def __call__(self, responses: Sequence[Response]) -> dict[str, list[float]]:
        """`total`, and by name what it is made of: `model` (normalised) and each function, unweighted."""
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
    """A judge that training does not see: a function "module:function", or the folder of another reward model whose
    tokenizer is `tokenizer` too. Raises `UserError`.
    """
    if not is_function:
        opened = open_reward_model(name)
        check_same_tokens(tokenizer, opened.tokenizer, "evaluation.judge")
        return ModelScores(opened.model.requires_grad_(False).to(device), opened.description, device)
    return reward_function(name)
