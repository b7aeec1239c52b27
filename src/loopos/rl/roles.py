"""A policy and what values its states: one module, so that one optimizer and one checkpoint hold both.

Enters: packed prompts with responses, the positions before their tokens. Leaves: log-probabilities, entropies, values.
Left out: where the models come from (`roles.py`), losses.
Letters: T tokens of a packed row, M tokens of responses, d hidden size.

The four models of PPO (policy, frozen reference, reward model, value model) on as few copies of the weights as can
be.

    full training:  policy · copy of it · reward model · value trunk (or a head on the policy's)
    LoRA:           one trunk: policy = adapter, reference = without it, value = adapter; the reward model is an
                    adapter too where it was trained as one over the same weights

Enters: the pretrained policy, the opened reward model, what trains. Leaves: `Roles`. Left out: number formats and
optimizers (`training`).
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
from loopos.models.adapters import ADAPTER, AdapterView, add_lora, load_adapter, set_trained, set_trained_language_model
from loopos.models.backbone import Backbone
from loopos.models.folders import OpenedReward, RewardEnsemble
from loopos.models.heads import PooledModel
from loopos.models.language_model import LanguageModel
from loopos.models.load import Pretrained, fingerprint


class ActorCritic(nn.Module):
    """`policy` acts. `critic`: the value head and, unless it is a view of the policy's, its trunk; `shares_states`: it
    reads the hidden states that the policy's logits are made of.
    """

    def __init__(self, policy: LanguageModel, critic: PooledModel, *, shares_states: bool, temperature: float) -> None:
        """temperature: divides the logits, of new, old and reference log-probabilities alike."""
        super().__init__()
        self.policy, self.critic = policy, critic
        self.shares_states, self.temperature = shares_states, temperature

    def forward(
        self, ids: Tensor, layout: PackedLayout, places: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of `targets` `[M]`, entropies of their distributions, and V of the states at `places`
        `[M]`: before each token. ids `[T]` → three of `[M]` in fp32.
        """
        hidden = self.policy.backbone(ids, layout)[places]
        logprobs, entropies = self.policy.logprobs(hidden, targets, temperature=self.temperature)
        states = hidden if self.shares_states else self.critic.backbone(ids, layout)[places]
        return logprobs, entropies, self.critic.outputs(states)[:, 0]


class Reference:
    """The policy as it was before training: a frozen copy, or the policy's trunk without its adapter."""

    def __init__(self, model: LanguageModel, trunk: Backbone | AdapterView, *, temperature: float) -> None:
        self.model, self.trunk, self.temperature = model, trunk, temperature

    @torch.no_grad()
    def __call__(self, ids: Tensor, layout: PackedLayout, places: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of `targets` `[M]`."""
        return self.model.logprobs(self.trunk(ids, layout)[places], targets, temperature=self.temperature)[0]


def without_dropout(model: nn.Module) -> None:
    """Takes dropout out of a model, in place: it would make every ratio of probabilities noise (Huang et al. 2024)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


_REWARD, _VALUE = "reward", "value"


@dataclass(frozen=True)
class Roles:
    """`actor_critic` trains. `reward`: raw scores, of all heads of all reward models; None where functions alone give
    rewards. `frozen`: modules of their
    own beside it, which take the policy's number format. `held_back`: parameters that `freeze_layers` keeps
    from training. `summary`: how many copies of the weights there are.
    """

    actor_critic: ActorCritic
    reference: Reference
    reward: PooledModel | RewardEnsemble | None
    frozen: tuple[nn.Module, ...]
    held_back: tuple[nn.Parameter, ...]
    summary: str

    def cast_frozen(self, number_format: torch.dtype | None) -> None:
        """Takes frozen weights, but for heads, to a number format; None leaves them as they are."""
        for module in self.frozen if number_format is not None else ():
            for name, parameter in module.named_parameters():
                if not name.startswith("head."):
                    parameter.data = parameter.data.to(number_format)


def build_roles(
    pretrained: Pretrained,
    rewards: Sequence[OpenedReward],
    settings: TrainingSection,
    *,
    value_model: str,
    temperature: float,
    attention: str = "auto",
) -> Roles:
    """value_model: "reward" (starts as the first reward model), "policy" (as the policy), "shared" (a head on the
    policy's hidden states). Raises `UserError`.
    """
    if settings.trainable == "lora":
        policy = LanguageModel(pretrained.model, attention=attention)
        roles = _one_trunk(policy, fingerprint(policy.backbone.model), rewards, settings, value_model, temperature)
    else:
        roles = _whole_models(pretrained, rewards, settings, value_model, temperature, attention)
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
            "training.gradient_checkpointing: got true with values that are an adapter of the policy's trunk; "
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
    value_model: str,
    temperature: float,
    attention: str,
) -> Roles:
    """Every role has its own weights, but for values that are a head on the policy."""
    original = copy.deepcopy(pretrained.model).requires_grad_(False)
    policy, reference = (LanguageModel(each, attention=attention) for each in (pretrained.model, original))
    held_back = set_trained_language_model(policy.causal, policy.backbone.model, settings)
    critic = _critic(policy, rewards, settings, value_model)
    actor_critic = ActorCritic(policy, critic, shares_states=value_model == "shared", temperature=temperature)
    members = [reward.model.requires_grad_(False) for reward in rewards]
    copies = 3 + len(members) - (value_model == "shared")
    return Roles(
        actor_critic,
        Reference(reference, reference.backbone, temperature=temperature),
        _together(members),
        (reference, *members),
        tuple(held_back),
        f"models: {copies} copies of the weights: policy, reference"
        + _rewards_summary(members)
        + (", value model" if value_model != "shared" else "; the values are a head on the policy"),
    )


