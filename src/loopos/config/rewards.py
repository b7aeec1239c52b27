"""The config section `reward` of reinforcement learning and of online preferences: what scores a response."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from loopos.config.diagnostics import Problem
from loopos.config.keys import AboveZero, Duration, Section, Text, VariantName, ZeroOrMore
from loopos.config.reward_options import check_options
from loopos.config.variants import REWARDS


class RewardFunctionSection(Section):
    """A function that scores a response."""

    name: Annotated[str, VariantName(REWARDS, imports=False)] = Field(
        description='a function of `loopos list rewards`, or "module:function"'
    )
    label: Text | None = Field(default=None, description="its name in metrics; name when absent")
    weight: float = Field(default=1.0, description="factor of its score in the sum")
    weight_end: float | None = Field(
        default=None,
        description="factor in the last iteration, linear from weight, and in every validation; weight when absent",
    )
    timeout: Duration | None = Field(
        default=None, description='longest call, with all responses of an iteration (seconds, or "90s", "30m")'
    )
    on_timeout: Literal["unjudged", "error"] = Field(
        default="unjudged",
        description="what a call that is too long does: its responses are not judged by it, or the run ends",
    )
    options: dict[Text, Any] = Field(
        default={}, description="arguments of the function besides prompts, responses and rows, by name"
    )

    @property
    def key(self) -> str:
        """What metrics and scores call it."""
        return self.label or self.name

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its scores: a run may be resumed with another label, limit of time or technical options."""
        technical = REWARDS[self.name].technical if ":" not in self.name else ()
        options = {name: value for name, value in self.options.items() if name not in technical}
        return {
            "name": self.name,
            "weight": self.weight,
            **({} if self.weight_end is None else {"weight_end": self.weight_end}),
            **({"options": options} if options else {}),
        }


class PpoRewardSection(Section):
    """The reward of a response: the weighted sum of a reward model's score and of functions."""

    model_weight: float = Field(default=1.0, description="factor of the reward model's score in the sum")
    functions: list[RewardFunctionSection] = Field(default=[], description="functions whose scores are added")
    score_clip: AboveZero | None = Field(
        default=None, description="largest absolute value of the sum (reward); null is no bound"
    )
    ensemble_penalty: ZeroOrMore = Field(
        default=0.0, description="standard deviations of an ensemble's heads or models, subtracted from their mean"
    )

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the scores, as a run records it."""
        return {**self.model_dump(mode="json"), "functions": [each.identity for each in self.functions]}


def check_reward(
    reward: PpoRewardSection, model: str | list[str] | None, *, has_own: bool = False
) -> Iterator[Problem]:
    """Refuse a reward that is always 0. model: `data.reward_model`. has_own: an environment may reward too."""
    fields: tuple[str, ...]
    if has_own and model is None:
        pass
    elif model is None and not reward.functions:
        fields = ("data.reward_model", "reward.functions")
        hint = 'train a reward model first, with "method": "reward_model"'
        yield Problem(fields, "no reward", "a reward model, or functions", hint)
    elif (model is None or reward.model_weight == 0) and not any(
        each.weight or each.weight_end for each in reward.functions
    ):
        fields = ("reward.functions",) if model is None else ("reward.model_weight", "reward.functions")
        yield Problem(fields, "weights that are all 0", "at least one weight other than 0")
    keys = [each.key for each in reward.functions]
    for number, function in enumerate(reward.functions):
        field = f"reward.functions.{number}"
        if function.key in (*keys[:number], "model", "total", *(("environment",) if has_own else ())):
            hint = "metrics are named after it"
            yield Problem((f"{field}.label", f"{field}.name"), f'a second "{function.key}"', "a label of its own", hint)
        # A function of the user's own is imported when the run starts.
        if ":" not in function.name:
            for problem in check_options(REWARDS[function.name].load(), function.options):
                fields = (f"{field}.options.{problem.name}", f"{field}.options", f"{field}.name")
                yield Problem(fields, problem.actual, f'{problem.expected} ("{function.name}")', problem.hint)
