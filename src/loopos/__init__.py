"""LoopOS: post-training of language models from one config and one command.

The public names. Each is imported when it is first used, so that `import loopos` costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

if TYPE_CHECKING:
    from loopos.cli.python_run import Callback
    from loopos.config.chain_of_thought import ChainOfThoughtConfig
    from loopos.config.fine_tuning import FineTuningConfig
    from loopos.config.methods import register_method
    from loopos.config.ppo import PpoConfig
    from loopos.config.reward_model import RewardModelConfig
    from loopos.config.rlhf import RlhfConfig
    from loopos.config.sections import MethodConfig
    from loopos.data.given_rows import InMemoryRows
    from loopos.evaluation.opening import Kind
    from loopos.evaluation.own_metrics import MetricFunctions
    from loopos.evaluation.predictor import EnsemblePredictor, Predictor
    from loopos.evaluation.reasoning import Reasoner
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.generation.settings import SamplingParams
    from loopos.methods.base import Trainer
    from loopos.methods.chain_of_thought import ChainOfThought
    from loopos.methods.fine_tuning import FineTuner
    from loopos.methods.ppo import PpoTrainer
    from loopos.methods.reward_model import RewardModelTrainer
    from loopos.methods.rlhf import ReinforcementTrainer
    from loopos.training.run_state import FitResult

    ConfigType = TypeVar("ConfigType", bound=MethodConfig)

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
    "SamplingParams",
    "Trainer",
    "__version__",
    "load",
    "read_config",
    "register_method",
    "train",
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
    "SamplingParams": "loopos.generation.settings",
    "Trainer": "loopos.methods.base",
    "register_method": "loopos.config.methods",
}


@overload
def load(run: str | os.PathLike[str], kind: Literal["head"], *, device: str = ...) -> Predictor | EnsemblePredictor: ...
@overload
def load(run: str | os.PathLike[str], kind: Literal["language"], *, device: str = ...) -> Reasoner: ...
@overload
def load(run: str | os.PathLike[str], kind: Literal["reward"], *, device: str = ...) -> RewardPredictor: ...
@overload
def load(run: str | os.PathLike[str], kind: None = ..., *, device: str = ...) -> Any: ...
def load(run: str | os.PathLike[str], kind: Kind | None = None, *, device: str = "auto") -> Any:
    """Opens a trained model: `loopos.load("outputs/run").predict(["some text"])`.

    A classifier or regressor, or an ensemble of them, is a `Predictor` with `predict`; a reward model a
    `RewardPredictor` with `score_texts`; a language model a `Reasoner` with `generate`, `chat`, `stream` and `answer`.

    run: a run's output folder, its folder model/, the folder of an ensemble; of a language model also "smollm2-135m", a
    weights file or a hub id. kind: "head", "reward" or "language", where only that one will do; it tells type checkers
    the class. device: auto, cpu, cuda or mps. Raises `loopos.config.diagnostics.UserError`.
    """
    from loopos.evaluation.opening import open_model
    from loopos.models.quiet import quiet_libraries
    from loopos.training.precision import pick_device

    with quiet_libraries():
        return open_model(os.fspath(run), kind, device=pick_device(device).type)


@overload
def read_config(
    config: str | os.PathLike[str] | Mapping[str, object], overrides: Sequence[str] = ..., *, kind: type[ConfigType]
) -> ConfigType: ...
@overload
def read_config(
    config: str | os.PathLike[str] | Mapping[str, object], overrides: Sequence[str] = ..., *, kind: None = ...
) -> MethodConfig: ...
def read_config(
    config: str | os.PathLike[str] | Mapping[str, object],
    overrides: Sequence[str] = (),
    *,
    kind: type[MethodConfig] | None = None,
) -> MethodConfig:
    """The frozen, checked config of a JSON or YAML file, or of a dict with the same keys.

    overrides: "key.path=value" each. kind: the class that it must be, such as `loopos.FineTuningConfig`. Raises
    `loopos.config.diagnostics.ConfigError` with every fault.
    """
    from loopos.config.diagnostics import UserError
    from loopos.config.load import load as load_config
    from loopos.config.methods import config_classes

    found = load_config(config, overrides, config_classes()).config
    if kind is not None and not isinstance(found, kind):
        raise UserError(f"computation.method: got a {type(found).__name__}; expected a {kind.__name__}")
    return found


def train(
    config: MethodConfig | str | os.PathLike[str] | Mapping[str, object],
    overrides: Sequence[str] = (),
    *,
    data: InMemoryRows | None = None,
    validation_data: InMemoryRows | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: MetricFunctions | None = None,
    resume: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> FitResult:
    """Trains, as `loopos train` does: `loopos.train("run.json")`, `loopos.train({...}, data=rows)`.

    config: a file, a dict with the same keys, or what `read_config` gave. In a dict, rows may stand at every key of
    `data` that names a file of rows: a list of dicts, a pandas DataFrame or a `datasets.Dataset`; they are written into
    the run's folder. overrides: "key.path=value" each. data, validation_data: rows that replace those that the config
    names. callbacks: functions of an event, a dict as `events.jsonl` holds it; one that returns "stop" ends the run.
    metrics: validation metrics by name, each a function of (predictions, targets), or a pair of it and "min" where less
    is better. resume: go on from the last checkpoint. docs/post_training.md, "In Python", has the details. Raises
    `loopos.config.diagnostics.UserError`.
    """
    from loopos.cli.python_run import train as train_run
    from loopos.cli.train import TrainOptions
    from loopos.models.quiet import quiet_libraries

    with quiet_libraries():
        return train_run(
            config,
            overrides,
            data=data,
            validation_data=validation_data,
            callbacks=callbacks,
            metrics=metrics or {},
            options=TrainOptions(resume=resume, quiet=quiet, trust_remote_code=trust_remote_code),
        )


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'loopos' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
