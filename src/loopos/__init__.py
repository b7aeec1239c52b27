"""LoopOS: post-training of language models from one config and one command.

The public names. Each is imported when it is first used, so that `import loopos` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopos.api import generate, load, read_config, train
    from loopos.changes import ensemble, export, merge, prune, quantize
    from loopos.config.algorithms import register_algorithm
    from loopos.config.chain_of_thought import ChainOfThoughtConfig
    from loopos.config.compression import PruningRecipe, QuantizationRecipe
    from loopos.config.diagnostics import ConfigError, DataError, UserError
    from loopos.config.distillation import DistillationConfig
    from loopos.config.fine_tuning import FineTuningConfig
    from loopos.config.merge import MergeConfig
    from loopos.config.methods import register_method
    from loopos.config.ppo import PpoConfig
    from loopos.config.preference import PreferenceConfig
    from loopos.config.pretraining import PretrainingConfig
    from loopos.config.reward_model import RewardModelConfig
    from loopos.config.rlhf import RlhfConfig
    from loopos.config.sft import SftConfig
    from loopos.config.study_variants import register_study_format, register_study_strategy
    from loopos.config.variants import (
        register_environment,
        register_exporter,
        register_format,
        register_loss,
        register_merge_method,
        register_reward,
        register_tool_parser,
        register_tracker,
    )
    from loopos.evaluation.predictor import Predictor
    from loopos.evaluation.reasoning import Reasoner
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.generation.engine import Engine
    from loopos.generation.settings import SamplingParams
    from loopos.methods.base import Trainer
    from loopos.methods.chain_of_thought import ChainOfThought
    from loopos.methods.distillation import DistillationTrainer
    from loopos.methods.fine_tuning import FineTuner
    from loopos.methods.kto import KtoTrainer
    from loopos.methods.ppo import PpoTrainer
    from loopos.methods.preference import PreferenceTrainer
    from loopos.methods.pretraining import Pretrainer
    from loopos.methods.reward_model import RewardModelTrainer
    from loopos.methods.rlhf import ReinforcementTrainer
    from loopos.methods.sft import SftTrainer
    from loopos.run import Run
    from loopos.training.run_state import FitResult

__version__ = "0.1.0"

_MODULES = {
    # Functions
    "train": "loopos.api",
    "load": "loopos.api",
    "generate": "loopos.api",
    "merge": "loopos.changes",
    "prune": "loopos.changes",
    "quantize": "loopos.changes",
    "export": "loopos.changes",
    "ensemble": "loopos.changes",
    "read_config": "loopos.api",
    "register_method": "loopos.config.methods",
    "register_algorithm": "loopos.config.algorithms",
    "register_environment": "loopos.config.variants",
    "register_exporter": "loopos.config.variants",
    "register_format": "loopos.config.variants",
    "register_loss": "loopos.config.variants",
    "register_merge_method": "loopos.config.variants",
    "register_reward": "loopos.config.variants",
    "register_study_format": "loopos.config.study_variants",
    "register_study_strategy": "loopos.config.study_variants",
    "register_tool_parser": "loopos.config.variants",
    "register_tracker": "loopos.config.variants",
    # Runs and models
    "Run": "loopos.run",
    "FitResult": "loopos.training.run_state",
    "Predictor": "loopos.evaluation.predictor",
    "Reasoner": "loopos.evaluation.reasoning",
    "RewardPredictor": "loopos.evaluation.reward_predictor",
    "Engine": "loopos.generation.engine",
    "SamplingParams": "loopos.generation.settings",
    # Methods
    "Trainer": "loopos.methods.base",
    "FineTuner": "loopos.methods.fine_tuning",
    "SftTrainer": "loopos.methods.sft",
    "DistillationTrainer": "loopos.methods.distillation",
    "ChainOfThought": "loopos.methods.chain_of_thought",
    "PreferenceTrainer": "loopos.methods.preference",
    "KtoTrainer": "loopos.methods.kto",
    "RewardModelTrainer": "loopos.methods.reward_model",
    "PpoTrainer": "loopos.methods.ppo",
    "ReinforcementTrainer": "loopos.methods.rlhf",
    "Pretrainer": "loopos.methods.pretraining",
    # Configs
    "FineTuningConfig": "loopos.config.fine_tuning",
    "SftConfig": "loopos.config.sft",
    "DistillationConfig": "loopos.config.distillation",
    "ChainOfThoughtConfig": "loopos.config.chain_of_thought",
    "PreferenceConfig": "loopos.config.preference",
    "RewardModelConfig": "loopos.config.reward_model",
    "PpoConfig": "loopos.config.ppo",
    "RlhfConfig": "loopos.config.rlhf",
    "PretrainingConfig": "loopos.config.pretraining",
    "MergeConfig": "loopos.config.merge",
    "PruningRecipe": "loopos.config.compression",
    "QuantizationRecipe": "loopos.config.compression",
    # Errors
    "UserError": "loopos.config.diagnostics",
    "ConfigError": "loopos.config.diagnostics",
    "DataError": "loopos.config.diagnostics",
}
"""Public name → the module that it is imported from."""

_RENAMED = {"SamplingSettings": "SamplingParams"}
"""Name of an earlier version → the present one."""

__all__ = [
    "__version__",
    "ChainOfThought",
    "ChainOfThoughtConfig",
    "ConfigError",
    "DataError",
    "DistillationConfig",
    "DistillationTrainer",
    "Engine",
    "FineTuner",
    "FineTuningConfig",
    "FitResult",
    "KtoTrainer",
    "MergeConfig",
    "PpoConfig",
    "PpoTrainer",
    "Predictor",
    "PreferenceConfig",
    "PreferenceTrainer",
    "Pretrainer",
    "PretrainingConfig",
    "PruningRecipe",
    "QuantizationRecipe",
    "Reasoner",
    "ReinforcementTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
    "RewardPredictor",
    "RlhfConfig",
    "Run",
    "SamplingParams",
    "SftConfig",
    "SftTrainer",
    "Trainer",
    "UserError",
    "ensemble",
    "export",
    "generate",
    "load",
    "merge",
    "prune",
    "quantize",
    "read_config",
    "register_algorithm",
    "register_environment",
    "register_exporter",
    "register_format",
    "register_loss",
    "register_merge_method",
    "register_method",
    "register_reward",
    "register_study_format",
    "register_study_strategy",
    "register_tool_parser",
    "register_tracker",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        import warnings

        current = _RENAMED[name]
        warnings.warn(f"loopos.{name} is now loopos.{current}", DeprecationWarning, stacklevel=2)
        name = current
    if name not in _MODULES:
        raise AttributeError(f"module 'loopos' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
