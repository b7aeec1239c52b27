"""The table of methods: what `computation.mode` and `computation.method` name.

Enters: a mode and a method. Leaves: the class of its config, and the class that trains, both imported only when they
are asked for: a config is checked without torch. To add a method, add a row here and in `config.method_configs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from loopos.config.method_configs import config_class

if TYPE_CHECKING:
    from loopos.config.sections import MethodConfig
    from loopos.training.fit_result import FitResult
    from loopos.training.progress import RunProgress

MethodName = tuple[str, str]


class Method(Protocol):
    """What every method offers the command line."""

    def train(self, *, resume: bool = False) -> FitResult:
        """Runs to the end. Raises `UserError` for a mistake of the user's."""


class MethodClass(Protocol):
    """The class of a method. `config` is of the method's own config class."""

    def __call__(
        self, config: Any, *, progress: RunProgress, trust_remote_code: bool, environment: Mapping[str, str]
    ) -> Method:
        """A method ready to train."""


@dataclass(frozen=True, slots=True)
class MethodRow:
    """Where the class that trains lives ("module:Class"), and what the method does, in a line. Where its config lives
    is in `config.method_configs`.
    """

    trainer: str
    said: str


METHODS: Mapping[MethodName, MethodRow] = {
    ("posttraining", "fine_tuning"): MethodRow(
        trainer="loopos.methods.fine_tuning:FineTuner",
        said="a head over pooled hidden states: classification, multi-label, regression",
    ),
    ("posttraining", "chain_of_thought"): MethodRow(
        trainer="loopos.methods.chain_of_thought:ChainOfThought",
        said="problem, steps, answer: a language model that reasons, from demonstrations and its own right chains",
    ),
    ("posttraining", "reward_model"): MethodRow(
        trainer="loopos.methods.reward_model:RewardModelTrainer",
        said="a score of responses, from which of them people prefer",
    ),
    ("posttraining", "ppo"): MethodRow(
        trainer="loopos.methods.ppo:PpoTrainer",
        said="a policy that writes what a reward model, or functions of yours, score high",
    ),
    ("posttraining", "rlhf"): MethodRow(
        trainer="loopos.methods.rlhf:ReinforcementTrainer",
        said="human preferences: a reward model from comparisons, then a policy trained on it by PPO",
    ),
    ("pretraining", "autoregressive"): MethodRow(
        trainer="loopos.methods.pretraining:Pretrainer",
        said="a tokenizer and a new causal language model from plain text",
    ),
}


def config_classes() -> dict[MethodName, type[MethodConfig]]:
    """The config class of every method, as `config.load` takes them."""
    return {name: config_class(*name) for name in METHODS}


def method_class(mode: str, method: str) -> MethodClass:
    """The class that runs a method of the table; importing it imports torch."""
    trainer: MethodClass = _imported(METHODS[mode, method].trainer)
    return trainer


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