def _critic(
    policy: LanguageModel, rewards: Sequence[OpenedReward], settings: TrainingSection, value_model: str
) -> PooledModel:
    """The value model with a trunk of its own, or, shared, a head over the policy's states."""
    if value_model == "reward":
        assert rewards, "checked by PpoConfig.check"
        critic = _value_head(Backbone(_own_trunk(rewards[0].model).copied_model()))
        _start_as_reward(critic, rewards[0])
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
    rewards: Sequence[OpenedReward],
    settings: TrainingSection,
    value_model: str,
    temperature: float,
) -> Roles:
    """Every role that can be is an adapter over the policy's weights."""
    trunk, lora, seed = policy.backbone, settings.lora or LoraSection(), settings.seed
    policy.causal.requires_grad_(False)
    add_lora(trunk.model, lora, seed=seed)
    trained = [ADAPTER]
    adapters = [_own_adapter(reward, base) for reward in rewards]
    members = [
        reward.model if adapter is None else _over(trunk, reward, adapter, name=f"{_REWARD}_{number}")
        for number, (reward, adapter) in enumerate(zip(rewards, adapters, strict=True))
    ]
    first = adapters[0] if adapters else None
    if value_model == "shared":
        critic = _value_head(AdapterView(trunk, ADAPTER))
    elif value_model == "reward" and first is None:
        critic = _critic(policy, rewards, settings, value_model)
    else:
        if value_model == "reward" and first is not None:
            load_adapter(trunk.model, first, _VALUE)
        else:
            add_lora(trunk.model, lora, seed=seed + 1, name=_VALUE)
        trained.append(_VALUE)
        critic = _value_head(AdapterView(trunk, _VALUE))
        if value_model == "reward":
            _start_as_reward(critic, rewards[0])
    _activate(trunk.model, trained)
    copies = 1 + adapters.count(None) + isinstance(critic.backbone, Backbone)
    shared = "one copy of the weights serves" if copies == 1 else f"{copies} copies of the weights serve"
    return Roles(
        ActorCritic(policy, critic, shares_states=value_model == "shared", temperature=temperature),
        Reference(policy, AdapterView(trunk, None), temperature=temperature),
        _together(members),
        tuple(member.requires_grad_(False) for member in members),
        (),
        f"models: {shared} as policy, reference{_rewards_summary(members)} and value model",
    )


def _over(trunk: Backbone, reward: OpenedReward, adapter: Path, *, name: str) -> PooledModel:
    """A reward model as an adapter of this name over the policy's weights, and its heads."""
    load_adapter(trunk.model, adapter, name)
    heads = reward.model.head.out_features
    model = PooledModel(AdapterView(trunk, name), num_outputs=heads, pooling="last", seed=0)
    model.head.load_state_dict(reward.model.head.state_dict())
    return model


def _together(members: Sequence[PooledModel]) -> PooledModel | RewardEnsemble | None:
    if not members:
        return None
    return members[0] if len(members) == 1 else RewardEnsemble(members)


def _rewards_summary(members: Sequence[PooledModel]) -> str:
    if not members:
        return ""
    return ", reward model" if len(members) == 1 else f", {len(members)} reward models"


def _own_trunk(model: PooledModel) -> Backbone:
    assert isinstance(model.backbone, Backbone), "an opened reward model has its own weights"
    return model.backbone


def _own_adapter(reward: OpenedReward, base: str) -> Path | None:
    """The reward model's adapter, where it is one over the policy's weights."""
    return reward.adapter if reward.description.get("base") == base else None


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
