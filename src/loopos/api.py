"""`loopos.train`, `load`, `generate` and `read_config`.

Each does what the command of its name does, by the same function of its room. torch is imported when one
runs. `changes` has the functions that make a new model of another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar, Unpack, overload

from loopos.run import Run, opened

if TYPE_CHECKING:
    from loopos.config.sections import MethodConfig
    from loopos.data.given_rows import InMemoryRows
    from loopos.data.supervised_tokens import Problem
    from loopos.evaluation.opening import Kind
    from loopos.evaluation.own_metrics import MetricFunctions
    from loopos.evaluation.predictor import EnsemblePredictor, Predictor
    from loopos.evaluation.reasoning import Reasoner
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.generation.settings import SamplingParams
    from loopos.methods.train import Callback

    ConfigType = TypeVar("ConfigType", bound=MethodConfig)

Model: TypeAlias = "str | os.PathLike[str] | Run"
"""What names a model: the folder of a run or of a model, a weights file, "smollm2-135m", a hub id, or a `Run`."""
Messages: TypeAlias = Sequence[Mapping[str, object]]
"""A conversation: dicts with "role" and "content"."""
WrittenConfig: TypeAlias = "str | os.PathLike[str] | Mapping[str, object]"


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingParams` as arguments of `generate`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram: int
    logit_bias: Mapping[int, float]
    max_new_tokens: int
    stop: str | Sequence[str]
    keep_stop: bool
    stop_token_ids: tuple[int, ...]
    stop_at_end: bool
    json_schema: str | None
    seed: int


@overload
def load(run: Model, kind: Literal["head"], *, device: str = ...) -> Predictor | EnsemblePredictor: ...
@overload
def load(run: Model, kind: Literal["language"], *, device: str = ...) -> Reasoner: ...
@overload
def load(run: Model, kind: Literal["reward"], *, device: str = ...) -> RewardPredictor: ...
@overload
def load(run: Model, kind: None = ..., *, device: str = ...) -> Any: ...
def load(run: Model, kind: Kind | None = None, *, device: str = "auto") -> Any:
    """Opens a trained model: `loopos.load("outputs/run").predict(["some text"])`.

    A classifier or regressor, or an ensemble of them, is a `Predictor` with `predict`; a reward model a
    `RewardPredictor` with `score_texts`; a language model a `Reasoner` with `generate`, `chat`, `stream` and `answer`.

    Args:
        run: A run's output folder, its folder model/, the folder of an ensemble; of a language model also
            "smollm2-135m", a weights file or a hub id.
        kind: "head", "reward" or "language", where only that one will do; it tells type checkers the class.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        UserError: If there is no model, or one of another kind.
    """
    return opened(location_of(run), kind, device=device)


@overload
def read_config(config: WrittenConfig, overrides: Sequence[str] = ..., *, kind: type[ConfigType]) -> ConfigType: ...
@overload
def read_config(config: WrittenConfig, overrides: Sequence[str] = ..., *, kind: None = ...) -> MethodConfig: ...
def read_config(
    config: WrittenConfig, overrides: Sequence[str] = (), *, kind: type[MethodConfig] | None = None
) -> MethodConfig:
    """The frozen, checked config of a JSON or YAML file, or of a dict with the same keys.

    Args:
        config: A file, or a dict.
        overrides: "key.path=value" each.
        kind: The class that it must be, such as `loopos.FineTuningConfig`.

    Raises:
        ConfigError: With every mistake in the config.
    """
    from loopos.config.diagnostics import UserError
    from loopos.config.load import load as load_config
    from loopos.config.methods import config_classes

    found = load_config(config, overrides, config_classes()).config
    if kind is not None and not isinstance(found, kind):
        raise UserError(f"computation.method: got a {type(found).__name__}; expected a {kind.__name__}")
    return found


def train(
    config: MethodConfig | WrittenConfig,
    overrides: Sequence[str] = (),
    *,
    data: InMemoryRows | None = None,
    validation_data: InMemoryRows | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: MetricFunctions | None = None,
    resume: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Run:
    """Trains, as `loopos train` does: `run = loopos.train("run.json")`, `loopos.train({...}, data=rows)`.

    Shows progress on a terminal and in a notebook. Ctrl-C, or a notebook's stop button, ends the run after the current
    step with a checkpoint, and `resume=True` continues it to the numbers of an uninterrupted run.

    Args:
        config: A file, a dict with the same keys, or what `read_config` returned. In a dict, rows may stand at every
            key of `data` that names a file of rows: a list of dicts, a pandas DataFrame or a `datasets.Dataset`; they
            are written into the run's folder.
        overrides: "key.path=value" each.
        data: Rows that replace those that the config names.
        validation_data: Rows that replace the validation rows that the config names.
        callbacks: Functions of an event, a dict as `events.jsonl` holds it; one that returns "stop" ends the run.
        metrics: Validation metrics by name, each a function of (predictions, targets), or a pair of it and "min" where
            less is better.
        resume: Continue from the newest checkpoint.
        quiet: Show only warnings.
        trust_remote_code: Run the Python code of a model from the hub.

    Raises:
        UserError: For a mistake in config, data or arguments.
        KeyboardInterrupt: If Ctrl-C comes outside of the training steps, or twice.
    """
    from loopos.cli.process import settings_in_force
    from loopos.methods.train import RunOptions
    from loopos.methods.train import train as train_run
    from loopos.models.quiet import quiet_libraries

    with quiet_libraries():
        folder, result = train_run(
            config,
            overrides,
            data=data,
            validation_data=validation_data,
            callbacks=callbacks,
            metrics=metrics or {},
            options=RunOptions(resume, quiet, trust_remote_code, settings_in_force()),
        )
    return Run(folder, result)


@overload
def generate(  # type: ignore[overload-overlap]
    model: Model | Reasoner,
    prompts: str | Messages,
    params: SamplingParams | None = ...,
    *,
    n: None = ...,
    system: str | None = ...,
    raw: bool = ...,
    device: str = ...,
    **sampling: Unpack[SamplingKeywords],
) -> str: ...
@overload
def generate(  # type: ignore[overload-overlap]
    model: Model | Reasoner,
    prompts: str | Messages,
    params: SamplingParams | None = ...,
    *,
    n: int,
    system: str | None = ...,
    raw: bool = ...,
    device: str = ...,
    **sampling: Unpack[SamplingKeywords],
) -> list[str]: ...
@overload
def generate(
    model: Model | Reasoner,
    prompts: Sequence[str | Messages],
    params: SamplingParams | None = ...,
    *,
    n: None = ...,
    system: str | None = ...,
    raw: bool = ...,
    device: str = ...,
    **sampling: Unpack[SamplingKeywords],
) -> list[str]: ...
@overload
def generate(
    model: Model | Reasoner,
    prompts: Sequence[str | Messages],
    params: SamplingParams | None = ...,
    *,
    n: int,
    system: str | None = ...,
    raw: bool = ...,
    device: str = ...,
    **sampling: Unpack[SamplingKeywords],
) -> list[list[str]]: ...
def generate(
    model: Model | Reasoner,
    prompts: str | Messages | Sequence[str | Messages],
    params: SamplingParams | None = None,
    *,
    n: int | None = None,
    system: str | None = None,
    raw: bool = False,
    device: str = "auto",
    **sampling: Unpack[SamplingKeywords],
) -> str | list[str] | list[list[str]]:
    """Generates text: `loopos.generate("smollm2-135m", "Hello", max_new_tokens=32)`.

    One prompt gives one text, a list of prompts a list of texts in order. Greedy unless `temperature` is set. For more
    than one call open the model once: `model = loopos.load("smollm2-135m")`.

    Args:
        model: A language model: a folder, a file, "smollm2-135m", a hub id, a `Run`, or what `load` returned.
        prompts: A user message, or a conversation as a list of dicts with "role" and "content"; or a list of them.
        params: How tokens are sampled and when a text ends. Instead, or to change some: its fields as arguments.
        n: Texts for each prompt; each prompt then has a list.
        system: A system message before each prompt.
        raw: Continue each text as it is, without the chat template.
        device: "auto", "cpu", "cuda" or "mps".
        sampling: Fields of `SamplingParams`, such as `max_new_tokens`, `temperature`, `top_p`, `stop` and `seed`.

    Raises:
        UserError: For a place without a language model, a value out of range, or a prompt that the model cannot take.
    """
    from loopos.config.diagnostics import UserError
    from loopos.evaluation.reasoning import Reasoner
    from loopos.generation.settings import SamplingParams

    # Any: `SamplingParams` makes a tuple of what `stop` may be.
    named: dict[str, Any] = {**sampling}
    chosen = replace(params or SamplingParams(), **named)
    if n is not None and n < 1:
        raise UserError(f"n: got {n}; expected 1 or more")
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    # Any: the shape of `prompts` is known now, not to the type checker.
    every: Any = [prompts] if is_one else prompts
    problems = [_problem(prompt, index, system=system, raw=raw) for index, prompt in enumerate(every)]
    reasoner = model if isinstance(model, Reasoner) else load(model, "language", device=device)
    texts = reasoner.generate(problems, chosen, n=n or 1)
    if n is None:
        return texts[0] if is_one else texts
    grouped = [texts[first : first + n] for first in range(0, len(texts), n)]
    return grouped[0] if is_one else grouped


def location_of(model: Model) -> str:
    """The place that a model is named by."""
    return str(model.folder) if isinstance(model, Run) else os.fspath(model)


def _problem(prompt: str | Messages, index: int, *, system: str | None, raw: bool) -> Problem:
    """A prompt as a model takes it. Raises `UserError` for messages without role or content."""
    from loopos.config.diagnostics import UserError
    from loopos.data.conversations import Message
    from loopos.data.rows import Row
    from loopos.data.supervised_rows import Completion
    from loopos.evaluation.reasoning import messages_of

    if raw:
        if system is not None or not isinstance(prompt, str):
            raise UserError("raw: got messages; a raw prompt is a text that the model continues as it is")
        return Completion(prompt, "", Row({}, "prompt", None, index))
    found = messages_of(prompt)
    if system is None:
        return found
    return [Message("system", system), *([Message("user", found)] if isinstance(found, str) else found)]
