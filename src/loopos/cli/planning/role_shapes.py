"""The four models of PPO as shapes: what each has of its own, what of it trains, how many copies of the weights.

Enters: a config, the policy's architecture, the shapes of the reward models. Leaves: `RoleShapes`, by the rules of
`models.roles`. Left out: numbers, memory and time (`policy_plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from loopos.cli.planning import estimate
from loopos.cli.planning.preference_work import RewardShape
from loopos.cli.planning.shapes import Model, meta_model
from loopos.config.ppo import PpoConfig
from loopos.config.ppo_sections import PpoTrainingSection
from loopos.config.sections import LoraSection, TrainingSection

_OWN = "an own copy of the weights"


@dataclass(frozen=True, slots=True)
class Role:
    """`parameters`: those that the role alone has; `trained` of them train; `said`: what the role is."""

    parameters: int
    trained: int
    said: str


@dataclass(frozen=True)
class RoleShapes:
    """`critic`: None where it is a head on the policy's hidden states; `rewards`: of each reward model.
    `trained`: the parameters of policy and values together, with those of all roles as their total.
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
    if has_adapters:
        roles["reference"] = Role(0, 0, "the policy's weights without their adapter")
    else:
        roles["reference"] = Role(policy.parameters.total, 0, _OWN)
    adapters = [reward.adapter if has_adapters else None for reward in rewards]
    scorers = []
    for number, (reward, adapter) in enumerate(zip(rewards, adapters, strict=True), start=1):
        name = "reward model" if len(rewards) == 1 else f"reward model {number}"
        scorer, roles[name] = builder.reward(reward, adapter)
        scorers.append(scorer)
    critic, roles["value model"] = builder.critic(*((rewards[0], adapters[0]) if rewards else (None, None)))
    return RoleShapes(
        policy,
        critic,
        scorers,
        roles,
        sum(role.said == _OWN for role in roles.values()),
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
        """The policy's trunk with an adapter and a head, which alone are its own: they are what trains of it."""
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
        trunk = self.described if source == "policy" or reward is None else reward.architecture
        # The value model's frozen layers stay so: `unfreeze_step` is of the policy's.
        model = self.model(settings.model_copy(update={"unfreeze_step": None}), trunk, 1)
        return model, Role(model.parameters.total, model.parameters.trained, _OWN)

    def _whole(self) -> TrainingSection:
        return self.settings.model_copy(update={"trainable": "all", "freeze_layers": 0, "unfreeze_step": None})


def value_head(width: int) -> estimate.Parameters:
    """A head of one number over hidden states `[width]`."""
    return estimate.Parameters(width, 0, width, width + 1, 0, width)


def _together(policy: Model, critic: Model | None, roles: dict[str, Role], *, head: int) -> estimate.Parameters:
    one = policy.parameters
    other = critic.parameters if critic is not None else value_head(head)
    return replace(
        one,
        total=sum(role.parameters for role in roles.values()),
        trained_matrices=one.trained_matrices + other.trained_matrices,
        trained_rest=one.trained_rest + other.trained_rest,
        matrix_sides=one.matrix_sides + other.matrix_sides,
        largest=max(one.largest, other.largest),
    )
