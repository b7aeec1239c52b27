"""The config of preference optimization (`PreferenceConfig`): DPO and its relatives, each method name a preset of
`preference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.keys import AS_IT_IS, MAY_BE_OWN, Count, Location, Section, Text
from loopos.config.learning_rates import rate_notes
from loopos.config.preferences import (
    PreferenceRole,
    check_reward_model,
    check_text_files,
    text_effects,
    validation_notes,
)
from loopos.config.registry import choices, did_you_mean
from loopos.config.reward_model import EXAMPLE_LINES, EXAMPLE_ROW, PreferenceDataSection
from loopos.config.rewards import PpoRewardSection, check_reward
from loopos.config.rl import (
    OnlineSection,
    PreferenceEvaluationSection,
    ResponseSection,
    check_judge,
)
from loopos.config.sections import (
    ComputationSection,
    DistributedSection,
    EarlyStoppingSection,
    LanguageModelSection,
    LanguageTrainingSection,
    MethodConfig,
    check_distributed,
)
from loopos.config.variants import LOSSES, PREFERENCE

JUDGED_METRICS = ("win_rate", "judge")
"""Validation metrics of generated answers."""
PreferenceMetric = Annotated[Literal["loss", "accuracy", "reward_margin", "win_rate", "judge"], MAY_BE_OWN, AS_IT_IS]
"""Validation metrics: the loss, the fraction of pairs whose chosen response has the larger implicit reward, the mean
difference of the rewards; and of generated answers the win rate against the start and the judge's mean score."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What a method name stands for. `losses`: loss → weight."""

    losses: Mapping[str, float]
    beta: float = 0.1


PRESETS: Mapping[str, Preset] = {
    "dpo": Preset({"sigmoid": 1.0}),
    "ipo": Preset({"ipo": 1.0}),
    "simpo": Preset({"simpo": 1.0}, beta=2.0),
    "orpo": Preset({"orpo": 1.0, "sft": 1.0}),
    "cpo": Preset({"cpo": 1.0, "sft": 1.0}),
    "apo_zero": Preset({"apo_zero": 1.0}),
    "apo_down": Preset({"apo_down": 1.0}),
    "aot": Preset({"aot": 1.0}),
    "bco": Preset({"bco": 1.0}),
    "exo": Preset({"exo": 1.0}),
    "nca": Preset({"nca": 1.0}),
    "sppo": Preset({"sppo": 1.0}),
    "slic": Preset({"hinge": 1.0}),
    "discopop": Preset({"discopop": 1.0}),
    "robust_dpo": Preset({"robust": 1.0}),
    "mpo": Preset({"sigmoid": 0.8, "bco": 0.2, "sft": 1.0}),
}
"""Method name → preset. beta is that of the paper's or its authors' code where they give one."""

KTO = "kto"
_OF_LOSSES = ("label_smoothing", "simpo_margin", "discopop_temperature", "divergence", "margins", "soft_labels")
"""Keys of `preference` that only some losses read (`LossRow.reads`)."""


class SyncReferenceSection(Section):
    """When the reference takes over some of the policy (TR-DPO)."""

    every: Count = Field(default=512, description="optimizer steps from one synchronization to the next")
    alpha: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="weight of the policy in the mix, weight by weight; 1 replaces the reference"
    )


