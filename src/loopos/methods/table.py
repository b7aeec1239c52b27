"""The table of methods: what `computation.mode` and `computation.method` name.

Enters: a mode and a method. Leaves: the class of its config, and the class that trains, both imported only when they
are asked for: a config is checked without torch. To add a method, add a row here and in `config.method_configs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from loopos.config.sections import MethodConfig
    from loopos.evaluation.own_metrics import OwnMetrics
    from loopos.training.callbacks import Callbacks
    from loopos.training.progress import RunProgress
    from loopos.training.run_state import FitResult

MethodName = tuple[str, str]


class Method(Protocol):
    """What every method offers the command line."""

    def train(self, *, resume: bool = False) -> FitResult:
        """Runs to the end. Raises `UserError` for a mistake of the user's."""


class MethodClass(Protocol):
    """The class of a method. `config` is of the method's own config class."""

    def __call__(
        self,
        config: Any,
        *,
        progress: RunProgress,
        trust_remote_code: bool,
        environment: Mapping[str, str],
        callbacks: Callbacks = ...,
        metrics: OwnMetrics = ...,
    ) -> Method:
        """A method ready to train."""


@dataclass(frozen=True, slots=True)
class MethodRow:
    """Where the class that trains lives ("module:Class"), and what the method does, in a line. Where its config lives
    is in `config.method_configs`.
    """

    trainer: str
    summary: str


METHODS: Mapping[MethodName, MethodRow] = {
    ("posttraining", "fine_tuning"): MethodRow(
        trainer="loopos.methods.fine_tuning:FineTuner",
        summary="classification, multi-label classification or regression of texts",
    ),
    ("posttraining", "chain_of_thought"): MethodRow(
        trainer="loopos.methods.chain_of_thought:ChainOfThought",
        summary="supervised fine-tuning (sft): chats, instructions, reasoning in steps",
    ),
    ("posttraining", "reward_model"): MethodRow(
        trainer="loopos.methods.reward_model:RewardModelTrainer",
        summary="a score of responses, learned from preferences",
    ),
    ("posttraining", "ppo"): MethodRow(
        trainer="loopos.methods.ppo:PpoTrainer",
        summary="reinforcement learning from a reward model, or from functions",
    ),
    ("posttraining", "rlhf"): MethodRow(
        trainer="loopos.methods.rlhf:ReinforcementTrainer",
        summary="a reward model from preferences, then PPO against it",
    ),
    ("pretraining", "autoregressive"): MethodRow(
        trainer="loopos.methods.pretraining:Pretrainer",
        summary="pretraining: a tokenizer and a new language model from text",
    ),
}


class _ConfigClasses(Mapping[MethodName, "type[MethodConfig]"]):
    """The config class of each method, imported when it is looked up: one of them takes 20 ms."""

    def __getitem__(self, name: MethodName) -> type[MethodConfig]:
        # Imported here: pydantic takes a tenth of a second, which the commands' help does without.
        from loopos.config.method_configs import config_class

        return config_class(*name)

    def __iter__(self) -> Iterator[MethodName]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


def config_classes() -> Mapping[MethodName, type[MethodConfig]]:
    """The config class of every method, as `config.load` takes them."""
    return _ConfigClasses()


def methods_help() -> str:
    """The methods for `loopos train --help`, one a line; the mark in front keeps the lines apart."""
    width = max(len(method) for _, method in METHODS)
    lines = [f"  {method:<{width}}  {row.summary}" for (_, method), row in METHODS.items()]
    return "\n".join(["\b", "Methods (computation.method):", *lines])


def method_class(mode: str, method: str) -> MethodClass:
    """The class that runs a method of the table; importing it imports torch."""
    trainer: MethodClass = _imported(METHODS[mode, method].trainer)
    return trainer


def _imported(source: str) -> Any:
    module, _, name = source.partition(":")
    return getattr(import_module(module), name)
