"""Models as shapes without numbers, with their parameters counted; and the four models of PPO.

Models are built on torch's "meta" device, so no weight is read and no memory used. The roles follow `models.roles`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loopos.config.ppo import PpoConfig
from loopos.config.rl import PpoTrainingSection
from loopos.config.sections import LoraSection, TrainingSection
from loopos.models.adapters import find_layers, set_trained, set_trained_language_model
from loopos.models.backbone import headless
from loopos.planning import estimate
from loopos.planning.work import RewardShape

# Styles of transformers' tensor-parallel plans that divide a weight among processes.
_DIVIDED = frozenset(
    {"colwise", "colwise_gather_output", "packed_colwise", "rowwise", "rowwise_split_input", "packed_rowwise"}
)


@dataclass(frozen=True, slots=True)
class Units:
    """Parameters by how a cluster divides them. `layer`: of the largest layer, `outside`: outside of layers, embeddings
    and heads; a model without a plain stack of layers is one layer. `split`: what the model's tensor-parallel plan
    divides, of which `split_trained` train; 0 without a plan.
    """

    layer: int
    outside: int
    split: int
    split_trained: int


@dataclass(frozen=True)
class Model:
    """The model as shapes: its parameters counted, and the layers that keep activations. `output`: numbers of the
    output embedding, 0 if there is a head instead; `trains_output`: whether they train.
    """

    name: str
    parameters: estimate.Parameters
    shape: estimate.Architecture
    num_layers: int
    units: Units
    vocabulary: int = 0
    trains_output: bool = False

    @property
    def output(self) -> int:
        """Parameters that each trained target is multiplied with."""
        return self.vocabulary * self.shape.width


def meta_model(
    settings: TrainingSection, described: PreTrainedConfig, *, head: int | None, trust_remote_code: bool
) -> Model:
    """The model as shapes, with what `settings` train. head: outputs of its head, None for a language model, which has
    an output embedding instead.
    """
    text = described.get_text_config()
    builder = AutoModel if head is not None else AutoModelForCausalLM
    with torch.device("meta"):
        model = builder.from_config(  # type: ignore[no-untyped-call]
            described, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    assert isinstance(model, PreTrainedModel)
    output: nn.Parameter | None = None
    if head is None:
        base = headless(model)
        output = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        later = {id(parameter) for parameter in set_trained_language_model(model, base, settings)}
    else:
        later = {id(parameter) for parameter in set_trained(model, settings)}
    if settings.unfreeze_step is None:
        later = set()
    parameters = counted(model, output, later, head=None if head is None else (head, text.hidden_size))
    layers = text.num_hidden_layers
    shape = architecture(settings, described, layers)
    units = units_of(model, layers, later, total=parameters.total)
    if output is None:
        return Model(type(model).__name__, parameters, shape, layers, units)
    trains_output = output.requires_grad or id(output) in later
    return Model(type(model).__name__, parameters, shape, layers, units, text.vocab_size, trains_output)


def units_of(model: PreTrainedModel, num_layers: int, later: set[int], *, total: int) -> Units:
    """The parameters by layer and by the model's tensor-parallel plan. total: with those of its head; later: those that
    train from some step on.
    """
    stack = find_layers(model, num_layers)
    layers = [sum(each.numel() for each in layer.parameters()) for layer in stack or [model]]
    plan: Mapping[str, str] = model._tp_plan or {}
    split = split_trained = 0
    for name, parameter in model.named_parameters():
        # peft moves the weight of a layer with adapters one name down.
        owner = re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0].removesuffix(".base_layer"))
        if plan.get(owner) in _DIVIDED:
            split += parameter.numel()
            split_trained += parameter.numel() if parameter.requires_grad or id(parameter) in later else 0
    return Units(max(layers), max(0, total - sum(layers)), split, split_trained)


def counted(
    model: PreTrainedModel, output: nn.Parameter | None, later: set[int], *, head: tuple[int, int] | None
) -> estimate.Parameters:
    """The parameters by use. output: the output embedding; later: those that train from some step on; head: the shape
    of a head that the model does not have yet.
    """
    numbers, sides = (head[0] * head[1], sum(head)) if head is not None else (0, 0)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings |= {id(output)} if output is not None else set()
    counts = Counter(total=numbers, rest=numbers)
    for parameter in model.parameters():
        size, matrix = parameter.numel(), parameter.ndim == 2 and id(parameter) not in embeddings
        counts["total"] += size
        counts["multiplied"] += size if matrix else 0
        if parameter.requires_grad or id(parameter) in later:
            counts["matrices" if matrix else "rest"] += size
            counts["largest"] = max(counts["largest"], size)
            counts["sides"] += sum(parameter.shape) if parameter.ndim == 2 else size
    return estimate.Parameters(
        counts["total"],
        counts["matrices"],
        counts["rest"],
        counts["sides"] + sides,
        counts["multiplied"],
        max(counts["largest"], numbers),
    )


def architecture(settings: TrainingSection, described: PreTrainedConfig, num_layers: int) -> estimate.Architecture:
    """The sizes that activations depend on; frozen lower layers keep none, unless they train later."""
    text = described.get_text_config()
    num_kept = 0 if settings.trainable == "head" else num_layers
    if settings.unfreeze_step is None:
        num_kept = max(0, num_kept - settings.freeze_layers)
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return estimate.Architecture(
        width=text.hidden_size,
        key_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        layers=num_kept,
    )


_OWN = "its own copy of the weights"


@dataclass(frozen=True, slots=True)
class Role:
    """`parameters`: those that only this role has; `trained` of them train; `summary`: a description."""

    parameters: int
    trained: int
    summary: str


@dataclass(frozen=True)
class RoleShapes:
    """`critic`: None if there is none, or if it is a head on the policy's hidden states; `rewards`: of each reward
    model. `trained`: the parameters of policy and value model together, with those of all roles as their total.
    """

    policy: Model
    critic: Model | None
    rewards: list[Model]
    roles: dict[str, Role]
    copies: int
    trained: estimate.Parameters


def role_shapes(
    config: PpoConfig, described: PreTrainedConfig, rewards: Sequence[RewardShape], *, trust_remote_code: bool
) -> RoleShapes:
    """described: the policy's architecture. Raises `UserError`."""
    settings = config.training
    builder = _Builder(settings, described, trust_remote_code)
    has_adapters = settings.trainable == "lora"
    policy = builder.model(settings, described, None)
    roles = {"policy": Role(policy.parameters.total, policy.parameters.trained, _OWN)}
    if has_adapters and config.needs_reference:
        roles["reference"] = Role(0, 0, "the policy's weights without their adapter")
    elif config.needs_reference:
        roles["reference"] = Role(policy.parameters.total, 0, _OWN)
    adapters = [reward.adapter if has_adapters else None for reward in rewards]
    scorers = []
    for number, (reward, adapter) in enumerate(zip(rewards, adapters, strict=True), start=1):
        name = "reward model" if len(rewards) == 1 else f"reward model {number}"
        scorer, roles[name] = builder.reward(reward, adapter)
        scorers.append(scorer)
    critic = None
    if config.value_model is not None:
        critic, roles["value model"] = builder.critic(*((rewards[0], adapters[0]) if rewards else (None, None)))
    return RoleShapes(
        policy,
        critic,
        scorers,
        roles,
        sum(role.summary == _OWN for role in roles.values()),
        _together(policy, critic, roles, head=described.get_text_config().hidden_size),
    )


