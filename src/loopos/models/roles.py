"""The four models of PPO (policy, frozen reference, reward model, value model) on as few copies of the weights as can
be.

    full training:  policy · copy of it · reward model · value trunk (or a head on the policy's)
    LoRA:           one trunk: policy = adapter, reference = without it, value = adapter; the reward model is an
                    adapter too where it was trained as one over the same weights

Enters: the pretrained policy, the opened reward model, what trains. Leaves: `Roles`. Left out: number formats and
optimizers (`training`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from loopos.config.faults import UserError
from loopos.config.sections import LoraSection, TrainingSection
from loopos.models.actor_critic import ActorCritic, Reference, without_dropout
from loopos.models.adapters import ADAPTER, AdapterView, add_lora, load_adapter, set_trained, set_trained_language_model
from loopos.models.backbone import Backbone
from loopos.models.heads import PooledModel
from loopos.models.language_model import LanguageModel
from loopos.models.load import Pretrained, fingerprint
from loopos.models.reward_folder import OpenedReward

_REWARD, _VALUE = "reward", "value"


@dataclass(frozen=True)
class Roles:
    """`actor_critic` trains. `reward`: raw scores; None where functions alone give rewards. `frozen`: modules of their
    own beside it, which take the policy's number format and device. `held_back`: parameters that `freeze_layers` keeps
    from training. `said`: how many copies of the weights there are.
    """

    actor_critic: ActorCritic
    reference: Reference
    reward: PooledModel | None
    frozen: tuple[nn.Module, ...]
    held_back: tuple[nn.Parameter, ...]
    said: str

    def put(self, device: torch.device, frozen_format: torch.dtype | None) -> None:
        """Takes all to a device, and frozen weights, but for heads, to a number format."""
        for module in (self.actor_critic, *self.frozen):
            module.to(device).train()
        if frozen_format is not None:
            for module in self.frozen:
                for name, parameter in module.named_parameters():
                    if not name.startswith("head."):
                        parameter.data = parameter.data.to(frozen_format)


def build_roles(
    pretrained: Pretrained,
    reward: OpenedReward | None,
    settings: TrainingSection,
    *,
    value_model: str,
    temperature: float,
    attention: str = "auto",
) -> Roles:
    """value_model: "reward" (starts as the reward model), "policy" (as the policy), "shared" (a head on the policy's
    hidden states). Raises `UserError`.
    """
    if settings.trainable == "lora":
        policy = LanguageModel(pretrained.model, attention=attention)
        roles = _one_trunk(policy, fingerprint(policy.backbone.model), reward, settings, value_model, temperature)
    else:
        roles = _whole_models(pretrained, reward, settings, value_model, temperature, attention)
    _checkpoint_activations(roles, settings)
    for module in (roles.actor_critic, *roles.frozen):
        without_dropout(module)
    return roles


def _checkpoint_activations(roles: Roles, settings: TrainingSection) -> None:
    """Raises `UserError` where two roles that train share a trunk: computed again, one would run as the other."""
    if not settings.gradient_checkpointing:
        return
    critic = roles.actor_critic.critic.backbone
    if isinstance(critic, AdapterView) and not roles.actor_critic.shares_states:
        raise UserError(
            "training.gradient_checkpointing: given true with values that are an adapter of the policy's trunk; wanted "
            'false, or training.value_model "shared"'
        )
    roles.actor_critic.policy.causal.activation_checkpointing_enable()
    if isinstance(critic, Backbone):
        critic.model.activation_checkpointing_enable()


def _whole_models(
    pretrained: Pretrained,
    reward: OpenedReward | None,
    settings: TrainingSection,
    value_model: str,
    temperature: float,
    attention: str,
) -> Roles:
    """Every role has its own weights, but for values that are a head on the policy."""
    original = copy.deepcopy(pretrained.model).requires_grad_(False)
    policy, reference = (LanguageModel(each, attention=attention) for each in (pretrained.model, original))
    held_back = set_trained_language_model(policy.causal, policy.backbone.model, settings)
    critic = _critic(policy, reward, settings, value_model)
    actor_critic = ActorCritic(policy, critic, shares_states=value_model == "shared", temperature=temperature)
    frozen = [reference] if reward is None else [reference, reward.model.requires_grad_(False)]
    copies = 3 + (reward is not None) - (value_model == "shared")
    return Roles(
        actor_critic,
        Reference(reference, reference.backbone, temperature=temperature),
        reward.model if reward is not None else None,
        tuple(frozen),
        tuple(held_back),
        f"models: {copies} copies of the weights: policy, reference"
        + (", reward model" if reward is not None else "")
        + (", value model" if value_model != "shared" else "; the values are a head on the policy"),
    )


def _critic(
    policy: LanguageModel, reward: OpenedReward | None, settings: TrainingSection, value_model: str
) -> PooledModel:
    """The value model with a trunk of its own, or, shared, a head over the policy's states."""
    if value_model == "reward":
        assert reward is not None, "checked by PpoConfig.check"
        critic = _value_head(Backbone(_own_trunk(reward.model).copied_model()))
        _start_as_reward(critic, reward)
        set_trained(critic.backbone.model, settings)
        return critic
    if value_model == "policy":
        trunk = Backbone(policy.backbone.copied_model())
        set_trained(trunk.model, settings)
        return _value_head(trunk)
    return _value_head(AdapterView(policy.backbone, ADAPTER))


