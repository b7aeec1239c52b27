"""The methods of training: what `computation.mode` and `computation.method` name.

A row names the class of the method's config and the class that trains; both are imported when they are looked up. To
add a method, add a row, or decorate the trainer of a package of your own with `register_method`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from loopos.config.registry import Reference, Registry

if TYPE_CHECKING:
    from loopos.config.sections import MethodConfig

MethodName: TypeAlias = tuple[str, str]
Rows: TypeAlias = Literal["labeled", "demonstrations", "comparisons", "judgments", "thumbs", "prompts", "text"]
Models: TypeAlias = Literal["head", "scores", "language", "roles"]
_USUAL_MODELS: Mapping[Rows, Models] = {
    "labeled": "head",
    "comparisons": "scores",
    "judgments": "scores",
    "thumbs": "language",
    "demonstrations": "language",
    "text": "language",
    "prompts": "roles",
}
Trainer = TypeVar("Trainer", bound=type[Any])


@dataclass(frozen=True, slots=True)
class MethodRow:
    """`mode`: the stage of training. `config`, `trainer`: the classes. `summary`: what the method does, in a line.
    `reads`: the kinds of rows that it trains on, by which they are checked before torch is imported, shown and counted;
    empty where that is left to the method; judgments are comparisons, or answers with step labels. `model`: what is
    trained, by which a run is planned: a head over pooled states, scalar scores of responses, a language model, or the
    roles of reinforcement learning; None for what the first kind of rows usually trains.
    """

    mode: str
    config: Reference | type[MethodConfig]
    trainer: Reference | type[Any]
    summary: str
    reads: tuple[Rows, ...] = ()
    model: Models | None = None

    @property
    def trains(self) -> Models | None:
        """What is trained; None where neither `model` nor `reads` says it."""
        return self.model or (_USUAL_MODELS[self.reads[0]] if self.reads else None)

    @property
    def config_class(self) -> type[MethodConfig]:
        """The class of the config."""
        found: type[MethodConfig] = self.config.load() if isinstance(self.config, Reference) else self.config
        return found

    @property
    def trainer_class(self) -> Any:
        """The class that trains; importing it imports torch."""
        return self.trainer.load() if isinstance(self.trainer, Reference) else self.trainer


def _row(mode: str, config: str, trainer: str, summary: str, *reads: Rows, model: Models | None = None) -> MethodRow:
    config_class, trainer_class = Reference(f"loopos.config.{config}"), Reference(f"loopos.methods.{trainer}")
    return MethodRow(mode, config_class, trainer_class, summary, reads, model)


PREFERENCE_METHODS: Mapping[str, str] = {
    "dpo": "DPO, and with preference.loss its relatives",
    "ipo": "IPO",
    "simpo": "SimPO (no reference)",
    "orpo": "ORPO (no reference)",
    "cpo": "CPO (no reference)",
    "apo_zero": "APO-zero",
    "apo_down": "APO-down",
    "aot": "AOT",
    "bco": "BCO of pairs",
    "exo": "EXO",
    "nca": "NCA",
    "sppo": "SPPO",
    "slic": "SLiC (hinge)",
    "discopop": "DiscoPOP",
    "robust_dpo": "robust DPO",
    "mpo": "MPO (sigmoid, bco and sft)",
}
"""The presets of preference optimization (`config.preference.PRESETS`)."""

ONLINE_METHODS: Mapping[str, str] = {
    "ppo": "reinforcement learning from a reward model, or from functions: PPO",
    "grpo": "GRPO (no critic)",
    "dr_grpo": "Dr. GRPO (no critic)",
    "dapo": "DAPO (no critic)",
    "rloo": "RLOO (no critic)",
    "reinforce_pp": "REINFORCE++ (no critic)",
    "reinforce_pp_baseline": "REINFORCE++-baseline (no critic)",
    "cispo": "CISPO (no critic)",
    "gspo": "GSPO (no critic)",
}
"""The algorithms of `config.algorithms.ALGORITHMS` that are methods too, with their defaults."""

BUILTIN: Mapping[str, MethodRow] = {
    "fine_tuning": _row(
        "posttraining",
        "fine_tuning:FineTuningConfig",
        "fine_tuning:FineTuner",
        "classification, multi-label classification or regression of texts",
        "labeled",
    ),
    "sft": _row(
        "posttraining",
        "sft:SftConfig",
        "sft:SftTrainer",
        "supervised fine-tuning on chats, instructions, completions or texts",
        "demonstrations",
    ),
    "chain_of_thought": _row(
        "posttraining",
        "chain_of_thought:ChainOfThoughtConfig",
        "chain_of_thought:ChainOfThought",
        "sft on reasoning in steps, validated by generated answers",
        "demonstrations",
    ),
    "reward_model": _row(
        "posttraining",
        "reward_model:RewardModelConfig",
        "reward_model:RewardModelTrainer",
        "a score of responses, learned from preferences or step labels",
        "judgments",
    ),
    **{
        name: _row(
            "posttraining",
            "preference:PreferenceConfig",
            "preference:PreferenceTrainer",
            f"a policy from comparisons: {summary}",
            "comparisons",
            model="language",
        )
        for name, summary in PREFERENCE_METHODS.items()
    },
    "kto": _row(
        "posttraining",
        "preference:PreferenceConfig",
        "kto:KtoTrainer",
        "a policy from single answers with a thumb, up or down: KTO",
        "thumbs",
        model="language",
    ),
    **{
        name: _row(
            "posttraining",
            "ppo:PpoConfig",
            "ppo:PpoTrainer",
            summary if name == "ppo" else f"a policy against rewards: {summary}",
            "prompts",
        )
        for name, summary in ONLINE_METHODS.items()
    },
    "rlhf": _row(
        "posttraining",
        "rlhf:RlhfConfig",
        "rlhf:ReinforcementTrainer",
        "a reward model from preferences, then PPO against it",
        "judgments",
        "prompts",
    ),
    "distillation": _row(
        "posttraining",
        "distillation:DistillationConfig",
        "distillation:DistillationTrainer",
        "a student from a teacher's next-token distributions: on data, or on its own answers",
        "demonstrations",
    ),
    "autoregressive": _row(
        "pretraining",
        "pretraining:PretrainingConfig",
        "pretraining:Pretrainer",
        "pretraining: a tokenizer and a new language model from text",
        "text",
    ),
}

METHODS: Registry[MethodRow] = Registry("method", BUILTIN, decorator="register_method")


def register_method(
    name: str,
    *,
    config: type[MethodConfig],
    summary: str,
    mode: str = "posttraining",
    reads: tuple[Rows, ...] = (),
    model: Models | None = None,
) -> Callable[[Trainer], Trainer]:
    """Registers the decorated class, a `loopos.Trainer`, as a method that configs can name.

    Args:
        name: The method's name.
        config: The class of its config.
        summary: What it does, in a line.
        mode: The stage of training, "posttraining" or "pretraining".
        reads: The kind of rows that it trains on, by which they are checked before torch is imported; empty where that
            is left to the method.
        model: The kind of model that it trains, by which its run is planned.
    """

    def registered(trainer: Trainer) -> Trainer:
        row = MethodRow(mode, config, trainer, summary, reads, model)
        METHODS.register(name, row, source=trainer.__module__, decorated=trainer)
        return trainer

    return registered


def method_row(name: str) -> MethodRow:
    """The row of a method, by its name or by "module:Class" of a registered trainer. Raises `UserError`."""
    return METHODS[name]


class _ConfigClasses(Mapping[MethodName, "type[MethodConfig]"]):
    """The config class of each (mode, method), imported when it is looked up: one of them takes 20 ms."""

    def __getitem__(self, name: MethodName) -> type[MethodConfig]:
        mode, method = name
        if ":" not in method and method not in METHODS:
            raise KeyError(name)
        row = method_row(method)
        if row.mode != mode:
            raise KeyError(name)
        return row.config_class

    def __iter__(self) -> Iterator[MethodName]:
        return iter([(METHODS[method].mode, method) for method in METHODS])

    def __len__(self) -> int:
        return len(METHODS)


def config_classes() -> Mapping[MethodName, type[MethodConfig]]:
    """The config class of every method, as `config.load` takes them."""
    return _ConfigClasses()


def _eights(names: list[str]) -> list[list[str]]:
    """Names in lines of eight."""
    return [names[first : first + 8] for first in range(0, len(names), 8)]


def methods_help() -> str:
    """The built-in methods for `loopos train --help`, one per line, presets of one method together; the mark in front
    keeps the lines apart.
    """
    families = {"dpo": [*PREFERENCE_METHODS][1:], "ppo": [*ONLINE_METHODS][1:]}
    presets = {name for names in families.values() for name in names}
    width = max(len(method) for method in BUILTIN if method not in presets)
    lines = ["\b", "Methods (computation.method):"]
    for method, row in BUILTIN.items():
        if method in presets:
            continue
        lines.append(f"  {method:<{width}}  {row.summary}")
        lines += [f"  {' ':<{width}}  {' '.join(names)}" for names in _eights(families.get(method, []))]
    return "\n".join(lines)