class PreferenceSection(Section):
    """What is learned from a comparison."""

    loss: Text | dict[Text, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="name of a loss, or names with weights; the method's own when absent"
    )
    beta: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="strength of the pull to the reference; the method's own when absent"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="probability that a row's order is wrong (cDPO, robust DPO, EXO, AOT)"
    )
    simpo_margin: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="margin of SimPO between the mean log-probabilities, times beta"
    )
    discopop_temperature: Annotated[float, Field(gt=0)] = Field(
        default=0.05, description="temperature of the mix in DiscoPOP"
    )
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = Field(
        default="reverse_kl", description="divergence that keeps the policy near the reference"
    )
    divergence_alpha: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.5, description="alpha of divergence alpha")
    length_alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0,
        description="weight of the tokens beyond the length of a pair's shorter response (LD-DPO); 1 is all",
    )
    wpo: bool = Field(
        default=False,
        description="weigh each pair by how likely the policy is to write its responses (WPO)",
    )
    desirable_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="weight of desirable answers in KTO"
    )
    undesirable_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="weight of undesirable answers in KTO"
    )
    margins: bool = Field(default=False, description="subtract the rows' margins from the difference of the rewards")
    soft_labels: bool = Field(
        default=True, description="use p_human, the fraction of people who preferred the chosen response, as the target"
    )
    reference: Literal["auto", "adapter", "cached", "copy"] = Field(
        default="auto",
        description="log-probabilities of the reference: adapter (the weights without the adapters that train, in each "
        "step), cached (computed once and kept on disk), copy (a second copy of the weights that train, in memory), or "
        "auto (copy with sync_reference, else adapter with trainable lora, else cached)",
    )
    sync_reference: SyncReferenceSection | None = Field(
        default=None, description="when the reference moves towards the policy; null keeps the start"
    )
    reference_cache: Location | None = Field(
        default=None, description="folder of the cached log-probabilities; the run's own when absent"
    )


class PreferenceEarlyStoppingSection(EarlyStoppingSection):
    """When to stop before the last epoch."""

    metric: PreferenceMetric | None = Field(  # type: ignore[assignment]
        default=None, description="metric to monitor; training.metric when absent"
    )


class PreferenceTrainingSection(LanguageTrainingSection):
    """The optimizer, its schedule, what trains, and when to validate, save and stop; a sequence is a comparison."""

    early_stopping: PreferenceEarlyStoppingSection | None = Field(
        default=None, description="when to stop early; null is never"
    )
    metric: PreferenceMetric | None = Field(  # type: ignore[assignment]
        default=None, description="metric that selects the best checkpoint; accuracy when absent"
    )


