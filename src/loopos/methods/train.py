"""Trains on a config: `train_config` on one that is checked; `train` also on a dict, and on rows of a Python program.

`loopos train` calls the first, `loopos.train` the second.

Checks that need no torch run before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loopos.config.diagnostics import UserError
from loopos.config.json_text import ScalarNode, find
from loopos.config.load import load, method_config_class
from loopos.config.methods import config_classes, method_row
from loopos.config.sections import MethodConfig, ReadingSection
from loopos.data.given_rows import InMemoryRows, are_rows, remove_written, written
from loopos.data.read_ahead import reuse_in_training
from loopos.data.row_check import check_columns, check_rows
from loopos.evaluation.run_claim import refuse_started
from loopos.evaluation.run_folder import holds_run
from loopos.storage.folder_lock import refuse_busy
from loopos.storage.whole_folder import remove

if TYPE_CHECKING:
    from loopos.config.own_function import OwnFunction
    from loopos.evaluation.own_metrics import MetricFunctions, OwnMetrics
    from loopos.training.callbacks import Callbacks
    from loopos.training.run_state import FitResult

ROWS = "rows"
"""Subfolder of the run folder for rows passed in Python."""

Callback: TypeAlias = Callable[[dict[str, Any]], object]
WrittenConfig: TypeAlias = str | os.PathLike[str] | Mapping[str, object]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run starts. `resume`: from its newest checkpoint. `quiet`: shows only warnings. `environment`: settings of
    the process by name, for the log.
    """

    resume: bool = False
    quiet: bool = False
    trust_remote_code: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def train_config(
    config: Any, options: RunOptions, callbacks: Callbacks | None = None, metrics: OwnMetrics | None = None
) -> FitResult:
    """Runs the method of a checked config to its end. callbacks, metrics: functions of the user. Raises `UserError`."""
    with reuse_in_training():
        check_rows(config)
        trainer_class = method_row(config.computation.method).trainer_class
        from loopos.evaluation.own_metrics import OwnMetrics
        from loopos.training.callbacks import Callbacks
        from loopos.training.precision import pick_device, resolve
        from loopos.training.progress import RunProgress

        callbacks = callbacks or Callbacks()
        # Before the weights are read.
        resolve(config.training.precision, pick_device(config.training.device))
        trainer = trainer_class(
            config,
            progress=RunProgress(quiet=options.quiet or not is_first_process()),
            trust_remote_code=options.trust_remote_code,
            environment=options.environment,
            callbacks=callbacks,
            metrics=metrics or OwnMetrics(),
        )
        result: FitResult = trainer.train(resume=options.resume)
    callbacks.raise_failure("the run is finished")
    return result


def is_first_process() -> bool:
    """Whether this process reports for the run: under torchrun all ranks except 0 are silent."""
    return os.environ.get("RANK", "0") == "0"


def run_folders(config: Any) -> list[Path]:
    """The folders of the config's runs, the last one first: rlhf trains a reward model before its policy."""
    first = getattr(config, "reward_model_dir", None)
    return [Path(config.data.output_dir), *([Path(first)] if first is not None else [])]


def active_folder(config: Any) -> Path:
    """The folder of the run that was active last: the reward model's if rlhf stopped in that phase."""
    folders = run_folders(config)
    return next((folder for folder in folders if holds_run(folder)), folders[0])


def train(
    config: MethodConfig | WrittenConfig,
    overrides: Sequence[str],
    *,
    data: InMemoryRows | None,
    validation_data: InMemoryRows | None,
    callbacks: Sequence[Callback],
    metrics: MetricFunctions,
    options: RunOptions,
) -> tuple[Path, FitResult]:
    """As `loopos.train`; the folder of the run that was active last, and its result. Raises `UserError`."""
    from loopos.evaluation.own_metrics import OwnMetrics
    from loopos.training.callbacks import Callbacks

    seen_by, own = Callbacks([_named(callback) for callback in callbacks]), OwnMetrics.of(metrics)
    if isinstance(config, MethodConfig):
        if overrides or data is not None or validation_data is not None:
            raise UserError(
                "data and overrides need a config file or dict; got a config object that is already checked"
            )
        _check_measured(config, own)
        check_columns(config)
        result = train_config(config, options, seen_by, own)
        return active_folder(config), result
    inputs = _Inputs.of(config, overrides, data, validation_data, tuple(own.functions))
    checked = inputs.load(resume=options.resume)
    try:
        _check_measured(checked, own)
        check_columns(checked)
        result = train_config(checked, options, seen_by, own)
    except UserError:
        if options.resume:
            inputs.forget(run_folders(checked))
        raise
    return active_folder(checked), result


