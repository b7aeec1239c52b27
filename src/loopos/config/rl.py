"""Config sections of reinforcement learning, shared by ppo and rlhf.

`rollout` selects the processes that generate responses and how stale their policy may be; `generation` has the
sampling settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from loopos.config.algorithms import ALGORITHMS
from loopos.config.diagnostics import Problem
from loopos.config.keys import (
    AS_IT_IS,
    MAY_BE_OWN,
    AboveZero,
    Count,
    Duration,
    Fraction,
    Location,
    Schedule,
    Section,
    Text,
    VariantName,
    Warmup,
    ZeroOrMore,
)
from loopos.config.preferences import PreferenceTextSection, check_reward_model
from loopos.config.sections import EarlyStoppingSection, LanguageTrainingSection

_FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
KlEstimator: TypeAlias = Literal["k1", "k2", "k3"]
PolicyMetric: TypeAlias = Annotated[Literal["reward"], MAY_BE_OWN, AS_IT_IS]
"""Validation metric of a policy: the mean score of its answers to the validation prompts."""


class PolicyEarlyStoppingSection(EarlyStoppingSection):
    """When to stop before the last pass over the prompts."""

    # Not the metrics of classification and regression tasks.
    metric: PolicyMetric | None = Field(  # type: ignore[assignment]
        default=None, description="metric to monitor; reward when absent"
    )


class CurriculumSection(Section):
    """Which prompts are preferred, by the fraction p of their responses that passed: p(1 − p) is largest at a half."""

    pass_score: float = Field(default=0.5, description="score from which a response passes")
    decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5, description="weight of the earlier pass rate of a prompt when it is drawn again"
    )
    floor: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1,
        description="smallest weight of a prompt; one that was never drawn, or passed half the time, has 1",
    )


class PpoTrainingSection(LanguageTrainingSection):
    """The optimizer, the losses of policy and values, the KL penalty, and when to validate, save and stop."""

    algorithm: Annotated[str, VariantName(ALGORITHMS)] = Field(
        default="ppo",
        description="how scores become advantages and advantages a loss (`loopos list algorithms`); the method's own "
        "when absent. It brings defaults of its own",
    )
    batch_size: Count = Field(default=16, description="responses of an iteration, per process")
    gradient_accumulation: Count = Field(default=1, description="forward passes per minibatch")
    num_epochs: Count = Field(default=3, description="passes over the prompts")
    max_iterations: Count | None = Field(default=None, description="iterations after which training ends")
    epsilon: AboveZero = Field(default=1e-5, description="added to the second moment's root (unit of the gradient)")
    schedule: Schedule = Field(default="linear", description="shape of the learning rate over the steps")
    # Adam's averages are warm after a few of the many small steps of PPO.
    warmup: Warmup = Field(
        default=0, description="linear warmup: whole steps, or a fraction of all steps below 1; 0 is none"
    )
    value_learning_rate: AboveZero | None = Field(
        default=None,
        description="peak learning rate of the value model (only of its head if the backbone is shared); "
        "learning_rate when absent",
    )
    inner_epochs: Count = Field(default=4, description="passes over an iteration's responses")
    minibatches: Count = Field(
        default=1, description="parts that the responses of all processes are split into, each one optimizer step"
    )
    clip_epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="distance from 1 at which the ratio of new to old probability is clipped"
    )
    clip_epsilon_high: AboveZero | None = Field(
        default=None, description="the same above 1 (clip-higher); clip_epsilon when null"
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="bound of the ratio where the advantage is negative (the delta of a two-sided clip); null is none",
    )
    advantage_baseline: Literal["group", "leave_one_out", "batch", "none"] = Field(
        default="group",
        description="what is subtracted from a reward: the mean of the responses to the prompt, of the other ones, or "
        "of all responses of the iteration (relative advantages)",
    )
    advantage_scale: Literal["group", "batch", "none"] = Field(
        default="group",
        description="the standard deviation of the rewards that divides: of the responses to the prompt, or of all",
    )
    loss_normalization: Literal["token", "sequence", "constant"] = Field(
        default="token",
        description="what the policy loss of a minibatch is divided by: its tokens; its responses, after the mean over "
        "the tokens of each; or its responses times generation.max_new_tokens",
    )
    mask_truncated: bool = Field(
        default=False, description="leave responses without their end out of the losses and of what divides them"
    )
    dynamic_sampling: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="times that prompts whose responses all have the same score are replaced by other prompts, in an "
        "iteration",
    )
    curriculum: CurriculumSection | None = Field(
        default=None, description="prefer prompts that the policy solves sometimes; null draws all alike"
    )
    kl_coefficient: ZeroOrMore = Field(
        default=0.05, description="weight of the KL to the reference (reward per nat); with kl_target its first value"
    )
    kl_in: Literal["reward", "loss"] = Field(default="reward", description="where the KL is penalized")
    kl_estimator: KlEstimator | None = Field(
        default=None, description="estimator of the penalized KL; k1 in the reward and k2 in the loss when null"
    )
    kl_importance: bool = Field(
        default=False,
        description="multiply each token's KL in the loss by its ratio of new to old probability, so that k3 has the "
        "gradient of the KL",
    )
    kl_report: KlEstimator = Field(
        default="k1", description="estimator of the KL that is logged, monitored and targeted"
    )
    kl_target: AboveZero | None = Field(
        default=None, description="KL that an adaptive kl_coefficient aims at (nats per response); null keeps it fixed"
    )
    kl_horizon: Count = Field(default=10000, description="responses over which kl_target adapts the coefficient")
    discount: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="weight of a reward a token later")
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.95, description="weight of an error of the values a token later, in the advantages"
    )
    whiten_rewards: bool = Field(
        default=False, description="scale an iteration's token rewards to standard deviation 1"
    )
    whiten_advantages: bool = Field(
        default=True, description="shift and scale an iteration's advantages to mean 0, standard deviation 1"
    )
    value_model: Literal["reward", "policy", "shared"] = Field(
        default="reward",
        description="what predicts returns, for an algorithm with a critic: a separate backbone from the reward model "
        "or from the policy's weights, or a head on the policy's backbone",
    )
    value_coefficient: ZeroOrMore = Field(default=0.1, description="weight of the value loss")
    value_clip: AboveZero | None = Field(
        default=0.2, description="change of a value at which its loss is clipped (reward); null is no clipping"
    )
    entropy_coefficient: ZeroOrMore = Field(
        default=0.0, description="weight of the policy's entropy, which is raised (per nat)"
    )
    approximate_kl_limit: AboveZero | None = Field(
        default=None, description="KL to the old policy above which inner epochs stop (nats per token); null is none"
    )
    old_logprobs: Literal["forward", "engine"] = Field(
        default="forward", description="old log-probabilities: a forward pass like training's, or those of generation"
    )
    log_rollouts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="responses of each iteration that rollouts.jsonl gets, with scores and advantages"
    )
    validate_every: Count | Literal["never"] = Field(default=10, description="when to validate (iterations)")
    early_stopping: PolicyEarlyStoppingSection | None = Field(
        default=None, description="when to stop early; null is never"
    )
    metric: PolicyMetric | None = Field(  # type: ignore[assignment]
        default=None, description="metric that selects the best checkpoint; reward when absent"
    )
    # Wider than the offline methods': PPO runs its own loop, in iterations.
    save_every: Count | Literal["iteration", "validation", "never"] = Field(  # type: ignore[assignment]
        default="iteration", description="when to save a checkpoint (optimizer steps)"
    )

    @property
    def penalty_estimator(self) -> KlEstimator:
        """The estimator of the penalized KL: k1 is unbiased as a reward, and k2 has the KL's gradient as a loss."""
        return self.kl_estimator or ("k2" if self.kl_in == "loss" else "k1")


