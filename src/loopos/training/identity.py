"""The identity of a run: what it learns from and what its outputs mean. A resumed run must have the same identity.

The first part compares an identity with a checkpoint's and explains differences by config key. The functions at the end
build the identity of each method from its config, encoded rows, tokenizer, templates and `base`, a fingerprint of the
initial weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.differences import shown
from loopos.config.distillation import DistillationConfig
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.ppo import PpoConfig
from loopos.config.preference import PreferenceConfig
from loopos.config.pretraining import PretrainingConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.config.sections import LoraSection, TrainingSection
from loopos.config.sft import SftConfig
from loopos.data.digest import (
    comparisons_digest,
    prompts_digest,
    records_digest,
    rows_digest,
    stepwise_digest,
    text_digest,
    tokenizer_digest,
)
from loopos.data.label_space import LabelSpace
from loopos.data.preference_tokens import EncodedComparison, PreferenceEncoder
from loopos.data.stepwise_tokens import EncodedStepwise
from loopos.data.supervised_tokens import SupervisedEncoder
from loopos.data.tokens import Encoded
from loopos.storage.durable import JSON
from loopos.training.update import Update

_MOST_CHARACTERS = 200
# Keys of the data that decide neither the training rows nor what they mean.
_NOT_OF_THE_ROWS = (
    "output_dir",
    "output_weights",
    "validation_data",
    "validation_split",
    "pretrained_weights",
    "adapter",
)
_DIGITS = 12
_BEFORE_SFT = "chain_of_thought"

Settings: TypeAlias = Mapping[str, tuple[Any, Any]]
"""Dotted key of the config → its value before and now, of those that differ."""


@dataclass(frozen=True)
class Trait:
    """One property that must stay the same. `value`: JSON, or with `digest_of` a digest of what that names. `keys`:
    config keys that decide it, the most important first; "data." stands for all keys of the section `data`. `sentence`:
    message for a difference, with {was} and {now}, if it is not "KEY: was …, is …". `if_absent`: the value in runs of
    versions that did not record the trait; None where that cannot be known. `same_as`: what an older version recorded
    for the same.
    """

    value: JSON
    keys: tuple[str, ...]
    digest_of: str = ""
    sentence: str = ""
    if_absent: JSON = None
    same_as: JSON = None

    def decided_by(self, changed: Settings) -> list[str]:
        """The changed keys that decide this trait."""
        return [key for key in changed if any(_covers(own_key, key) for own_key in self.keys)]

    def difference(self, saved: object) -> str:
        """The message for a trait that differs although none of its keys does."""
        if self.sentence:
            return self.sentence.format(was=_short(saved), now=_short(self.value))
        if self.digest_of:
            was, now = str(saved)[:_DIGITS], str(self.value)[:_DIGITS]
            return f"{self.keys[0]}: {self.digest_of} differ from those of the run (digest {was}, now {now})"
        return f"{self.keys[0]}: was {_short(saved)}, is {_short(self.value)}"


Identity: TypeAlias = Mapping[str, Trait]
"""Name → trait. The names stand in checkpoints."""


def setting(key: str, value: JSON, *, if_absent: JSON = None) -> dict[str, Trait]:
    """A setting that must keep its effective value, named after its key. if_absent: as in `Trait`."""
    return {key: Trait(value, (key,), if_absent=if_absent)}


class RowCounts(Protocol):
    """The row counts that identify a run."""

    @property
    def num_rows(self) -> int: ...

    @property
    def rows_a_step(self) -> int: ...


def of_training(settings: TrainingSection, batches: RowCounts, update: Update) -> dict[str, Trait]:
    """What decides the numbers in a checkpoint and their order, for all methods."""
    lora = settings.lora if settings.trainable == "lora" else None
    master_weights, shapes = (
        update.master_weights,
        ("training.trainable", "training.freeze_layers", "training.lora", "model"),
    )
    by_step = ("training.batch_size", "training.gradient_accumulation", "distributed.tensor_parallel")
    return {
        "rows": Trait(batches.num_rows, (), sentence="training rows: were {was}, are {now}"),
        "rows_a_step": Trait(
            batches.rows_a_step,
            by_step,
            sentence="rows of a step (batch_size × gradient_accumulation × processes): were {was}, are {now}",
        ),
        "weights that train": Trait(
            f"{len(master_weights.parameters)} tensors of {master_weights.num_elements:,} numbers",
            shapes,
            sentence="weights that train: were {was}, are {now}",
        ),
        **setting("training.optimizer", settings.optimizer),
        **setting("training.seed", settings.seed),
        **setting("training.shuffle", settings.shuffle),
        **setting("training.trainable", settings.trainable),
        **setting("training.freeze_layers", settings.freeze_layers),
        **setting("training.router_aux_loss", settings.router_aux_loss),
        **(_of_adapters(lora) if lora is not None else {}),
    }


def _of_adapters(lora: LoraSection) -> dict[str, Trait]:
    """What the shapes of the adapters do not tell: their scales, and a start that was taken out of the base."""
    newer: dict[str, JSON] = {"use_rslora": lora.use_rslora, "init_lora_weights": lora.init_lora_weights}
    newer |= {"rank_pattern": lora.rank_pattern, "alpha_pattern": lora.alpha_pattern}
    found = setting("training.lora.alpha", lora.alpha)
    for key, value in newer.items():
        # What an older version did has no value where a setting was left out.
        found |= setting(f"training.lora.{key}", value, if_absent=LoraSection.model_fields[key].default)
    return found


@dataclass(frozen=True)
class Comparison:
    """The comparison of a run with its checkpoint. `refused`: why it is another run. `changed`: settings that may
    change and did. `unknown`: traits that a checkpoint of an older version does not record.
    """

    refused: list[str]
    changed: dict[str, tuple[Any, Any]]
    unknown: list[str]

    def sentences(self) -> list[str]:
        """One line per changed setting, and one for traits that cannot be checked."""
        lines = [was_is(key, *values) for key, values in self.changed.items()]
        if self.unknown:
            lines.append(
                f"this run was started by an older version, whose checkpoints do not record {', '.join(self.unknown)}: "
                "whether these are the same cannot be checked"
            )
        return lines


def compare(saved: Mapping[str, Any], identity: Identity, changed: Settings) -> Comparison:
    """Compares a run with what its checkpoint saved. changed: settings that differ from those of the checkpoint's
    session.
    """
    saved = {**{name: each.if_absent for name, each in identity.items() if each.if_absent is not None}, **saved}
    refused: list[str] = []
    causes: list[str] = []
    for name, trait in identity.items():
        keys = trait.decided_by(changed)
        if name not in saved:
            # Checkpoint of an older version: only the config can be compared.
            keys = [] if trait.digest_of else keys
        elif saved[name] == trait.value or (trait.same_as is not None and saved[name] == trait.same_as):
            continue
        causes += keys
        refused += [was_is(key, *changed[key]) for key in keys]
        if name in saved and (not keys or trait.digest_of):
            refused.append(trait.difference(saved[name]))
    remaining = {key: values for key, values in changed.items() if key not in causes}
    return Comparison(list(dict.fromkeys(refused)), remaining, [name for name in identity if name not in saved])


def was_is(key: str, was: object, now: object) -> str:
    """A message for a changed setting."""
    return f"{key}: was {_short(was)}, is {_short(now)}"


def values_of(identity: Identity) -> dict[str, JSON]:
    """What a checkpoint saves."""
    return {name: trait.value for name, trait in identity.items()}


def as_lines(sentences: Iterable[str]) -> str:
    """Sentences as indented lines."""
    return "".join(f"\n  {sentence}" for sentence in sentences)


def _covers(own_key: str, key: str) -> bool:
    if own_key == "data.":
        return key.startswith(own_key) and key.split(".")[1] not in _NOT_OF_THE_ROWS
    return key == own_key or key.startswith(f"{own_key}.")


def _short(value: object) -> str:
    text = shown(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


_Config: TypeAlias = FineTuningConfig | SftConfig | RewardModelConfig | PreferenceConfig | PpoConfig | PretrainingConfig


def of_task(
    config: FineTuningConfig,
    space: LabelSpace,
    rows: Sequence[Encoded],
    targets: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    base: str,
) -> Identity:
    """Identity of a head: rows with their targets, classes, pooling and loss."""
    section = config.model
    losses: tuple[tuple[str, Any], ...] = (("class_weights", section.class_weights),)
    if space.task == "classification":
        losses += (("label_smoothing", section.label_smoothing),)
    elif space.task == "regression":
        losses = (("regression_loss", section.regression_loss), ("huber_delta", section.huber_delta))
    own_loss = section.model_copy(update={"loss": None}).loss_of(space.task)
    named = (("task", space.task), ("labels", list(space.class_names)), ("pooling", section.pooling), *losses)
    return {
        **_learned_from(config, "training_data", rows_digest(rows, targets), tokenizer, max_length, base),
        **{f"model.{key}": Trait(value, (f"model.{key}",)) for key, value in named},
        **setting("model.loss", section.loss or own_loss, if_absent=own_loss),
    }


def of_sft(config: SftConfig, rows: Sequence[Encoded], encoder: SupervisedEncoder, *, base: str) -> Identity:
    """Identity of a language model: rows with the weight of each token, and the template."""
    key, digest = config.data.source_key, rows_digest(rows)
    return {
        **_learned_from(config, key, digest, encoder.tokenizer, encoder.max_length, base),
        **_template(encoder.template.source),
    }


def of_distillation(
    config: DistillationConfig, rows: Sequence[Encoded], encoder: SupervisedEncoder, *, base: str, teacher: str
) -> Identity:
    """Identity of a student: that of `of_sft`, the teacher, and how it is learned from. teacher: the fingerprint of its
    weights, or the digest of its stored candidates.
    """
    section, online = config.distillation, config.online
    answers = online.model_dump(mode="json") if config.is_on_policy else None
    return {
        **of_sft(config, rows, encoder, base=base),
        "teacher": Trait(teacher, ("data.teacher", f"data.{config.data.source_key}"), "the teacher's weights"),
        **{
            f"distillation.{name}": Trait(getattr(section, name), (f"distillation.{name}",))
            for name in ("loss", "beta", "temperature", "on_policy_fraction")
        },
        **setting("online", answers),
    }


def of_reasoning(config: SftConfig, rows: Sequence[Encoded], encoder: SupervisedEncoder, *, base: str) -> Identity:
    """Identity of a language model that reasons: that of `of_sft`, and the step format."""
    step_format = setting("data.step_format", asdict(encoder.step_format))
    return {**of_sft(config, rows, encoder, base=base), **step_format}


def of_preferences(
    config: RewardModelConfig, rows: Sequence[EncodedComparison], encoder: PreferenceEncoder, *, base: str
) -> Identity:
    """Identity of a reward model: comparisons with their pairs, and the settings of the pair loss."""
    key = "preference_data" if config.data.preference_data else "training_data"
    learned = ("heads", "center_rewards", "margins", "soft_labels")
    return {
        **_learned_from(config, key, comparisons_digest(rows), encoder.tokenizer, encoder.max_length, base),
        **_template(encoder.template.source),
        **{f"reward.{name}": Trait(getattr(config.reward, name), (f"reward.{name}",)) for name in learned},
        **setting("reward.loss", config.reward.loss, if_absent="bradley_terry"),
    }


def of_step_labels(
    config: RewardModelConfig, rows: Sequence[EncodedStepwise], encoder: PreferenceEncoder, *, base: str
) -> Identity:
    """Identity of a process reward model: answers with the labels of their steps, and how they are read."""
    key = "preference_data" if config.data.preference_data else "training_data"
    return {
        **_learned_from(config, key, stepwise_digest(rows), encoder.tokenizer, encoder.max_length, base),
        **_template(encoder.template.source),
        **{
            f"reward.{name}": Trait(getattr(config.reward, name), (f"reward.{name}",))
            for name in ("heads", "soft_labels")
        },
        **setting("reward.process.step_separator", config.reward.process.step_separator),
    }


def of_comparisons(config: PreferenceConfig, rows: str, encoder: PreferenceEncoder, *, base: str) -> Identity:
    """Identity of a policy trained on comparisons or thumbs, and the losses. rows: their digest."""
    names = [*config.data.source_keys, "prompts"]
    key = next(name for name in names if getattr(config.data, name) is not None)
    section, sync, online = config.preference, config.preference.sync_reference, config.online
    learned = (
        "label_smoothing",
        "simpo_margin",
        "discopop_temperature",
        "divergence",
        "divergence_alpha",
        "length_alpha",
        "desirable_weight",
        "undesirable_weight",
        "margins",
        "soft_labels",
    )
    return {
        **_learned_from(config, key, rows, encoder.tokenizer, encoder.max_length, base),
        **_template(encoder.template.source),
        **setting("preference.loss", dict(config.losses)),
        **setting("preference.beta", config.beta),
        **{f"preference.{name}": Trait(getattr(section, name), (f"preference.{name}",)) for name in learned},
        **setting("preference.wpo", section.wpo, if_absent=False),
        **(setting("reward", config.reward.identity) if online is not None else {}),
        **setting("online.every", None if online is None else online.every),
        **setting("online.responses_per_prompt", None if online is None else online.responses_per_prompt),
        **setting("preference.sync_reference", None if sync is None else sync.model_dump(mode="json")),
    }


def of_policy(
    config: PpoConfig,
    prompts: Sequence[Sequence[int]],
    encoder: PreferenceEncoder,
    *,
    base: str,
    rows: Sequence[Mapping[str, object]] | None = None,
) -> Identity:
    """Identity of a policy: the prompts and the rewards. base: of policy and reward models. rows: of the prompts, whose
    columns decide the rewards too; None where they do not.
    """
    key = "prompts" if config.data.prompts else "training_data"
    columns = {}
    if rows is not None:
        columns["columns"] = Trait(records_digest(rows), (f"data.{key}", "data."), "the columns of the prompts' rows")
    return {
        **_learned_from(config, key, prompts_digest(prompts), encoder.tokenizer, encoder.max_length, base),
        **columns,
        **_template(encoder.template.source),
        **setting("reward", config.reward.identity),
        **setting("environment", _played(config), if_absent=None),
        **setting("training.value_model", config.training.value_model),
        **setting("training.algorithm", config.training.algorithm, if_absent="ppo"),
        **setting("generation.responses_per_prompt", config.generation.responses_per_prompt, if_absent=1),
    }


def _played(config: PpoConfig) -> dict[str, Any] | None:
    # Where tools run does not change what they answer.
    outside = {"isolation", "tool_memory", "tool_processes"}
    return None if config.environment is None else config.environment.model_dump(mode="json", exclude=outside)


def of_text(
    config: PretrainingConfig, segments: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Identity:
    """Identity of a new language model: segments of text, and the sizes that the number of weights does not
    determine.
    """
    key = "input_file" if config.data.input_file else "training_data"
    return {
        **_learned_from(config, key, rows_digest(segments), tokenizer, max_length, "new"),
        **setting("model.num_heads", config.model.num_heads),
        **setting("model.num_key_value_heads", config.model.num_key_value_heads),
    }


def _learned_from(
    config: _Config, key: str, rows: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, base: str
) -> dict[str, Trait]:
    """Traits of every method. key: the key of `data` that names the rows. rows: digest of the encoded rows in their
    order. max_length: the effective value.
    """
    method = config.computation.method
    decides = (f"data.{key}", "data.", "training.max_length", "training.seed", "model.labels", "model.task")
    return {
        # Before sft was a method, its name meant chain_of_thought.
        "computation.method": Trait(method, ("computation.method",), same_as=_BEFORE_SFT if method == "sft" else None),
        "base": Trait(base, ("data.pretrained_weights", "data.adapter", "data.reward_model"), "the weights"),
        "training rows": Trait(rows, decides, "the encoded rows"),
        "data.tokenizer": Trait(
            tokenizer_digest(tokenizer),
            ("data.tokenizer", "data.new_tokens", "data.new_special_tokens"),
            "the tokenizer's tokens",
        ),
        **setting("training.max_length", max_length),
    }


def _template(source: str) -> dict[str, Trait]:
    return {"data.chat_template": Trait(text_digest(source), ("data.chat_template",), "the templates")}
