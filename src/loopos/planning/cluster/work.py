"""The load of a method on each GPU, from only its config and the shapes of its models.

No row is read: a forward pass is assumed to be full, `batch_size` sequences of `max_length` tokens, unless the tokens
are specified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from loopos.config.diagnostics import UserError
from loopos.config.distillation import DistillationConfig
from loopos.config.methods import method_row
from loopos.config.ppo import PpoConfig
from loopos.config.sections import TrainingSection
from loopos.models.load import Sizes, load_config, new_config
from loopos.models.tokenizers import open_tokenizer
from loopos.planning import estimate
from loopos.planning.dry_run import generated_rows, teacher_model
from loopos.planning.policy import written_together
from loopos.planning.shapes import Model, meta_model, role_shapes, value_head
from loopos.planning.work import RewardShape, planned_reward_shape, trained_reward_shapes

# The default number of classes if neither the config nor the labels give it; a head is small.
_UNKNOWN_CLASSES = 2
# A comparison has at least two responses, with a prompt before each.
_RESPONSES = 2


@dataclass(frozen=True)
class Network:
    """A role. `parameters`: those that only it has; `model`: the model of its passes; `summary`: a description."""

    role: str
    parameters: estimate.Parameters
    model: Model
    summary: str

    @property
    def has_own_pass(self) -> bool:
        """Whether it runs layers; a head on the policy's hidden states does not."""
        return self.parameters.multiplied > 0

    @property
    def has_own_weights(self) -> bool:
        """Whether it is more than an adapter or a head over another role's weights."""
        return self.parameters.total >= self.model.units.outside + self.model.units.layer


@dataclass(frozen=True)
class Cache:
    """Keys and values of `rows` that are generated together, each with room for `columns` tokens."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Load:
    """One phase. `rows` of a forward pass, each of `row_tokens`; `accumulation`: passes per optimizer step; `steps`:
    optimizer steps of a PPO iteration, else 1; `writes_responses`: whether it is PPO. `batch_is_rows`: whether
    training.batch_size is `rows`.
    """

    phase: str
    training: TrainingSection
    networks: list[Network]
    rows: int
    row_tokens: int
    accumulation: int
    cache: Cache | None = None
    steps: int = 1
    writes_responses: bool = False
    batch_is_rows: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass."""
        return self.rows * self.row_tokens

    @property
    def trained(self) -> list[Network]:
        return [network for network in self.networks if network.parameters.trained]


def loads_of(config: Any, *, tokens: int | None, trust_remote_code: bool) -> list[Load]:
    """The phases of a config's method. tokens: of a forward pass, if known. Raises `UserError`."""
    if len(config.phases) > 1:
        *earlier, ppo = config.phases
        first = [
            load for phase in earlier for load in loads_of(phase, tokens=tokens, trust_remote_code=trust_remote_code)
        ]
        described = _architecture(ppo, trust_remote_code)
        rewards = [planned_reward_shape(phase, described) for phase in earlier]
        return [*first, _policy_load(ppo, described, rewards, tokens, trust_remote_code)]
    described = _architecture(config, trust_remote_code)
    if method_row(config.computation.method).trains == "roles":
        tokenizer = open_tokenizer(
            config.data.pretrained_weights, config.data.tokenizer, trust_remote_code=trust_remote_code
        )
        rewards = trained_reward_shapes(config, tokenizer)
        return [_policy_load(config, described, rewards, tokens, trust_remote_code)]
    return [_offline_load(config, described, tokens, trust_remote_code)]


def _architecture(config: Any, trust_remote_code: bool) -> PreTrainedConfig:
    sizes = Sizes.of(config.model, max_length=config.training.max_length)
    actual = getattr(config.data, "pretrained_weights", None)
    return (
        new_config(sizes) if actual is None else load_config(actual, sizes=sizes, trust_remote_code=trust_remote_code)
    )


def _offline_load(config: Any, described: PreTrainedConfig, tokens: int | None, trust_remote_code: bool) -> Load:
    training: TrainingSection = config.training
    trains, head = method_row(config.computation.method).trains, None
    if trains == "head":
        head = config.model.num_classes or len(config.model.labels or ()) or _UNKNOWN_CLASSES
    elif trains == "scores":
        head = config.reward.heads
    model = meta_model(training, described, head=head, trust_remote_code=trust_remote_code)
    longest = longest_row(training, described)
    compares = {"comparisons", "judgments"} & {*method_row(config.computation.method).reads}
    sequences = _RESPONSES if compares else 1
    row_tokens = sequences * longest if tokens is None else -(-tokens // training.batch_size)
    cache = None
    if config.generates:
        cache = Cache(generated_rows(config), longest + config.generation.max_new_tokens)
    networks = [Network("model", model.parameters, model, "the model in training")]
    if isinstance(config, DistillationConfig):
        if (teacher := teacher_model(config)) is not None:
            networks.append(
                Network("teacher", _own(teacher.parameters.total, 0, teacher.parameters), teacher, "frozen")
            )
        if config.is_on_policy:
            cache = Cache(written_together(training.batch_size * config.online.every), longest)
    return Load(
        config.computation.method,
        training,
        networks,
        training.batch_size,
        row_tokens,
        training.gradient_accumulation,
        cache,
    )


def _policy_load(
    config: PpoConfig,
    described: PreTrainedConfig,
    rewards: list[RewardShape],
    tokens: int | None,
    trust_remote_code: bool,
) -> Load:
    training = config.training
    shapes = role_shapes(config, described, rewards, trust_remote_code=trust_remote_code)
    through = {
        "policy": shapes.policy,
        "reference": shapes.policy,
        "value model": shapes.critic or shapes.policy,
        **dict(zip((name for name in shapes.roles if name.startswith("reward model")), shapes.rewards, strict=True)),
    }
    networks = [
        Network(name, _own(role.parameters, role.trained, through[name].parameters), through[name], role.summary)
        for name, role in shapes.roles.items()
    ]
    passes = training.minibatches * training.gradient_accumulation
    rows = -(-training.batch_size // passes)
    row_tokens = _sequence(config, described)
    return Load(
        config.computation.method,
        training,
        networks,
        rows,
        row_tokens if tokens is None else -(-tokens // rows),
        training.gradient_accumulation,
        Cache(written_together(training.batch_size), row_tokens),
        steps=training.inner_epochs * training.minibatches,
        writes_responses=True,
        batch_is_rows=False,
    )


def _own(total: int, trained: int, whole: estimate.Parameters) -> estimate.Parameters:
    """The counts of a role with `total` parameters of its own, of which `trained` train."""
    if trained == 0:
        return replace(whole, total=total, trained_matrices=0, trained_rest=0, matrix_sides=0, largest=0)
    if trained == whole.trained:
        return replace(whole, total=total)
    return value_head(total)


def longest_row(training: TrainingSection, described: PreTrainedConfig) -> int:
    """Maximum tokens of a sequence. Raises `UserError` if nothing limits it."""
    positions = getattr(described.get_text_config(), "max_position_embeddings", None)
    found = [limit for limit in (training.max_length, positions) if limit is not None]
    if not found:
        raise UserError("training.max_length: nothing limits a sequence; set a number of tokens, or --tokens")
    return int(min(found))


def _sequence(config: PpoConfig, described: PreTrainedConfig) -> int:
    """Maximum tokens of a prompt and its response."""
    whole, response = longest_row(config.training, described), config.generation.max_new_tokens
    prompt = config.data.max_prompt_tokens
    return whole if prompt is None else min(whole, prompt + response)