@dataclass(frozen=True)
class _Builder:
    settings: PpoTrainingSection
    described: PreTrainedConfig
    trust_remote_code: bool

    def model(self, settings: TrainingSection, described: PreTrainedConfig, head: int | None) -> Model:
        return meta_model(settings, described, head=head, trust_remote_code=self.trust_remote_code)

    def adapted(self, lora: LoraSection, head: int) -> Model:
        """The policy's backbone with an adapter and a head, which are its only own parameters and train."""
        return self.model(self.settings.model_copy(update={"trainable": "lora", "lora": lora}), self.described, head)

    def reward(self, reward: RewardShape, adapter: LoraSection | None) -> tuple[Model, Role]:
        if adapter is not None:
            model = self.adapted(adapter, reward.heads)
            return model, Role(model.parameters.trained, 0, "an adapter over the policy's weights")
        model = self.model(self._whole(), reward.architecture, reward.heads)
        return model, Role(model.parameters.total, 0, _OWN)

    def critic(self, reward: RewardShape | None, adapter: LoraSection | None) -> tuple[Model | None, Role]:
        settings, source = self.settings, self.settings.value_model
        if source == "shared":
            width = self.described.get_text_config().hidden_size
            return None, Role(width, width, "a head on the policy's hidden states")
        own_adapter = (settings.lora or LoraSection()) if source == "policy" else adapter
        if settings.trainable == "lora" and own_adapter is not None:
            model = self.adapted(own_adapter, 1)
            return model, Role(
                model.parameters.trained, model.parameters.trained, "an adapter over the policy's weights"
            )
        assert source == "policy" or reward is not None, "checked by PpoConfig.check"
        backbone = self.described if source == "policy" or reward is None else reward.architecture
        # The value model's frozen layers stay frozen: `unfreeze_step` applies to the policy.
        model = self.model(settings.model_copy(update={"unfreeze_step": None}), backbone, 1)
        return model, Role(model.parameters.total, model.parameters.trained, _OWN)

    def _whole(self) -> TrainingSection:
        return self.settings.model_copy(update={"trainable": "all", "freeze_layers": 0, "unfreeze_step": None})


def value_head(width: int) -> estimate.Parameters:
    """A head of one number over hidden states `[width]`."""
    return estimate.Parameters(width, 0, width, width + 1, 0, width)


def _together(policy: Model, critic: Model | None, roles: dict[str, Role], *, head: int) -> estimate.Parameters:
    one, total = policy.parameters, sum(role.parameters for role in roles.values())
    if "value model" not in roles:
        return replace(one, total=total)
    other = critic.parameters if critic is not None else value_head(head)
    return replace(
        one,
        total=total,
        trained_matrices=one.trained_matrices + other.trained_matrices,
        trained_rest=one.trained_rest + other.trained_rest,
        matrix_sides=one.matrix_sides + other.matrix_sides,
        largest=max(one.largest, other.largest),
    )
