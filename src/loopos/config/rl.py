"""The sections of PPO's config, which rlhf has too: training, rollouts, rewards, prompts, guards, evaluation.

Enters: plain values. Leaves: frozen sections. Left out: what no single key can tell (`ppo`).

The section `rollout`: which processes write the responses of PPO, and how far behind the policy they may be.

Enters: nothing but values. Leaves: `RolloutEngineSection`, and `Problem`s for what it cannot be together with. Left
out: how responses are sampled (`ppo_sections.RolloutSection`, the section `generation`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from loopos.config.diagnostics import Problem
from loopos.config.keys import AS_IT_IS, MAY_BE_OWN, Count, Duration, Place, Schedule, Section, Share, Text
from loopos.config.preferences import PreferenceTextSection
from loopos.config.sections import EarlyStoppingSection, LanguageTrainingSection

_FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
FunctionName: TypeAlias = Annotated[
    str, Field(pattern=f"^{_FUNCTION}$", json_schema_extra={"examples": ["module:function"]})
]
KlEstimator: TypeAlias = Literal["k1", "k2", "k3"]
AboveZero: TypeAlias = Annotated[float, Field(gt=0)]
PolicyMetric: TypeAlias = Annotated[Literal["reward"], MAY_BE_OWN, AS_IT_IS]
"""What a policy in training can be judged by: the mean score of its answers to the validation prompts."""
ZeroOrMore: TypeAlias = Annotated[float, Field(ge=0)]


class PolicyEarlyStoppingSection(EarlyStoppingSection):
    """When to stop before the last pass over the prompts."""

    # Another metric than those of tasks.
    metric: PolicyMetric | None = Field(  # type: ignore[assignment]
        default=None, description="metric that is watched; reward when absent"
    )


class PpoTrainingSection(LanguageTrainingSection):
    """The optimizer, the losses of policy and values, the KL penalty, and when to validate, save and stop."""

    batch_size: Count = Field(default=16, description="responses of an iteration, per process")
    gradient_accumulation: Count = Field(default=1, description="forward passes per minibatch")
    num_epochs: Count = Field(default=3, description="passes over the prompts")
    max_iterations: Count | None = Field(default=None, description="iterations after which training ends")
    epsilon: AboveZero = Field(default=1e-5, description="added to the second moment's root (unit of the gradient)")
    schedule: Schedule = Field(default="linear", description="shape of the learning rate over the steps")
    value_learning_rate: AboveZero | None = Field(
        default=None,
        description="peak learning rate of the value model (of its head alone where the trunk is shared); "
        "learning_rate when absent",
    )
    inner_epochs: Count = Field(default=4, description="passes over an iteration's responses")
    minibatches: Count = Field(
        default=1, description="parts that the responses of all processes are split into, each one optimizer step"
    )
    clip_epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="distance from 1 at which the ratio of new to old probability is clipped"
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="bound of the ratio where the advantage is negative; null is none"
    )
    kl_coefficient: ZeroOrMore = Field(
        default=0.05, description="weight of the KL to the reference (reward per nat); with kl_target its first value"
    )
    kl_in: Literal["reward", "loss"] = Field(default="reward", description="where the KL is penalised")
    kl_estimator: KlEstimator | None = Field(
        default=None, description="estimator of the penalised KL; k1 in the reward and k2 in the loss when absent"
    )
    kl_report: KlEstimator = Field(default="k1", description="estimator of the KL that is logged, watched and targeted")
    kl_target: AboveZero | None = Field(
        default=None, description="KL that kl_coefficient is steered to (nats a response); null keeps the coefficient"
    )
    kl_horizon: Count = Field(default=10000, description="responses over which kl_target steers the coefficient")
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
        description="what predicts returns: an own trunk from the reward model, or from the policy's weights, or a "
        "head on the policy's trunk",
    )
    value_coefficient: ZeroOrMore = Field(default=0.1, description="weight of the value loss")
    value_clip: AboveZero | None = Field(
        default=0.2, description="change of a value at which its loss is clipped (reward); null is no clipping"
    )
    entropy_coefficient: ZeroOrMore = Field(
        default=0.0, description="weight of the policy's entropy, which is raised (per nat)"
    )
    approximate_kl_limit: AboveZero | None = Field(
        default=None, description="KL to the old policy above which inner epochs stop (nats a token); null is none"
    )
    old_logprobs: Literal["forward", "engine"] = Field(
        default="forward", description="old log-probabilities: a forward pass like training's, or what generation gave"
    )
    validate_every: Count | Literal["never"] = Field(default=10, description="when to validate (iterations)")
    early_stopping: PolicyEarlyStoppingSection | None = Field(
        default=None, description="when to stop early; null is never"
    )
    metric: PolicyMetric | None = Field(  # type: ignore[assignment]
        default=None, description="metric that says which checkpoint is best; reward when absent"
    )
    # Wider than the offline methods': PPO runs its own loop, in iterations.
    save_every: Count | Literal["iteration", "validation", "never"] = Field(  # type: ignore[assignment]
        default="iteration", description="when to save a checkpoint (optimizer steps)"
    )

    @property
    def penalty_estimator(self) -> KlEstimator:
        """The estimator of the penalised KL: k1 is unbiased as a reward, and k2 has the KL's gradient as a loss."""
        return self.kl_estimator or ("k2" if self.kl_in == "loss" else "k1")


