"""The four models of PPO (policy, frozen reference, reward model, value model) on as few copies of the weights as
possible.

    full training:  policy · its copy · reward model · value model (or a head on the policy's hidden states)
    LoRA:           one backbone: policy = adapter, reference = no adapter, value model = adapter; the reward model is
                    an adapter too if it was trained as one over the same weights

Letters: T tokens of a packed row, M tokens of responses, d hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from loopos.config.diagnostics import UserError
from loopos.config.sections import LoraSection, TrainingSection
from loopos.functional.packing import PackedLayout
from loopos.models.active_adapters import ADAPTER, AdapterView, activate
from loopos.models.adapter_folder import open_adapter_folder
from loopos.models.adapters import (
    add_lora,
    copy_adapter,
    load_adapter,
    moves_base,
    set_trained,
    set_trained_language_model,
    train_adapters,
)
from loopos.models.backbone import Backbone
from loopos.models.folders import OpenedReward, RewardEnsemble
from loopos.models.heads import PooledModel
from loopos.models.language_model import LanguageModel
from loopos.models.load import Pretrained, fingerprint
from loopos.rl.experience import PolicyOutputs


class ActorCritic(nn.Module):
    """Policy and value model in one module, so that one optimizer and one checkpoint contain both. `critic`: the value
    head and, unless it is a view of the policy's, its backbone; None for an algorithm without. `shares_states`: it
    reads the policy's last hidden states.
    """

    def __init__(
        self, policy: LanguageModel, critic: PooledModel | None, *, shares_states: bool, temperature: float
    ) -> None:
        """temperature: divides the logits of new, old and reference log-probabilities."""
        super().__init__()
        self.policy, self.critic = policy, critic
        self.shares_states, self.temperature = shares_states, temperature

    @property
    def supports_shared_prompts(self) -> bool:
        """Whether responses that share their prompt's tokens in a row have the outputs that they have by themselves."""
        critic = None if self.critic is None or self.shares_states else self.critic.backbone
        own = [self.policy.backbone, *([critic] if isinstance(critic, Backbone) else [])]
        return all(backbone.supports_shared_prefixes for backbone in own)

    def forward(self, ids: Tensor, layout: PackedLayout, positions: Tensor, targets: Tensor) -> PolicyOutputs:
        """Log-probabilities of `targets` `[M]`, entropies of their distributions, and values V of the states at
        `positions` `[M]`, each before its token; None without a critic. ids `[T]` → three of `[M]` in fp32.
        """
        hidden = self.policy.backbone(ids, layout)[positions]
        logprobs, entropies, _ = self.policy.logprobs(hidden, targets, temperature=self.temperature)
        if self.critic is None:
            return logprobs, entropies, None
        states = hidden if self.shares_states else self.critic.backbone(ids, layout)[positions]
        return logprobs, entropies, self.critic.outputs(states)[:, 0]