class PolicyDataSection(PreferenceDataSection):
    """Where the weights and the preferences come from, how they are read, and where the run goes."""

    new_tokens: list[Text] = Field(
        default=[], description="tokens that are added to the tokenizer; their rows start as the mean of their pieces'"
    )
    new_special_tokens: list[Text] = Field(
        default=[], description="the same for special tokens, which decoding leaves out"
    )
    # The roles of comparisons, and those of answers with a thumb.
    columns: dict[PreferenceRole | Literal["completion", "label", "messages"], Text | None] = Field(  # type: ignore[assignment]
        default={}, description="column of each role; detected when absent, null for none"
    )
    row_keys: ClassVar[tuple[str, ...]] = (*PreferenceDataSection.row_keys, "prompts")
    prompts: Location | None = Field(
        default=None,
        description='with online, file, folder, glob or hub id "org/name" of the prompts to answer, in place of '
        "comparisons",
    )
    reward_model: Location | Annotated[list[Location], Field(min_length=1)] | None = Field(
        default=None,
        description="with online, folder of a reward_model run, or of its model; several are an ensemble; null with "
        "only functions",
    )

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The folders of all reward models."""
        models = self.reward_model
        return () if models is None else (models,) if isinstance(models, str) else tuple(models)

    @property
    def source(self) -> str:
        """The rows to train on: comparisons or thumbs, or prompts."""
        return self.prompts or super().source


class PreferenceConfig(MethodConfig):
    """Config of a run of preference optimization."""

    description: str = Field(default="", description="free text")
    model: LanguageModelSection = Field(default_factory=LanguageModelSection, description="the model's sizes")
    computation: ComputationSection = Field(description="the method")
    training: PreferenceTrainingSection = Field(description="optimizer, schedule and checkpoints")
    preference: PreferenceSection = Field(
        default_factory=PreferenceSection, description="what is learned from a comparison"
    )
    online: OnlineSection | None = Field(
        default=None, description="comparisons of answers that the policy writes within the run; null is only the rows"
    )
    reward: PpoRewardSection = Field(
        default_factory=PpoRewardSection, description="with online, the reward that compares answers"
    )
    generation: ResponseSection = Field(
        default_factory=ResponseSection, description="how answers to validation prompts are sampled"
    )
    evaluation: PreferenceEvaluationSection | None = Field(
        default=None, description="answers to validation prompts while training; null generates none"
    )
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="how the run is distributed over processes"
    )
    data: PolicyDataSection = Field(description="weights, rows and output folder")

    @property
    def preset(self) -> Preset:
        """The preset of the method's name; `preference` is DPO."""
        return PRESETS.get(self.computation.method, PRESETS["dpo"])

    @property
    def losses(self) -> Mapping[str, float]:
        """Name of each loss → weight."""
        chosen = self.preference.loss
        if chosen is None:
            return self.preset.losses
        return {chosen: 1.0} if isinstance(chosen, str) else chosen

    @property
    def beta(self) -> float:
        """Strength of the pull to the reference."""
        return self.preset.beta if self.preference.beta is None else self.preference.beta

    @property
    def needs_reference(self) -> bool:
        """Whether any loss reads the reference."""
        return self.computation.method == KTO or any(LOSSES[name].reference for name in self.losses)

    @property
    def trains_rows(self) -> bool:
        """Whether rows of the embeddings train beside adapters."""
        return self.training.trainable == "lora" and bool(self.data.new_tokens or self.data.new_special_tokens)

    @property
    def copies_reference(self) -> bool:
        """Whether the reference has its own copy of the weights that train."""
        section = self.preference
        return self.needs_reference and (section.reference == "copy" or section.sync_reference is not None)

    @property
    def caches_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed once and kept."""
        chosen = self.preference.reference
        cached = chosen == "cached" or (chosen == "auto" and not self.starts_without_adapters)
        return self.needs_reference and not self.copies_reference and cached

    @property
    def weighs_pairs(self) -> bool:
        """Whether WPO weighs the pairs; KTO has none."""
        return self.preference.wpo and self.computation.method != KTO

    @property
    def validates(self) -> bool:
        """Whether validation ever runs."""
        return self.data.has_validation and self.training.validate_every != "never"

    @property
    def generates(self) -> bool:
        return self.validates and self.evaluation is not None

    @property
    def num_generated(self) -> int:
        return 0 if self.evaluation is None else self.evaluation.prompts

    @property
    def copies_start(self) -> bool:
        section = self.evaluation if self.generates else None
        return section is not None and section.reference_copy and not self.starts_without_adapters

    @property
    def starts_without_adapters(self) -> bool:
        """Whether the model without its adapters is the one that training starts from."""
        return self.training.trainable == "lora" and not self.trains_rows

    def check(self) -> Iterator[Problem]:
        model, training, data = self.model, self.training, self.data
        yield from checks.check_weights_and_sizes(model, data.pretrained_weights, data.tokenizer)
        yield from checks.check_trainable(training, model.num_layers, data.adapter)
        yield from checks.check_new_tokens(data.new_tokens, data.new_special_tokens)
        yield from checks.check_no_head(training)
        yield from checks.check_steps(training)
        yield from checks.check_optimizer(training)
        yield from check_distributed(self.distributed, training.optimizer)
        yield from checks.check_validation(training, has_validation=data.has_validation)
        yield from checks.check_source({key: getattr(data, key) for key in (*data.source_keys, "prompts")})
        yield from checks.check_reading(
            streaming=data.streaming, max_rows=data.max_rows, columns=data.columns.items(), encoding=data.encoding
        )
        family = [name for name in LOSSES if PREFERENCE in LOSSES[name].methods]
        for name in self.losses:
            if ":" in name or name in LOSSES:
                yield from checks.check_loss("preference.loss", name, PREFERENCE)
            else:
                yield Problem(("preference.loss",), f'"{name}"', choices(family), did_you_mean(name, family))
        if self.computation.method == KTO and self.preference.loss is not None:
            fields = ("preference.loss", "computation.method")
            yield Problem(fields, f"{self.preference.loss!r} with the method kto", "no such key: KTO is one loss")
        known = [name for name in self.losses if ":" in name or name in LOSSES]
        ranked = [name for name in known if LOSSES[name].ranks]
        if self.weighs_pairs and ranked:
            hint = "it compares ranks of all pairs of a step, among which a weight has no pair"
            yield Problem(("preference.wpo", "preference.loss"), f'true with the loss "{ranked[0]}"', "false", hint)
        yield from _check_answers(self)
        if self.preference.reference == "adapter" and training.trainable != "lora":
            fields = ("preference.reference", "training.trainable")
            yield Problem(fields, f'"adapter" with trainable {training.trainable}', 'trainable "lora", or "cached"')
        elif self.preference.reference == "adapter" and self.trains_rows:
            hint = "their rows train beside the adapters, so the weights without adapters are not the reference"
            yield Problem(("preference.reference", "data.new_tokens"), '"adapter" with new tokens', '"cached"', hint)
        # Whether there is a reference is unknown with an unknown loss.
        if len(known) == len(self.losses):
            yield from self._check_copy()
            yield from self._check_online()

    def _check_copy(self) -> Iterator[Problem]:
        """Check that a reference with its own weights is possible."""
        section, distributed = self.preference, self.distributed
        if section.sync_reference is not None and section.reference in ("adapter", "cached"):
            fields = ("preference.sync_reference", "preference.reference")
            hint = "a reference that moves has its own copy of the weights that train"
            yield Problem(fields, f'with reference "{section.reference}"', '"auto" or "copy"', hint)
        if self.copies_reference and (distributed.mode == "shard" or distributed.tensor_parallel > 1):
            key = "reference" if section.sync_reference is None else "sync_reference"
            keys = (f"preference.{key}", "distributed.mode", "distributed.tensor_parallel")
            hint = "each process holds the reference's copy of the weights whole"
            yield Problem(keys, "a copy of a sharded model", 'mode "replicate" and tensor_parallel 1', hint)

    def _check_online(self) -> Iterator[Problem]:
        """Check what the policy's own answers need: a reward, a reference that knows new answers, and room."""
        online, data, limit = self.online, self.data, self.training.max_length
        if online is None:
            for key, value in (("prompts", data.prompts), ("reward_model", data.reward_model)):
                if value is not None:
                    yield Problem((f"data.{key}", "online"), "with no online", "online, or no such key")
            return
        if self.computation.method == KTO:
            hint = "KTO learns from single answers; dpo and its relatives compare them"
            yield Problem(("online", "computation.method"), "online with kto", "a method of comparisons", hint)
        if self.needs_reference and not self.copies_reference and self.training.trainable != "lora":
            keys = ("preference.reference", "online", "training.trainable")
            hint = "answers that the policy writes later have no log-probabilities of the reference beforehand"
            actual = f'"{self.preference.reference}" with trainable {self.training.trainable}'
            expected = '"copy" (the weights once more in memory), trainable "lora", or a loss without a reference'
            yield Problem(keys, actual, expected, hint)
        elif self.caches_reference:
            if self.trains_rows:
                fields, hint = (
                    ("preference.reference", "data.new_tokens"),
                    "rows of new tokens train beside the adapters",
                )
                yield Problem(fields, f'"{self.preference.reference}" with online and new tokens', '"copy"', hint)
            else:
                fields = ("preference.reference", "online")
                yield Problem(fields, '"cached" with online', '"auto", "adapter" or "copy"')
        yield from check_reward(self.reward, data.reward_model)
        if limit is not None and online.max_new_tokens >= limit:
            expected = f"fewer than max_length ({limit}), which counts prompt and answer"
            yield Problem(("online.max_new_tokens", "training.max_length"), str(online.max_new_tokens), expected)

    def check_files(self) -> Iterator[Problem]:
        rows, data = (EXAMPLE_ROW, EXAMPLE_LINES), self.data
        prompts = ('{"prompt": "Where is my parcel?"}', "")
        yield from check_text_files(
            data, {"preference_data": rows, "training_data": rows, "validation_data": rows, "prompts": prompts}
        )
        for number, path in enumerate(data.reward_models):
            field = "data.reward_model" if isinstance(data.reward_model, str) else f"data.reward_model.{number}"
            yield from check_reward_model(field, path)
            if checks.same_path(path, data.output_dir):
                fields = ("data.output_dir", field)
                yield Problem(fields, f'"{data.output_dir}", the folder of the reward model', "another folder")
        if self.evaluation is not None:
            yield from check_judge(self.evaluation)

    def _effects(self) -> dict[str, tuple[bool, str]]:
        """Key of `preference` → whether it has an effect, and why not. A loss of the user may read every key."""
        section, is_kto = self.preference, self.computation.method == KTO
        names = "KTO" if is_kto else " and ".join(self.losses)
        rows = [] if is_kto else [LOSSES[name] for name in self.losses]
        found = {
            key: (any(row.reads is None or key in row.reads for row in rows), f"{names} does not read it")
            for key in _OF_LOSSES
        }
        found |= dict.fromkeys(("desirable_weight", "undesirable_weight"), (is_kto, "only kto reads it"))
        found["divergence_alpha"] = (
            found["divergence"][0] and section.divergence == "alpha",
            "divergence is not alpha",
        )
        found |= dict.fromkeys(("length_alpha", "wpo"), (not is_kto, "KTO does not read it"))
        needed = (self.needs_reference, f"{names} has no reference")
        found |= dict.fromkeys(("reference", "sync_reference"), needed)
        caches = self.caches_reference
        found["reference_cache"] = (caches, "the reference is not cached" if needed[0] else needed[1])
        online, has_model = self.online is not None, self.data.reward_model is not None
        reason = "there is no data.reward_model" if online else "online is not set"
        rewards = {f"reward.{key}": (online, reason) for key in ("functions", "score_clip")}
        rewards |= {f"reward.{key}": (online and has_model, reason) for key in ("model_weight", "ensemble_penalty")}
        return {**{f"preference.{key}": effect for key, effect in found.items()}, **rewards}

    def notes(self) -> list[str]:
        data, training = self.data, self.training
        effects = {**checks.effects(training), **text_effects(data), **self._effects(), **_answer_effects(self)}
        notes = checks.without_effect(self, effects) + rate_notes(self, "policy")
        if self.evaluation is not None and not self.validates:
            notes.append("evaluation has no effect: nothing is validated, so no prompts are answered")
        source = data.preference_data or data.training_data
        if self.online is not None and self.validates and training.validate_every == "epoch":
            notes.append(f"training.validate_every is epoch: with online, after every {self.online.every} steps")
        return notes + validation_notes(training, data, source, validates=self.validates)