class ResponseSection(Section):
    """How a policy's responses are sampled."""

    max_new_tokens: Count = Field(default=64, description="longest response (tokens)")
    temperature: AboveZero = Field(default=1.0, description="divisor of the logits of policy and reference")
    top_k: Count | None = Field(default=None, description="sample from the k most likely tokens; null is all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="sample from the smallest set of tokens with this total probability"
    )
    stop: list[Text] = Field(default=[], description="texts that end a response, besides the end token")


class RolloutSection(ResponseSection):
    """How responses are generated."""

    responses_per_prompt: Count = Field(
        default=1, description="responses to each prompt of an iteration; training.batch_size counts responses"
    )
    missing_end_penalty: ZeroOrMore | None = Field(
        default=None, description="subtracted from the score of a response without its end (reward); null is none"
    )
    overlong_buffer: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="last fraction of max_new_tokens, over which overlong_penalty rises from 0; null is no penalty",
    )
    overlong_penalty: AboveZero = Field(
        default=1.0, description="subtracted from the score of a response of max_new_tokens (reward)"
    )

    @property
    def overlong_tokens(self) -> int:
        """Tokens before max_new_tokens over which the penalty of long responses rises; 0 without one."""
        return 0 if self.overlong_buffer is None else max(1, round(self.overlong_buffer * self.max_new_tokens))