class Reference:
    """The policy before training: a frozen copy, or the policy's backbone without its adapter."""

    def __init__(self, model: LanguageModel, backbone: Backbone | AdapterView, *, temperature: float) -> None:
        self.model, self.backbone, self.temperature = model, backbone, temperature

    @torch.no_grad()
    def __call__(self, ids: Tensor, layout: PackedLayout, positions: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of `targets` `[M]`."""
        return self.model.logprobs(self.backbone(ids, layout)[positions], targets, temperature=self.temperature)[0]


def without_dropout(model: nn.Module) -> None:
    """Disables dropout in a model, in place: dropout adds noise to every probability ratio (Huang et al. 2024)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


_REWARD, _VALUE = "reward", "value"


@dataclass(frozen=True)
class Roles:
    """`actor_critic` trains. `reference`: None where nothing needs it. `reward`: raw scores of all heads of all reward
    models; None if rewards come only from functions. `frozen`: modules with weights of their own, which take the
    policy's number format. `initially_frozen`: parameters that `freeze_layers` freezes. `summary`: how many copies of
    the weights there are.
    """

    actor_critic: ActorCritic
    reference: Reference | None
    reward: PooledModel | RewardEnsemble | None
    frozen: tuple[nn.Module, ...]
    initially_frozen: tuple[nn.Parameter, ...]
    summary: str

    def cast_frozen(self, number_format: torch.dtype | None) -> None:
        """Casts frozen weights, except heads, to a number format; None leaves them unchanged."""
        for module in self.frozen:
            cast_frozen(module, number_format)


def cast_frozen(module: nn.Module, number_format: torch.dtype | None) -> None:
    """Casts the weights of a frozen model, except its head, to a number format; None leaves them unchanged."""
    for name, parameter in module.named_parameters() if number_format is not None else ():
        if not name.startswith("head."):
            parameter.data = parameter.data.to(number_format)


@dataclass(frozen=True)
class RolePlan:
    """Which models a run has. `value_model`: "reward" (initialized from the first reward model), "policy" (from the
    policy), "shared" (a head on the policy's hidden states), None (an algorithm without a critic). `reference`: whether
    the policy before training is needed. `temperature`: divides the logits.
    """

    value_model: str | None
    reference: bool
    temperature: float


def build_roles(
    pretrained: Pretrained,
    rewards: Sequence[OpenedReward],
    settings: TrainingSection,
    plan: RolePlan,
    *,
    attention: str = "auto",
    adapter: str | None = None,
) -> Roles:
    """The models of a run. adapter: the folder of one that trains on as the policy. Raises `UserError`."""
    if settings.trainable == "lora":
        policy = LanguageModel(pretrained.model, attention=attention)
        roles = _one_backbone(policy, fingerprint(policy.backbone.model), rewards, settings, plan, adapter)
    else:
        roles = _whole_models(pretrained, rewards, settings, plan, attention)
    _checkpoint_activations(roles, settings)
    for module in (roles.actor_critic, *roles.frozen):
        without_dropout(module)
    return roles


def _checkpoint_activations(roles: Roles, settings: TrainingSection) -> None:
    """Raises `UserError` if two trained roles share a backbone: recomputation would use the wrong adapter."""
    if not settings.gradient_checkpointing:
        return
    value_model = roles.actor_critic.critic
    critic = None if value_model is None else value_model.backbone
    if isinstance(critic, AdapterView) and not roles.actor_critic.shares_states:
        raise UserError(
            "training.gradient_checkpointing: got true with a value model that is an adapter on the policy's backbone; "
            "expected "
            'false, or training.value_model "shared"'
        )
    roles.actor_critic.policy.causal.activation_checkpointing_enable()
    if isinstance(critic, Backbone):
        critic.model.activation_checkpointing_enable()


def _whole_models(
    pretrained: Pretrained,
    rewards: Sequence[OpenedReward],
    settings: TrainingSection,
    plan: RolePlan,
    attention: str,
) -> Roles:
    """Every role has its own weights, except a value head on the policy."""
    original = copy.deepcopy(pretrained.model).requires_grad_(False) if plan.reference else None
    policy = LanguageModel(pretrained.model, attention=attention)
    reference = None if original is None else LanguageModel(original, attention=attention)
    initially_frozen = set_trained_language_model(policy.causal, policy.backbone.model, settings)
    critic = _critic(policy, rewards, settings, plan.value_model) if plan.value_model is not None else None
    shares_states = plan.value_model == "shared"
    members = [reward.model.requires_grad_(False) for reward in rewards]
    own_critic = critic is not None and not shares_states
    copies = 1 + (reference is not None) + len(members) + own_critic
    return Roles(
        ActorCritic(policy, critic, shares_states=shares_states, temperature=plan.temperature),
        None if reference is None else Reference(reference, reference.backbone, temperature=plan.temperature),
        ensemble_of(members),
        (*([reference] if reference is not None else []), *members),
        tuple(initially_frozen),
        f"models: {copies} {'copy' if copies == 1 else 'copies'} of the weights: policy"
        + (", reference" if reference is not None else "")
        + _rewards_summary(members)
        + (", value model" if own_critic else "")
        + ("; the values are a head on the policy" if shares_states else ""),
    )


def _critic(
    policy: LanguageModel, rewards: Sequence[OpenedReward], settings: TrainingSection, value_model: str
) -> PooledModel:
    """A value model with its own backbone, or, if shared, a head on the policy's hidden states."""
    if value_model == "reward":
        assert rewards, "checked by PpoConfig.check"
        critic = _value_head(Backbone(_own_backbone(rewards[0].model).copied_model()))
        _start_as_reward(critic, rewards[0])
        set_trained(critic.backbone.model, settings)
        return critic
    if value_model == "policy":
        backbone = Backbone(policy.backbone.copied_model())
        set_trained(backbone.model, settings)
        return _value_head(backbone)
    return _value_head(AdapterView(policy.backbone, ADAPTER))


def _one_backbone(
    policy: LanguageModel,
    base: str,
    rewards: Sequence[OpenedReward],
    settings: TrainingSection,
    plan: RolePlan,
    continued: str | None,
) -> Roles:
    """Every role that can be is an adapter over the policy's weights. continued: the folder of the policy's adapter."""
    backbone, lora, seed = policy.backbone, settings.lora or LoraSection(), settings.seed
    policy.causal.requires_grad_(False)
    train_adapters(backbone.model, settings, continued)
    trained = [ADAPTER]
    adapters = [_own_adapter(reward, base) for reward in rewards]
    members = [
        reward.model if adapter is None else _reward_adapter(backbone, reward, adapter, name=f"{_REWARD}_{number}")
        for number, (reward, adapter) in enumerate(zip(rewards, adapters, strict=True))
    ]
    first = adapters[0] if adapters else None
    critic: PooledModel | None
    if plan.value_model is None:
        critic = None
    elif plan.value_model == "shared":
        critic = _value_head(AdapterView(backbone, ADAPTER))
    elif plan.value_model == "reward" and first is None:
        critic = _critic(policy, rewards, settings, plan.value_model)
    else:
        if plan.value_model == "reward" and first is not None:
            load_adapter(backbone.model, first, _VALUE)
        elif continued is not None:
            copy_adapter(backbone.model, _VALUE)
        else:
            add_lora(backbone.model, _over_the_base(lora), seed=seed + 1, name=_VALUE)
        trained.append(_VALUE)
        critic = _value_head(AdapterView(backbone, _VALUE))
        if plan.value_model == "reward":
            _start_as_reward(critic, rewards[0])
    activate(backbone.model, trained)
    has_own_critic = critic is not None and isinstance(critic.backbone, Backbone)
    reference = Reference(policy, AdapterView(backbone, None), temperature=plan.temperature) if plan.reference else None
    return Roles(
        ActorCritic(policy, critic, shares_states=plan.value_model == "shared", temperature=plan.temperature),
        reference,
        ensemble_of(members),
        tuple(member.requires_grad_(False) for member in members),
        (),
        _shared_summary(members, 1 + adapters.count(None) + has_own_critic, plan),
    )


def _shared_summary(members: Sequence[PooledModel], copies: int, plan: RolePlan) -> str:
    """How many copies of the weights serve which roles."""
    names = ["policy", *(["reference"] if plan.reference else [])]
    if members:
        names.append("reward model" if len(members) == 1 else f"{len(members)} reward models")
    if plan.value_model is not None:
        names.append("value model")
    shared = "one copy of the weights serves" if copies == 1 else f"{copies} copies of the weights serve"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"models: {shared} as {listed}"


def _reward_adapter(backbone: Backbone, reward: OpenedReward, adapter: Path, *, name: str) -> PooledModel:
    """A reward model as an adapter of this name over the policy's weights, and its heads."""
    load_adapter(backbone.model, adapter, name)
    heads = reward.model.head.out_features
    model = PooledModel(AdapterView(backbone, name), num_outputs=heads, pooling="last", seed=0)
    model.head.load_state_dict(reward.model.head.state_dict())
    return model


def ensemble_of(members: Sequence[PooledModel]) -> PooledModel | RewardEnsemble | None:
    """Reward models as one; None without any."""
    if not members:
        return None
    return members[0] if len(members) == 1 else RewardEnsemble(members)


def _rewards_summary(members: Sequence[PooledModel]) -> str:
    if not members:
        return ""
    return ", reward model" if len(members) == 1 else f", {len(members)} reward models"


def _own_backbone(model: PooledModel) -> Backbone:
    assert isinstance(model.backbone, Backbone), "a loaded reward model has its own weights"
    return model.backbone


def _own_adapter(reward: OpenedReward, base: str) -> Path | None:
    """The reward model's adapter, if it was trained over the policy's weights and is plain LoRA: any other one has
    weights of its own.
    """
    if reward.adapter is None or reward.description.get("base") != base:
        return None
    return None if open_adapter_folder(reward.adapter).beyond_lora else reward.adapter


def _over_the_base(lora: LoraSection) -> LoraSection:
    """The adapters of a value model, beside a policy whose start may be taken out of the base: plain ones, since only
    one adapter can take its start out of a weight or scale its rows.
    """
    return lora.model_copy(update={"init_lora_weights": True, "use_dora": False}) if moves_base(lora) else lora


def _value_head(backbone: Backbone | AdapterView) -> PooledModel:
    """A value head of zeros: random initial values would add noise to every advantage."""
    critic = PooledModel(backbone, num_outputs=1, pooling="last", seed=0)
    nn.init.zeros_(critic.head.weight)
    return critic


def _start_as_reward(critic: PooledModel, reward: OpenedReward) -> None:
    """Initializes the value head as the mean of the reward heads, in units of normalized scores."""
    std = torch.tensor(reward.description["score_std"])[:, None]
    with torch.no_grad():
        critic.head.weight.copy_((reward.model.head.weight / std).mean(0, keepdim=True))