class RolloutSection(Section):
    """How responses are generated."""

    max_new_tokens: Count = Field(default=64, description="longest response (tokens)")
    temperature: AboveZero = Field(default=1.0, description="divisor of the logits, of policy and reference alike")
    top_k: Count | None = Field(default=None, description="likeliest tokens that may be drawn; null is all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="share of probability that the tokens drawn from hold"
    )
    stop: list[Text] = Field(default=[], description="texts that end a response, besides the end token")
    missing_end_penalty: ZeroOrMore | None = Field(
        default=None, description="taken off the score of a response without its end (reward); null is none"
    )


class RewardFunctionSection(Section):
    """A function of the user's that scores a response."""

    name: FunctionName = Field(description='the function, as "module:function"')
    weight: float = Field(default=1.0, description="factor of its score in the sum")


class PpoRewardSection(Section):
    """What a response is worth: the weighted sum of a reward model's score and of functions."""

    model_weight: float = Field(default=1.0, description="factor of the reward model's score in the sum")
    functions: list[RewardFunctionSection] = Field(default=[], description="functions whose scores are added")
    score_clip: AboveZero | None = Field(
        default=None, description="largest absolute value of the sum (reward); null is no bound"
    )
    ensemble_penalty: ZeroOrMore = Field(
        default=0.0, description="standard deviations of an ensemble's heads, or models, that are taken off their mean"
    )


class PpoDataSection(PreferenceTextSection):
    """Where policy, reward model and prompts come from, how prompts are read, and where the run goes."""

    source_keys: ClassVar[tuple[str, ...]] = ("prompts", "training_data")
    row_keys: ClassVar[tuple[str, ...]] = ("prompts", "training_data", "validation_data")

    plain_lines: ClassVar[str | None] = "prompt"

    reward_model: Place | Annotated[list[Place], Field(min_length=1)] | None = Field(
        default=None,
        description="folder of a reward_model run, or of its model; several of them are an ensemble; null with "
        "functions alone",
    )
    prompts: Place | None = Field(
        default=None, description='file, folder, glob or hub id "org/name" of the prompts to train on'
    )
    training_data: Place | None = Field(default=None, description="another name of prompts")
    max_prompt_tokens: Count | None = Field(
        default=None, description="longest prompt (tokens); what max_length leaves beside max_new_tokens when absent"
    )
    # No "cut": a prompt without its end asks for something else.
    over_length: Literal["drop", "error"] = Field(default="drop", description="what a prompt over the limit does")

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The folders of all reward models."""
        actual = self.reward_model
        return () if actual is None else (actual,) if isinstance(actual, str) else tuple(actual)

    @property
    def source(self) -> str:
        """The prompts to train on, under whichever name they were given."""
        found = self.prompts or self.training_data
        assert found is not None, "checked by PpoConfig.check"
        return found


class GuardSection(Section):
    """When the run sounds an alarm; each limit is off when null, and "first" is the first iteration's value."""

    kl: AboveZero | None = Field(default=None, description="KL to the reference (nats a response) above it")
    entropy_share: Share | None = Field(default=None, description="entropy below this share of the first")
    length_ratio: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="mean length this many times the first, or a part of it as small"
    )
    repetition: Share | None = Field(default=None, description="share of repeated 4-grams of tokens above it")
    end_share_drop: Share | None = Field(
        default=None, description="share of responses with an end fallen by more from the first"
    )
    judge_drop: ZeroOrMore | None = Field(
        default=None, description="judge's score fallen by more below its best, while the reward has risen (reward)"
    )
    patience: Count = Field(default=1, description="iterations in a row beyond a limit before its alarm")
    stop: bool = Field(default=False, description="end training at an alarm")


