"""Algorithms of reinforcement learning: how scores become advantages, and advantages a loss.

An algorithm is two pure functions: `advantages(inputs: AdvantageInputs)` returns token advantages, and for one with a
critic the pair of advantages and returns; `policy_loss(inputs: PolicyInputs)` returns a loss per token. The table of
algorithms is in `config.algorithms`; `experience` calls the first function and `objective` the second.
Letters: B responses of an iteration, L tokens of the longest, M tokens of the responses of one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from loopos.config.algorithms import AlgorithmRow
from loopos.config.diagnostics import UserError
from loopos.config.registry import loaded
from loopos.functional.advantages import Baseline, Scale, future_rewards, generalized_advantages, relative_rewards
from loopos.functional.policy_loss import (
    PolicyTerms,
    clipped_importance_terms,
    clipped_policy_terms,
    policy_terms,
    summed_by_response,
)


@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """The responses of one iteration from all processes, left-aligned in `[B, L]`.

    `scores` `[B]`. `rewards` `[B, L]`: the score at the last token, minus the KL penalty of each token where it is part
    of the reward (reward). `mask` `[B, L]`: True = a token of the response. `groups` `[B]`: the number of the prompt
    within the iteration; responses to one prompt have the same number. `values` `[B, L]`: of the state before each
    token; None without a critic. `discount` γ, `gae_lambda` λ, `baseline`, `scale`: of the config. `judged` `[B]`:
    False where no reward judged the response; its score is then the mean of its group, and its advantages become 0.
    None: all are judged.
    """

    scores: Tensor
    rewards: Tensor
    mask: Tensor
    groups: Tensor
    values: Tensor | None
    discount: float
    gae_lambda: float
    judged: Tensor | None = None
    baseline: Baseline = "group"
    scale: Scale = "group"


@dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """The tokens of one forward pass. `[M]`: `logprobs` with gradient, `old_logprobs` of the policy that the ratio is
    to, `advantages`, and `responses`, the number of the response that a token belongs to. `clip_epsilon`,
    `clip_epsilon_high`, `dual_clip`: of the config.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    responses: Tensor
    clip_epsilon: float
    dual_clip: float | None = None
    clip_epsilon_high: float | None = None


Advantages: TypeAlias = Callable[[AdvantageInputs], Tensor | tuple[Tensor, Tensor]]
PolicyLoss: TypeAlias = Callable[[PolicyInputs], Tensor | PolicyTerms]


@dataclass(frozen=True)
class Algorithm:
    """The functions of an algorithm, imported, and its name."""

    name: str
    advantages_of: Advantages
    policy_loss_of: PolicyLoss
    has_critic: bool

    @classmethod
    def of(cls, name: str, row: AlgorithmRow) -> Algorithm:
        """The algorithm of a row of the table."""
        return cls(name, loaded(row.advantages), loaded(row.policy_loss), row.critic)

    def advantages(self, inputs: AdvantageInputs) -> tuple[Tensor, Tensor | None]:
        """Advantages and returns, both `[B, L]`; returns are None without a critic. Raises `UserError` where the
        function returns something else.
        """
        found = self.advantages_of(inputs)
        parts: tuple[Tensor, ...] = found if isinstance(found, tuple) else (found,)
        shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        expected = [list(inputs.mask.shape)] * (2 if self.has_critic else 1)
        if shapes != expected:
            what = "advantages and returns" if self.has_critic else "advantages"
            raise UserError(
                f'training.algorithm "{self.name}": its function returned {shapes}; expected {what} of shape '
                f"{expected[0]}, one number for each token"
            )
        return parts[0].where(inputs.mask, 0.0), parts[1] if self.has_critic else None

    def policy_loss(self, inputs: PolicyInputs) -> PolicyTerms:
        """The loss of each token `[M]`, with what is reported of the ratio. Raises `UserError` for another shape: a
        mean over the tokens of one forward pass is not the mean over those of the step.
        """
        found = self.policy_loss_of(inputs)
        terms = policy_terms(found, inputs.logprobs, inputs.old_logprobs) if isinstance(found, Tensor) else found
        if terms.loss.shape != inputs.logprobs.shape:
            raise UserError(
                f'training.algorithm "{self.name}": its loss has shape {list(terms.loss.shape)}; expected '
                f"{list(inputs.logprobs.shape)}, one number for each token, not their sum or mean"
            )
        return terms


def ppo_advantages(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Proximal policy optimization, with generalized advantage estimation over the values of a critic (Schulman et al.
    2016; Schulman et al. 2017).
    """
    assert inputs.values is not None, "PPO has a critic"
    return generalized_advantages(
        inputs.rewards, inputs.values, inputs.mask, discount=inputs.discount, smoothing=inputs.gae_lambda
    )


def relative_advantages(inputs: AdvantageInputs) -> Tensor:
    """Every token of a response has the advantage (r − b) / s, by `advantage_baseline` and `advantage_scale` (Shao et
    al. 2024). r is the score, less β·KL where the KL is in the reward.
    """
    found = relative_rewards(inputs.rewards.sum(1), inputs.groups, baseline=inputs.baseline, scale=inputs.scale)
    return found[:, None].expand_as(inputs.rewards)


def token_returns(inputs: AdvantageInputs) -> Tensor:
    """The advantage of a token is the discounted sum of the rewards from it on, the KL penalty of each token included
    (Hu et al. 2025).
    """
    return future_rewards(inputs.rewards, inputs.mask, discount=inputs.discount)


def clipped_loss(inputs: PolicyInputs) -> PolicyTerms:
    """The clipped loss of PPO (Schulman et al. 2017, equation 7)."""
    return _clipped(inputs, None)


def response_ratio_loss(inputs: PolicyInputs) -> PolicyTerms:
    """The clipped loss with the ratio of whole responses, π(y) / π_old(y), for each of their tokens (Ahmadian et al.
    2024).
    """
    return _clipped(inputs, summed_by_response(inputs.logprobs.float() - inputs.old_logprobs, inputs.responses))


def mean_ratio_loss(inputs: PolicyInputs) -> PolicyTerms:
    """The clipped loss with the ratio (π(y) / π_old(y))^(1/|y|) of a response for each of its tokens (GSPO: Zheng et
    al. 2025, equations 5 and 7).
    """
    difference = inputs.logprobs.float() - inputs.old_logprobs
    return _clipped(inputs, summed_by_response(difference, inputs.responses, mean=True))


def clipped_importance_loss(inputs: PolicyInputs) -> PolicyTerms:
    """The weighted log-likelihood of CISPO (MiniMax 2025, equation 4)."""
    high = inputs.clip_epsilon if inputs.clip_epsilon_high is None else inputs.clip_epsilon_high
    return clipped_importance_terms(inputs.logprobs, inputs.old_logprobs, inputs.advantages, clip_epsilon_high=high)


def _clipped(inputs: PolicyInputs, log_ratio: Tensor | None) -> PolicyTerms:
    return clipped_policy_terms(
        inputs.logprobs,
        inputs.old_logprobs,
        inputs.advantages,
        clip_epsilon=inputs.clip_epsilon,
        clip_epsilon_high=inputs.clip_epsilon_high,
        dual_clip=inputs.dual_clip,
        log_ratio=log_ratio,
    )


PPO = Algorithm("ppo", ppo_advantages, clipped_loss, has_critic=True)
