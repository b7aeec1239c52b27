"""The table of algorithms of reinforcement learning, with the defaults that each brings, and `register_algorithm`.

Apart from `variants`, which has the other tables, for its length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from loopos.config.registry import Reference, Registry, Target, summary_of

Function = TypeVar("Function", bound=Callable[..., Any])


def _of_algorithms(function: str) -> Reference:
    return Reference(f"loopos.rl.algorithms:{function}")


_CLIPPED_LOSS = _of_algorithms("clipped_loss")


@dataclass(frozen=True, slots=True)
class AlgorithmRow:
    """An algorithm of reinforcement learning: two functions, as `rl.algorithms` describes them, and what they need.

    `critic`: a value model, which gives `advantages` the values of states and learns its returns. `reference`: the
    log-probabilities of the initial policy. `groups`: several responses to each prompt. `defaults`: "section.key" →
    what a config that names the algorithm has there, unless it sets the key itself. `about`: what it does, of rows that
    share their functions.
    """

    advantages: Target
    policy_loss: Target = _CLIPPED_LOSS
    critic: bool = False
    reference: bool = False
    groups: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return self.about or summary_of(self.advantages)


# Without a KL penalty, as TRL and verl start; where a config adds one, it is GRPO's own.
_ONE_PASS: Mapping[str, Any] = {
    "batch_size": 64,
    "gradient_accumulation": 4,
    "inner_epochs": 1,
    "whiten_advantages": False,
}
_GRPO: Mapping[str, Any] = {**_ONE_PASS, "kl_coefficient": 0.0, "kl_in": "loss", "kl_estimator": "k3"}


def _group_algorithm(
    about: str, policy_loss: str = "clipped_loss", *, responses: int = 8, **training: Any
) -> AlgorithmRow:
    """An algorithm of group-relative advantages. responses: to each prompt; training: its other defaults."""
    keys = {"loss_normalization": "sequence", "advantage_baseline": "group", "advantage_scale": "group", **training}
    defaults = {f"training.{key}": value for key, value in keys.items()}
    return AlgorithmRow(
        _of_algorithms("relative_advantages"),
        _of_algorithms(policy_loss),
        groups=True,
        defaults={**defaults, "generation.responses_per_prompt": responses},
        about=about,
    )


_DAPO = _group_algorithm(
    "DAPO: GRPO with the mean over tokens, clip-higher, dynamic sampling and a soft over-length penalty (Yu et al. "
    "2025)",
    **_GRPO,
    loss_normalization="token",
    clip_epsilon_high=0.28,
    dynamic_sampling=3,
)

ALGORITHMS: Registry[AlgorithmRow] = Registry(
    "algorithm",
    {
        "ppo": AlgorithmRow(_of_algorithms("ppo_advantages"), critic=True, reference=True),
        "grpo": _group_algorithm(
            "Group relative policy optimization: advantages (r − mean) / std of the group, the mean over responses of "
            "their mean token loss (Shao et al. 2024)",
            **_GRPO,
        ),
        "dr_grpo": _group_algorithm(
            "Dr. GRPO: GRPO without the division by std and length (Liu et al. 2025)",
            **_GRPO,
            loss_normalization="constant",
            advantage_scale="none",
        ),
        # 4,096 of 20,480 tokens in the paper.
        "dapo": replace(_DAPO, defaults={**_DAPO.defaults, "generation.overlong_buffer": 0.2}),
        "rloo": _group_algorithm(
            "REINFORCE leave-one-out: the baseline is the mean of the group's other responses, the ratio that of whole "
            "responses (Ahmadian et al. 2024)",
            "response_ratio_loss",
            responses=4,
            **_ONE_PASS,
            advantage_baseline="leave_one_out",
            advantage_scale="none",
            kl_coefficient=0.05,
        ),
        "reinforce_pp": AlgorithmRow(
            _of_algorithms("token_returns"),
            defaults={f"training.{key}": value for key, value in {**_ONE_PASS, "whiten_advantages": True}.items()}
            | {"training.kl_coefficient": 0.01},
            about="REINFORCE++: rewards with a KL penalty per token, summed from each token on and whitened over the "
            "iteration (Hu et al. 2025)",
        ),
        "reinforce_pp_baseline": _group_algorithm(
            "REINFORCE++-baseline: r − mean of the group, whitened over the iteration; k2 in the loss (Hu et al. 2025)",
            **{**_ONE_PASS, "whiten_advantages": True},
            loss_normalization="token",
            advantage_scale="none",
            kl_coefficient=0.01,
            kl_in="loss",
            kl_estimator="k2",
        ),
        "cispo": _group_algorithm(
            "CISPO: the log-likelihood weighted by A and by the ratio, cut at 1 + clip_epsilon_high (MiniMax 2025)",
            "clipped_importance_loss",
            **_GRPO,
            loss_normalization="token",
            clip_epsilon_high=4.0,
        ),
        "gspo": _group_algorithm(
            "Group sequence policy optimization: GRPO with the ratio (π(y) / π_old(y))^(1/|y|) of whole responses "
            "(Zheng et al. 2025)",
            "mean_ratio_loss",
            **_GRPO,
            clip_epsilon=3e-4,
            clip_epsilon_high=4e-4,
        ),
    },
    decorator="register_algorithm",
)


def register_algorithm(
    name: str,
    *,
    policy_loss: Callable[..., Any] | None = None,
    critic: bool = False,
    reference: bool = False,
    groups: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Registers the decorated function of advantages as the algorithm `name`. policy_loss: PPO's clipped loss when
    absent; critic, reference, groups, defaults: as in `AlgorithmRow`.
    """

    def registered(advantages: Function) -> Function:
        row = AlgorithmRow(advantages, policy_loss or _CLIPPED_LOSS, critic, reference, groups, defaults or {})
        ALGORITHMS.register(name, row, source=advantages.__module__, decorated=advantages)
        return advantages

    return registered