class OnlineSection(RolloutSection):
    """How the policy writes answers within the run, whose best and worst become comparisons (online DPO)."""

    every: Count = Field(default=1, description="optimizer steps on the comparisons of a round")
    responses_per_prompt: Annotated[int, Field(ge=2)] = Field(
        default=2, description="answers to each prompt of a round; the best and the worst are compared"
    )
    temperature: AboveZero = Field(default=1.0, description="divisor of the logits while answers are written")


class PpoDataSection(PreferenceTextSection):
    """Where policy, reward model and prompts come from, how prompts are read, and where the run goes."""

    source_keys: ClassVar[tuple[str, ...]] = ("prompts", "training_data")
    row_keys: ClassVar[tuple[str, ...]] = ("prompts", "training_data", "validation_data")

    plain_lines: ClassVar[str | None] = "prompt"

    reward_model: Location | Annotated[list[Location], Field(min_length=1)] | None = Field(
        default=None,
        description="folder of a reward_model run, or of its model; several are an ensemble; null with only functions",
    )
    prompts: Location | None = Field(
        default=None, description='file, folder, glob or hub id "org/name" of the prompts to train on'
    )
    training_data: Location | None = Field(default=None, description="another name of prompts")
    max_prompt_tokens: Count | None = Field(
        default=None, description="longest prompt (tokens); max_length - max_new_tokens when absent"
    )
    # No "cut": a prompt without its end is another prompt.
    over_length: Literal["drop", "error"] = Field(default="drop", description="what happens to a prompt over the limit")

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The folders of all reward models."""
        models = self.reward_model
        return () if models is None else (models,) if isinstance(models, str) else tuple(models)

    @property
    def source(self) -> str:
        """The prompts to train on, under either of the two keys."""
        found = self.prompts or self.training_data
        assert found is not None, "checked by PpoConfig.check"
        return found


class GuardSection(Section):
    """Limits at which the run alerts; null turns a limit off, and "first" is the value of the first iteration."""

    kl: AboveZero | None = Field(
        default=None, description="alert if the KL to the reference is above this (nats per response)"
    )
    entropy_share: Fraction | None = Field(
        default=None, description="alert if the entropy is below this fraction of the first"
    )
    length_ratio: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="alert if the mean length is this many times the first, or 1/this of it"
    )
    repetition: Fraction | None = Field(
        default=None, description="alert if the fraction of repeated 4-grams of tokens is above this"
    )
    eos_rate_drop: Fraction | None = Field(
        default=None,
        description="alert if the fraction of finished responses is lower than the first by more than this",
    )
    judge_drop: ZeroOrMore | None = Field(
        default=None,
        description="alert if the judge's score is below its best by more than this while the reward rises (reward)",
    )
    patience: Count = Field(default=1, description="iterations in a row beyond a limit before the alert")
    stop: bool = Field(default=False, description="stop training at an alert")


class JudgedAnswersSection(Section):
    """How a policy's answers to validation prompts are judged while training."""

    prompts: Annotated[int, Field(ge=0)] = Field(
        default=64, description="validation prompts to answer; 0 is no validation"
    )
    judge: Location | None = Field(
        default=None, description='independent scorer: "module:function", or the folder of another reward model'
    )
    samples: Count = Field(default=3, description="prompts whose answers before and after are shown in the report")

    @property
    def judge_is_function(self) -> bool:
        """Whether the judge is a function rather than a reward model."""
        return self.judge is not None and re.fullmatch(_FUNCTION, self.judge) is not None


class PpoEvaluationSection(JudgedAnswersSection):
    """How the policy is evaluated while training."""

    responses: Count = Field(
        default=1, description="responses to each validation prompt; where all scores are 0 or 1, pass@k is measured"
    )
    best_of: list[Count] = Field(default=[], description="compare with best-of-n of the initial policy, for these n")
    kl_limit: AboveZero | None = Field(
        default=None, description="KL (nats a response) above which a checkpoint is never the best; null is none"
    )