def _check_answers(config: PreferenceConfig) -> Iterator[Problem]:
    """Refuse metrics of generated answers that some validations do not measure."""
    training, evaluation = config.training, config.evaluation
    named = {"training.metric": training.metric}
    if training.early_stopping is not None:
        named["training.early_stopping.metric"] = training.early_stopping.metric
    for field, metric in named.items():
        if metric not in JUDGED_METRICS:
            continue
        if evaluation is None or evaluation.judge is None:
            expected = "evaluation.judge, a reward model or a function that scores the answers"
            yield Problem((field, "evaluation.judge"), f'"{metric}" without a judge', expected)
        elif evaluation.every > 1:
            actual = f'"{metric}", which is not part of every validation'
            yield Problem((field, "evaluation.every"), actual, "evaluation.every 1")
        if metric == "win_rate" and not training.validate_at_start:
            actual = '"win_rate" without the answers of the start'
            yield Problem((field, "training.validate_at_start"), actual, "training.validate_at_start true")


def _answer_effects(config: PreferenceConfig) -> dict[str, tuple[bool, str]]:
    """Keys of generated answers that may have no effect → whether they have one, and the reason if not."""
    unanswered = (config.generates, "no validation prompts are answered (there is no section evaluation)")
    return {
        **{f"generation.{key}": unanswered for key in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")},
        "evaluation.reference_copy": (
            not config.starts_without_adapters,
            "with lora the start is the model without its adapters",
        ),
    }
