"""LoopOS: post-training of language models from one config and one command.

The public names. Each is imported when it is first used, so that `import loopos` costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopos.config.chain_of_thought import ChainOfThoughtConfig
    from loopos.config.fine_tuning import FineTuningConfig
    from loopos.config.ppo import PpoConfig
    from loopos.config.reward_model import RewardModelConfig
    from loopos.config.rlhf import RlhfConfig
    from loopos.config.sections import MethodConfig
    from loopos.evaluation.ensemble import EnsemblePredictor
    from loopos.evaluation.predictor import Predictor
    from loopos.evaluation.reasoning import Reasoner
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.methods.chain_of_thought import ChainOfThought
    from loopos.methods.fine_tuning import FineTuner
    from loopos.methods.ppo import PpoTrainer
    from loopos.methods.reward_model import RewardModelTrainer
    from loopos.methods.rlhf import ReinforcementTrainer

__version__ = "0.1.0"
__all__ = [
    "ChainOfThought",
    "ChainOfThoughtConfig",
    "FineTuner",
    "FineTuningConfig",
    "PpoConfig",
    "PpoTrainer",
    "Predictor",
    "Reasoner",
    "ReinforcementTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
    "RewardPredictor",
    "RlhfConfig",
    "__version__",
    "load",
    "read_config",
]

_PLACES = {
    "ChainOfThought": "loopos.methods.chain_of_thought",
    "ChainOfThoughtConfig": "loopos.config.chain_of_thought",
    "FineTuner": "loopos.methods.fine_tuning",
    "FineTuningConfig": "loopos.config.fine_tuning",
    "PpoConfig": "loopos.config.ppo",
    "PpoTrainer": "loopos.methods.ppo",
    "Predictor": "loopos.evaluation.predictor",
    "Reasoner": "loopos.evaluation.reasoning",
    "ReinforcementTrainer": "loopos.methods.rlhf",
    "RewardModelConfig": "loopos.config.reward_model",
    "RewardModelTrainer": "loopos.methods.reward_model",
    "RewardPredictor": "loopos.evaluation.reward_predictor",
    "RlhfConfig": "loopos.config.rlhf",
}


def load(run: str | os.PathLike[str]) -> Predictor | EnsemblePredictor:
    """Opens the result of a run: `loopos.load("outputs/run").predict(["some text"])`.

    run: a run's output folder, its folder model/, or the folder of an ensemble. Raises
    `loopos.config.faults.UserError`.
    """
    from loopos.evaluation.ensemble import open_predictor

    return open_predictor(os.fspath(run))


def read_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> MethodConfig:
    """The frozen config in a JSON or YAML file, for `FineTuner(read_config("run.json"))`.

    overrides: "key.path=value" each. Raises `loopos.config.faults.ConfigError` with every fault.
    """
    from loopos.config.load import load as load_config
    from loopos.methods.table import config_classes

    return load_config(path, overrides, config_classes()).config


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'loopos' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
