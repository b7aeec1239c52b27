"""The config of proximal policy optimization (`PpoConfig`) and the checks across its keys; sections are in `rl`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from loopos.config import checks
from loopos.config.algorithms import ALGORITHMS, AlgorithmRow
from loopos.config.diagnostics import Problem
from loopos.config.environments import EnvironmentSection, check_environment
from loopos.config.keys import Section
from loopos.config.learning_rates import rate_notes
from loopos.config.methods import ONLINE_METHODS
from loopos.config.preferences import (
    check_reward_model,
    check_text_files,
    text_effects,
    validation_notes,
)
from loopos.config.registry import Reference
from loopos.config.rewards import PpoRewardSection, check_reward
from loopos.config.rl import (
    GuardSection,
    PpoDataSection,
    PpoEvaluationSection,
    PpoTrainingSection,
    RolloutEngineSection,
    RolloutSection,
    check_judge,
    check_rollout,
    rollout_effects,
)
from loopos.config.sections import (
    ComputationSection,
    DistributedSection,
    LanguageModelSection,
    MethodConfig,
    check_distributed,
)

EXAMPLE_PROMPT = '{"prompt": "Where is my parcel?"}'


class PpoConfig(MethodConfig):
    """Config of a PPO run."""

    description: str = Field(default="", description="free text")
    model: LanguageModelSection = Field(default_factory=LanguageModelSection, description="the model's sizes")
    computation: ComputationSection = Field(description="the method")
    training: PpoTrainingSection = Field(description="how policy and values are trained")
    generation: RolloutSection = Field(default_factory=RolloutSection, description="how responses are generated")
    rollout: RolloutEngineSection = Field(
        default_factory=RolloutEngineSection, description="which processes generate responses"
    )
    environment: EnvironmentSection | None = Field(
        default=None, description="what the model acts in, over several turns with tools; null is one response"
    )
    reward: PpoRewardSection = Field(default_factory=PpoRewardSection, description="the reward of a response")
    guards: GuardSection = Field(default_factory=GuardSection, description="limits at which the run alerts")
    evaluation: PpoEvaluationSection = Field(
        default_factory=PpoEvaluationSection, description="how the policy is evaluated while training"
    )
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="how the run is distributed over processes"
    )
    data: PpoDataSection = Field(description="weights, prompts and output folder")

    @model_validator(mode="before")
    @classmethod
    def _with_defaults_of_the_algorithm(cls, values: Any) -> Any:
        """The sections with the defaults of the algorithm where they set no value."""
        return with_defaults(values) if isinstance(values, dict) else values

    @property
    def validates(self) -> bool:
        """Whether validation ever runs."""
        return self.data.has_validation and self.training.validate_every != "never" and self.evaluation.prompts > 0

    @property
    def algorithm(self) -> AlgorithmRow:
        """What the algorithm needs."""
        return ALGORITHMS[self.training.algorithm]

    @property
    def value_model(self) -> str | None:
        """What predicts returns; None for an algorithm without a critic."""
        return self.training.value_model if self.algorithm.critic else None

    @property
    def longest_response(self) -> int:
        """Tokens after a prompt at most: of a response, or of an episode."""
        return self.generation.max_new_tokens if self.environment is None else self.environment.max_tokens

    @property
    def needs_reference(self) -> bool:
        """Whether the initial policy is needed: by the algorithm, by a penalty on the KL, or by a limit of it."""
        training, limits = self.training, (self.training.kl_target, self.guards.kl, self.evaluation.kl_limit)
        return self.algorithm.reference or training.kl_coefficient > 0 or any(limit is not None for limit in limits)

    @property
    def old_logprobs(self) -> Literal["forward", "engine"]:
        """The source of the old log-probabilities in the ratio: a forward pass before the update, or generation."""
        if self.rollout.importance_cap is not None:
            return "forward"
        return "engine" if self.rollout.max_staleness > 0 else self.training.old_logprobs

    @property
    def reads_forward(self) -> bool:
        """Whether a forward pass over the responses is read before the first update: for values, the KL, old
        log-probabilities of a second update, the engine's mismatch, or the guard of the entropy.
        """
        training, rollout = self.training, self.rollout
        updates = training.inner_epochs * training.minibatches
        return (
            self.value_model is not None
            or self.needs_reference
            or (updates > 1 and self.old_logprobs == "forward")
            or rollout.importance_cap is not None
            or rollout.is_remote
            or self.guards.entropy_share is not None
        )

    def check(self) -> Iterator[Problem]:
        data = self.data
        yield from checks.check_source({"prompts": data.prompts, "training_data": data.training_data})
        yield from checks.check_reading(
            streaming=data.streaming, max_rows=data.max_rows, columns=data.columns.items(), encoding=data.encoding
        )
        yield from self.check_training()

    def check_training(self) -> Iterator[Problem]:
        """`check` without the data sources; rlhf uses it too."""
        model, training, data = self.model, self.training, self.data
        yield from checks.check_weights_and_sizes(model, data.pretrained_weights, data.tokenizer)
        yield from checks.check_trainable(training, model.num_layers, data.adapter)
        yield from checks.check_steps(training)
        yield from checks.check_optimizer(training)
        yield from check_distributed(self.distributed, training.optimizer)
        yield from checks.check_validation(training, has_validation=data.has_validation)
        yield from checks.check_no_head(training)
        yield from _check_answers(self)
        yield from _check_algorithm(self)
        yield from _check_reward(self)
        yield from _check_penalty(training)
        yield from _check_lengths(self)
        yield from check_rollout(self.rollout, self.generation)
        if self.environment is not None:
            yield from check_environment(self.environment, self.rollout, self.generation)
        if self.rollout.is_remote and self.distributed.tensor_parallel > 1:
            fields = ("rollout.engine", "distributed.tensor_parallel")
            actual = f'"{self.rollout.engine}" with tensor_parallel {self.distributed.tensor_parallel}'
            hint = "no process has full weights to send"
            yield Problem(fields, actual, '"local", or mode "shard" without tensor_parallel', hint)

    def check_files(self) -> Iterator[Problem]:
        data, rows = self.data, (EXAMPLE_PROMPT, "")
        yield from check_text_files(data, {"prompts": rows, "training_data": rows, "validation_data": rows})
        for number, path in enumerate(data.reward_models):
            field = "data.reward_model" if isinstance(data.reward_model, str) else f"data.reward_model.{number}"
            yield from check_reward_model(field, path)
            if checks.same_path(path, data.output_dir):
                fields = ("data.output_dir", field)
                yield Problem(fields, f'"{data.output_dir}", the folder of the reward model', "another folder")
        yield from check_judge(self.evaluation)

    def notes(self) -> list[str]:
        training, data, generation = self.training, self.data, self.generation
        # What the algorithm's defaults bring is not the user's to mend.
        defaults = self.algorithm.defaults
        effects = {
            key: effect
            for key, effect in _effects(self).items()
            if key not in defaults or _value(self, key) != defaults[key]
        }
        notes = checks.without_effect(self, effects)
        notes += rate_notes(self, "policy")
        if training.minibatches > training.batch_size:
            notes.append(
                f"training.minibatches ({training.minibatches}) is more than training.batch_size "
                f"({training.batch_size}): this needs more than one process, each with its own responses"
            )
        if generation.top_k is not None or generation.top_p < 1:
            notes.append(
                "generation.top_k and top_p: log-probabilities are of the full distribution, not of the sampled one"
            )
        if generation.temperature != 1:
            notes.append("generation.temperature divides the logits of policy, old policy and reference")
        judge = self.evaluation.judge
        if judge is not None and any(checks.same_path(judge, path) for path in data.reward_models):
            notes.append("evaluation.judge is data.reward_model: it cannot detect that the reward model is exploited")
        source = data.prompts or data.training_data
        return notes + validation_notes(training, data, source, validates=self.validates)


def _value(config: PpoConfig, key: str) -> Any:
    """The value of "section.key"."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The sections of a config, as mappings or as `Section`s, with the defaults of its algorithm where they set none.
    Unchanged where the algorithm's name is no name: that is reported with the other mistakes.
    """

    def value_of(section: str, key: str) -> Any:
        found = values.get(section)
        return found.get(key) if isinstance(found, dict) else getattr(found, key, None)

    method = value_of("computation", "method")
    is_set = "algorithm" in _keys_set(values.get("training"))
    name = value_of("training", "algorithm") if is_set else method if method in ONLINE_METHODS else "ppo"
    if not isinstance(name, str) or ALGORITHMS.why_missing(name) or (":" not in name and name not in ALGORITHMS):
        return values
    found = dict(values)
    for key, value in {"training.algorithm": name, **ALGORITHMS[name].defaults}.items():
        section, inner = key.split(".")
        # A config without `training` is told so, whatever its algorithm brings.
        part = found.get(section, None if section == "training" else {})
        if inner in _keys_set(part):
            continue
        if isinstance(part, dict):
            found[section] = {**part, inner: value}
        elif isinstance(part, Section):
            found[section] = part.model_copy(update={inner: value})
    return found


def _keys_set(section: Any) -> Collection[str]:
    return section.model_fields_set if isinstance(section, Section) else section if isinstance(section, dict) else ()


def _check_answers(config: PpoConfig) -> Iterator[Problem]:
    """Refuse keys that need answered validation prompts if there are none."""
    training, evaluation = config.training, config.evaluation
    if evaluation.prompts > 0 or not config.data.has_validation or training.validate_every == "never":
        return
    expected = "evaluation.prompts of at least 1"
    if training.early_stopping is not None:
        fields = ("training.early_stopping", "evaluation.prompts")
        yield Problem(fields, "early stopping with evaluation.prompts 0", expected)
    if training.schedule == "plateau":
        fields = ("training.schedule", "evaluation.prompts")
        yield Problem(fields, '"plateau" with evaluation.prompts 0', f"{expected}, or another schedule")


def _check_algorithm(config: PpoConfig) -> Iterator[Problem]:
    """Check the groups of responses that the algorithm needs, and what chooses their prompts."""
    training, method = config.training, config.computation.method
    name, number, size = training.algorithm, config.generation.responses_per_prompt, training.batch_size
    if method in ONLINE_METHODS and method != "ppo" and name != method:
        fields = ("training.algorithm", "computation.method")
        hint = 'a method\'s name is its algorithm; "method": "ppo" takes any'
        yield Problem(fields, f'"{name}" with method "{method}"', f'"{method}", or nothing', hint)
    if config.algorithm.groups and number == 1:
        fields = ("generation.responses_per_prompt", "training.algorithm")
        hint = "it compares responses to the same prompt"
        yield Problem(fields, f'1 with algorithm "{name}"', "at least 2", hint)
    if size % number:
        fields = ("training.batch_size", "generation.responses_per_prompt")
        yield Problem(fields, f"{size} responses", f"a multiple of responses_per_prompt ({number})")
    if training.dynamic_sampling and number == 1:
        fields = ("training.dynamic_sampling", "generation.responses_per_prompt")
        hint = "a single response to a prompt always has the same score as itself"
        yield Problem(fields, f"{training.dynamic_sampling} with 1 response to a prompt", "at least 2", hint)
    if training.curriculum is not None and config.rollout.max_staleness > 0:
        fields = ("training.curriculum", "rollout.max_staleness")
        hint = "the prompts of later iterations would be drawn before the scores that choose them are known"
        yield Problem(fields, f"with max_staleness {config.rollout.max_staleness}", "max_staleness 0", hint)


def _check_reward(config: PpoConfig) -> Iterator[Problem]:
    """Refuse a reward that is always 0, and a value model from a missing reward model."""
    yield from check_reward(config.reward, config.data.reward_model, has_own=config.environment is not None)
    if config.data.reward_model is None and config.reward.functions and config.value_model == "reward":
        fields = ("training.value_model", "data.reward_model", "training.algorithm")
        yield Problem(fields, '"reward" without a reward model', '"policy" or "shared", or data.reward_model')


def _check_penalty(training: PpoTrainingSection) -> Iterator[Problem]:
    """Check the keys of the KL penalty."""
    if training.kl_in == "loss" and training.kl_estimator == "k1":
        fields = ("training.kl_estimator", "training.kl_in")
        hint = "as a loss, k1 has the gradient 0 in expectation, k2 that of the KL, k3 that of the forward KL (GRPO)"
        yield Problem(fields, '"k1" with kl_in "loss"', '"k2", "k3", or nothing', hint)
    if training.kl_target is not None and training.kl_coefficient == 0:
        fields = ("training.kl_target", "training.kl_coefficient")
        actual = f"{training.kl_target} with kl_coefficient 0"
        yield Problem(fields, actual, "kl_coefficient > 0", "the controller multiplies the coefficient, so 0 stays 0")


def _check_lengths(config: PpoConfig) -> Iterator[Problem]:
    """Check that prompt and response fit max_length."""
    new, most, longest = config.longest_response, config.training.max_length, config.data.max_prompt_tokens
    key = "generation.max_new_tokens" if config.environment is None else "environment.max_tokens"
    if most is None:
        return
    fields: tuple[str, ...]
    if new >= most:
        fields = (key, "training.max_length")
        yield Problem(fields, str(new), f"fewer than max_length ({most}), which counts prompt and response")
    elif longest is not None and longest + new > most:
        fields = ("data.max_prompt_tokens", key, "training.max_length")
        actual = f"{longest}, which with {new} new tokens is over max_length ({most})"
        yield Problem(fields, actual, f"at most {most - new}")


def _effects(config: PpoConfig) -> dict[str, tuple[bool, str]]:
    """Keys that may have no effect → whether they have one, and the reason if not."""
    training, evaluation, guards = config.training, config.evaluation, config.guards
    critic = (config.algorithm.critic, f'the algorithm "{training.algorithm}" has no critic')
    target = config.algorithm.advantages
    # A function of the user may read every setting.
    built_in = target.target.partition(":")[2] if isinstance(target, Reference) else ""
    relative = (
        built_in in ("", "relative_advantages"),
        f'the advantages of "{training.algorithm}" are not relative to other responses',
    )
    has_model, has_penalty = config.data.reward_model is not None, training.kl_coefficient > 0
    limits = (guards.kl, guards.entropy_share, guards.length_ratio, guards.repetition)
    is_guarded = any(limit is not None for limit in (*limits, guards.eos_rate_drop, guards.judge_drop))
    unanswered = (config.validates, "no validation prompts are answered")
    has_processes = config.environment is not None and config.environment.isolation == "process"
    in_processes = (has_processes, 'isolation is not "process"')
    return {
        **checks.effects(training),
        **text_effects(config.data),
        **rollout_effects(config.rollout),
        "training.head_learning_rate": (False, "the value model's rate is value_learning_rate"),
        "training.router_aux_loss": (False, "a policy is trained without it"),
        "training.value_model": critic,
        "training.value_learning_rate": critic,
        "training.value_coefficient": critic,
        "training.value_clip": critic,
        "training.advantage_baseline": relative,
        "training.advantage_scale": relative,
        "generation.overlong_penalty": (config.generation.overlong_buffer is not None, "overlong_buffer is not set"),
        "training.gae_lambda": critic if built_in else (True, ""),
        "training.kl_in": (has_penalty, "kl_coefficient is 0"),
        "training.kl_estimator": (has_penalty, "kl_coefficient is 0"),
        "training.kl_importance": (has_penalty and training.kl_in == "loss", "there is no KL in the loss"),
        "training.kl_horizon": (training.kl_target is not None, "kl_target is not set"),
        "environment.tool_memory": in_processes,
        "environment.tool_processes": in_processes,
        "reward.model_weight": (has_model, "there is no data.reward_model"),
        "reward.ensemble_penalty": (has_model, "there is no data.reward_model"),
        "guards.judge_drop": (evaluation.judge is not None, "there is no evaluation.judge"),
        "guards.patience": (is_guarded, "no guard has a limit"),
        "guards.stop": (is_guarded, "no guard has a limit"),
        "evaluation.judge": unanswered,
        "evaluation.responses": unanswered,
        "evaluation.best_of": (
            (config.validates and training.validate_at_start, "nothing is validated before the first step")
            if config.validates
            else unanswered
        ),
        "evaluation.kl_limit": unanswered,
    }