class PpoEvaluationSection(Section):
    """How the policy is measured while training."""

    prompts: Annotated[int, Field(ge=0)] = Field(
        default=64, description="validation prompts that are answered; 0 is no validation"
    )
    judge: Place | None = Field(
        default=None, description='a second opinion: "module:function", or the folder of another reward model'
    )
    best_of: list[Count] = Field(
        default=[], description="numbers of responses whose best, drawn from the first policy, is compared with"
    )
    kl_limit: AboveZero | None = Field(
        default=None, description="KL (nats a response) above which a checkpoint is never the best; null is none"
    )
    samples: Count = Field(default=3, description="prompts whose answers before and after stand in the report")

    @property
    def judge_is_function(self) -> bool:
        """Whether the judge is a function rather than a reward model."""
        return self.judge is not None and re.fullmatch(_FUNCTION, self.judge) is not None


class RolloutEngineSection(Section):
    """Which processes write the responses, and how far behind the policy they may be."""

    engine: Literal["local", "ray", "vllm"] = Field(
        default="local",
        description="what writes responses: the processes that train, or workers of Ray with the same engine or with "
        "vLLM (CUDA); the last two need the extra cluster",
    )
    workers: Count = Field(default=2, description="workers that write responses")
    address: Text | None = Field(
        default=None, description='address of a Ray cluster ("host:port"); null starts Ray on this machine alone'
    )
    cpus_per_worker: Count = Field(default=1, description="cores that Ray sets aside for a worker")
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="GPUs that Ray sets aside for a worker, or a part of one; 0, and 1 for vLLM, if absent",
    )
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="iterations that the policy which writes may be behind; 0: it is the newest, above 0 the next "
        "responses are written while training goes on",
    )
    importance_cap: Annotated[float, Field(ge=1)] | None = Field(
        default=None,
        description="bound of the weight π/μ of a token by the policy μ that wrote it, while the clipped ratio is to "
        "the policy π before the update; null: the clipped ratio is to μ itself",
    )
    timeout: Duration = Field(
        default=600.0,
        description="time without an answer after which a worker's prompts are given to another too; three times it, "
        'and the worker counts as lost (seconds, or "90s", "30m", "2h")',
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        default=8, description="lost workers that are started anew; then the run goes on with fewer"
    )

    @property
    def is_remote(self) -> bool:
        """Whether other processes than those that train write."""
        return self.engine != "local"

    @property
    def gpus(self) -> float:
        """GPUs of a worker."""
        if self.gpus_per_worker is not None:
            return self.gpus_per_worker
        return 1.0 if self.engine == "vllm" else 0.0


def check_rollout(
    rollout: RolloutEngineSection, training: PpoTrainingSection, generation: RolloutSection
) -> Iterator[Problem]:
    """What the engine cannot do."""
    if rollout.max_staleness > 0 and not rollout.is_remote:
        actual = f'{rollout.max_staleness} with rollout.engine "local"'
        yield Problem(("rollout.max_staleness", "rollout.engine"), actual, '0, or rollout.engine "ray" or "vllm"')
    if rollout.engine != "vllm":
        return
    if training.trainable == "lora":
        actual = '"vllm" with training.trainable "lora"'
        yield Problem(("rollout.engine", "training.trainable"), actual, '"ray", or training.trainable "all"')
    if rollout.gpus == 0:
        yield Problem(("rollout.gpus_per_worker", "rollout.engine"), '0 with rollout.engine "vllm"', "above 0")
    if generation.temperature != 1 and (generation.top_k is not None or generation.top_p < 1):
        fields = ("generation.temperature", "rollout.engine")
        actual = f'{generation.temperature} with top_k or top_p and rollout.engine "vllm"'
        hint = "vLLM does not tell the log-probabilities of the full distribution at a temperature then"
        yield Problem(fields, actual, '1, or neither top_k nor top_p, or rollout.engine "ray"', hint)


def rollout_effects(rollout: RolloutEngineSection) -> dict[str, tuple[bool, str]]:
    """Keys that may have no effect → whether they have one, and the reason why not."""
    remote = (rollout.is_remote, "rollout.engine is local")
    keys = ("workers", "address", "cpus_per_worker", "gpus_per_worker", "timeout", "restarts")
    capped = (rollout.importance_cap is None, "with rollout.importance_cap the old policy is that of a forward pass")
    return {**{f"rollout.{key}": remote for key in keys}, "training.old_logprobs": capped}