@dataclass(frozen=True)
class _Inputs:
    """A config and rows. `inline`: rows inside the dict, by key of `data`; `config` has a placeholder file name there.
    `replacing`: rows that replace what the config names. `own_metrics`: names that the config may use.
    """

    config: WrittenConfig
    overrides: Sequence[str]
    inline: Mapping[str, InMemoryRows]
    replacing: Mapping[str, InMemoryRows]
    own_metrics: Sequence[str]
    added: list[Path] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        config: WrittenConfig,
        overrides: Sequence[str],
        data: InMemoryRows | None,
        validation_data: InMemoryRows | None,
        own_metrics: Sequence[str],
    ) -> _Inputs:
        section = config.get("data") if isinstance(config, Mapping) else None
        if isinstance(config, Mapping) and isinstance(section, Mapping):
            names, _ = method_config_class({**config, "data": {}}, overrides, config_classes())
            keys = [key for key in _section(names).row_keys if are_rows(section.get(key))]
            found: dict[str, Any] = {key: section[key] for key in keys}
            config = {**config, "data": {**section, **{key: f"{key}.jsonl" for key in keys}}}
        else:
            found = {}
        replacing = {} if validation_data is None else {"validation_data": validation_data}
        if data is not None:
            replacing[_source_key(config, overrides)] = data
        inline = {key: rows for key, rows in found.items() if key not in replacing}
        return cls(config, overrides, inline, replacing, own_metrics)

    def load(self, *, resume: bool) -> MethodConfig:
        """The config, with the rows written into its run folder; writes nothing into another run's folder."""
        if not self.inline and not self.replacing:
            return self._loaded({}, self.config, check_files=True)
        first: Any = self._loaded({key: f"{key}.jsonl" for key in self.replacing}, self.config, check_files=False)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("data: several processes cannot write rows passed from Python; name a file instead")
        for run in run_folders(first):
            refuse_busy(run)
            if not resume:
                refuse_started(run)
        folder, row_files = Path(first.data.output_dir) / ROWS, {}
        present = set(folder.glob("*"))
        for key, rows in {**self.inline, **self.replacing}.items():
            if not resume:
                remove_written(folder, key)
            row_files[key] = written(rows, folder, key)
        self.added.extend(file for file in row_files.values() if file not in present)
        config = self.config
        if isinstance(config, Mapping) and self.inline:
            section = config["data"]
            assert isinstance(section, Mapping), "rows were found in it"
            config = {**config, "data": {**section, **{key: row_files[key] for key in self.inline}}}
        return self._loaded({key: str(row_files[key]) for key in self.replacing}, config, check_files=True)

    def _loaded(self, row_files: Mapping[str, str], config: WrittenConfig, *, check_files: bool) -> MethodConfig:
        named = [f"data.{key}={file}" for key, file in row_files.items()]
        overrides, methods = [*self.overrides, *named], config_classes()
        return load(config, overrides, methods, check_files=check_files, own_metrics=self.own_metrics).config

    def forget(self, runs: Sequence[Path]) -> None:
        """Removes files that `load` wrote and no run's config names: the rows of a run that was refused."""
        configs = [run / "config.json" for run in runs]
        run_configs = [config.read_text(encoding="utf-8") for config in configs if config.is_file()]
        for file in self.added:
            if not any(file.name in config for config in run_configs):
                remove(file)
                with suppress(OSError):
                    file.parent.rmdir()


def _check_measured(config: Any, own: OwnMetrics) -> None:
    """Raises `UserError` if the metrics would never be measured."""
    if own and not config.validates:
        raise UserError(
            f"metrics: got {', '.join(own.functions)}, but the config validates nothing; add validation rows and set "
            'training.validate_every to something other than "never"'
        )


def _named(callback: Callback) -> OwnFunction:
    from loopos.config.own_function import OwnFunction
    from loopos.evaluation.own_metrics import name_of

    if not callable(callback):
        raise UserError(f"callbacks: got {callback!r:.80}; expected functions of an event")
    return OwnFunction(f"callback {name_of(callback)}", callback)


def _section(config: type[MethodConfig]) -> type[ReadingSection]:
    """The class of a method's section `data`."""
    section = config.model_fields["data"].annotation
    assert isinstance(section, type), "data is a section"
    assert issubclass(section, ReadingSection), "every method reads rows"
    return section


def _source_key(config: WrittenConfig, overrides: Sequence[str]) -> str:
    """The key by which a config names its training rows; the method's default if it names none."""
    found, root = method_config_class(config, overrides, config_classes())
    keys = _section(found).source_keys
    nodes = {key: find(root, ("data", key)) for key in keys}
    named = [key for key, node in nodes.items() if isinstance(node, ScalarNode) and node.value is not None]
    return named[0] if named else keys[0]