class PreferenceEvaluationSection(JudgedAnswersSection):
    """Which validation prompts a policy of preference optimization answers, and who judges the answers."""

    prompts: Count = Field(default=64, description="distinct validation prompts to answer")
    judge: Location | None = Field(
        default=None,
        description='scorer of the answers: "module:function", or the folder of a reward model; null measures no win '
        "rate",
    )
    every: Count = Field(default=1, description="answer the prompts in every n-th validation")
    kl_report: KlEstimator = Field(default="k1", description="estimator of the KL to the start that is logged")
    reference_copy: bool = Field(
        default=False,
        description="hold a second copy of the weights, those of the start, to measure the KL where all weights train",
    )


def check_judge(evaluation: JudgedAnswersSection) -> Iterator[Problem]:
    """Check the folder of another reward model."""
    if evaluation.judge is not None and not evaluation.judge_is_function:
        for problem in check_reward_model("evaluation.judge", evaluation.judge):
            yield Problem(problem.fields, problem.actual, f'"module:function", or {problem.expected}', problem.hint)


class RolloutEngineSection(Section):
    """Which processes generate responses, and how stale their policy may be."""

    engine: Literal["local", "ray", "vllm"] = Field(
        default="local",
        description="what generates responses: the training processes, or Ray workers with the same engine or with "
        "vLLM; the last two need the extra cluster",
    )
    workers: Count = Field(default=2, description="number of rollout workers")
    address: Text | None = Field(
        default=None, description='address of a Ray cluster ("host:port"); null starts Ray on this machine'
    )
    python: Location | None = Field(
        default=None,
        description="Python interpreter of the workers, in an environment of its own with the same Ray, such as one "
        "with vLLM; null is that of the run",
    )
    cpus_per_worker: Count = Field(
        default=1, description="cores that Ray sets aside for a worker, and threads that it computes with"
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="GPUs that Ray sets aside for a worker, or a part of one; if absent 0, but 1 for vLLM on a cluster "
        "or where this host has CUDA. With 0 vLLM needs its CPU build",
    )
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="iterations by which the generating policy may lag; above 0, the next responses are generated "
        "while training continues",
    )
    importance_cap: Annotated[float, Field(ge=1)] | None = Field(
        default=None,
        description="upper bound of the importance weight π/μ per token, where μ generated it and the clipped ratio is "
        "to the policy π before the update; null: the clipped ratio is to μ",
    )
    timeout: Duration = Field(
        default=600.0,
        description="time without an answer after which a worker's prompts go to another worker too; after three times "
        'this the worker counts as lost (seconds, or "90s", "30m", "2h")',
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        default=8, description="restarts of lost workers; after that the run continues with fewer"
    )

    @property
    def is_remote(self) -> bool:
        """Whether separate processes generate responses."""
        return self.engine != "local"


def check_rollout(rollout: RolloutEngineSection, generation: RolloutSection) -> Iterator[Problem]:
    """Check the limits of the engine."""
    if rollout.max_staleness > 0 and not rollout.is_remote:
        actual = f'{rollout.max_staleness} with rollout.engine "local"'
        yield Problem(("rollout.max_staleness", "rollout.engine"), actual, '0, or rollout.engine "ray" or "vllm"')
    filters = generation.top_k is not None or generation.top_p < 1
    if rollout.engine == "vllm" and generation.temperature != 1 and filters:
        fields = ("generation.temperature", "rollout.engine")
        actual = f'{generation.temperature} with top_k or top_p and rollout.engine "vllm"'
        hint = "vLLM then does not return log-probabilities of the full distribution at that temperature"
        yield Problem(fields, actual, '1, or neither top_k nor top_p, or rollout.engine "ray"', hint)


def rollout_effects(rollout: RolloutEngineSection) -> dict[str, tuple[bool, str]]:
    """Keys that may have no effect → whether they have one, and the reason if not."""
    remote = (rollout.is_remote, "rollout.engine is local")
    keys = ("workers", "address", "python", "cpus_per_worker", "gpus_per_worker", "timeout", "restarts")
    capped = (
        rollout.importance_cap is None,
        "with rollout.importance_cap the old log-probabilities come from a forward pass",
    )
    return {**{f"rollout.{key}": remote for key in keys}, "training.old_logprobs": capped}