def _one_trunk(
    policy: LanguageModel,
    base: str,
    reward: OpenedReward | None,
    settings: TrainingSection,
    value_model: str,
    temperature: float,
) -> Roles:
    """Every role that can be is an adapter over the policy's weights."""
    trunk, lora, seed = policy.backbone, settings.lora or LoraSection(), settings.seed
    policy.causal.requires_grad_(False)
    add_lora(trunk.model, lora, seed=seed)
    trained = [ADAPTER]
    reward_model: PooledModel | None = None
    frozen: tuple[nn.Module, ...] = ()
    adapter = _own_adapter(reward, base)
    if reward is not None and adapter is not None:
        load_adapter(trunk.model, adapter, _REWARD)
        reward_model = PooledModel(
            AdapterView(trunk, _REWARD), num_outputs=reward.model.head.out_features, pooling="last", seed=seed
        )
        reward_model.head.load_state_dict(reward.model.head.state_dict())
        frozen = (reward_model.requires_grad_(False),)
    elif reward is not None:
        reward_model, frozen = reward.model, (reward.model.requires_grad_(False),)
    if value_model == "shared":
        critic = _value_head(AdapterView(trunk, ADAPTER))
    elif value_model == "reward" and adapter is None:
        critic = _critic(policy, reward, settings, value_model)
    else:
        if value_model == "reward" and adapter is not None:
            load_adapter(trunk.model, adapter, _VALUE)
        else:
            add_lora(trunk.model, lora, seed=seed + 1, name=_VALUE)
        trained.append(_VALUE)
        critic = _value_head(AdapterView(trunk, _VALUE))
        if value_model == "reward" and reward is not None:
            _start_as_reward(critic, reward)
    _activate(trunk.model, trained)
    copies = 1 + (reward is not None and adapter is None) + isinstance(critic.backbone, Backbone)
    return Roles(
        ActorCritic(policy, critic, shares_states=value_model == "shared", temperature=temperature),
        Reference(policy, AdapterView(trunk, None), temperature=temperature),
        reward_model,
        frozen,
        (),
        f"models: {copies} {'copy' if copies == 1 else 'copies'} of the weights serve policy, reference"
        + (", reward model" if reward is not None else "")
        + " and values",
    )


def _own_trunk(model: PooledModel) -> Backbone:
    assert isinstance(model.backbone, Backbone), "an opened reward model has its own weights"
    return model.backbone


def _own_adapter(reward: OpenedReward | None, base: str) -> Path | None:
    """The reward model's adapter, where it is one over the policy's weights."""
    if reward is None or reward.description.get("base") != base:
        return None
    return reward.adapter


def _activate(model: nn.Module, trained: list[str]) -> None:
    """The policy's adapter runs; the adapters `trained` train."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(True)
            module.set_adapter([ADAPTER])
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(any(f".{adapter}." in name for adapter in trained))


def _value_head(trunk: Backbone | AdapterView) -> PooledModel:
    """Values that are 0 at first: drawn at random they would be noise in every advantage until they are learned."""
    critic = PooledModel(trunk, num_outputs=1, pooling="last", seed=0)
    nn.init.zeros_(critic.head.weight)
    return critic


def _start_as_reward(critic: PooledModel, reward: OpenedReward) -> None:
    """The value head begins as the mean of the reward heads, in the unit of normalised scores."""
    std = torch.tensor(reward.description["score_std"])[:, None]
    with torch.no_grad():
        critic.head.weight.copy_((reward.model.head.weight / std).mean(0, keepdim=True))
