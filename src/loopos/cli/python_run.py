"""`loopos.train`: a config and rows of a Python program, trained as `loopos train` trains a file.

Enters: a config (file, dict, or checked) and rows. Leaves: a `FitResult`. Left out: the command's own words and exit
codes (`cli.train`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from loopos.cli.train import TrainOptions, run_folders
from loopos.cli.train import train as train_config
from loopos.config.diagnostics import UserError
from loopos.config.json_text import ScalarNode, find
from loopos.config.load import load, method_config_class
from loopos.config.methods import config_classes
from loopos.config.sections import MethodConfig, ReadingSection
from loopos.data.given_rows import InMemoryRows, are_rows, remove_written, written
from loopos.data.row_check import check_columns
from loopos.evaluation.own_code import OwnFunction
from loopos.evaluation.own_metrics import MetricFunctions, OwnMetrics, name_of
from loopos.evaluation.run_claim import refuse_started
from loopos.storage.folder_lock import refuse_busy
from loopos.storage.whole_folder import remove
from loopos.training.callbacks import Callbacks
from loopos.training.run_state import FitResult

ROWS = "rows"
"""The folder of rows given in Python, in that of the run."""

Callback: TypeAlias = Callable[[dict[str, Any]], object]
WrittenConfig: TypeAlias = str | os.PathLike[str] | Mapping[str, object]


def train(
    config: MethodConfig | WrittenConfig,
    overrides: Sequence[str],
    *,
    data: InMemoryRows | None,
    validation_data: InMemoryRows | None,
    callbacks: Sequence[Callback],
    metrics: MetricFunctions,
    options: TrainOptions,
) -> FitResult:
    """As `loopos.train`. Raises `UserError`."""
    seen_by, own = Callbacks([_named(callback) for callback in callbacks]), OwnMetrics.of(metrics)
    if isinstance(config, MethodConfig):
        if overrides or data is not None or validation_data is not None:
            raise UserError("data and overrides go with a file or a dict: got a config that is checked already")
        _check_measured(config, own)
        check_columns(config)
        return train_config(config, options, seen_by, own)
    actual = _Given.of(config, overrides, data, validation_data, tuple(own.functions))
    checked = actual.load(resume=options.resume)
    try:
        _check_measured(checked, own)
        check_columns(checked)
        return train_config(checked, options, seen_by, own)
    except UserError:
        if options.resume:
            actual.forget(run_folders(checked))
        raise


@dataclass(frozen=True)
class _Given:
    """A config and rows. `in_place`: rows that stand in the dict, by the key of `data`, where `config` has a stand-in;
    `instead`: those that take the place of what the config names. `own_metrics`: names that the config may use.
    """

    config: WrittenConfig
    overrides: Sequence[str]
    in_place: Mapping[str, InMemoryRows]
    instead: Mapping[str, InMemoryRows]
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
    ) -> _Given:
        section = config.get("data") if isinstance(config, Mapping) else None
        if isinstance(config, Mapping) and isinstance(section, Mapping):
            names, _ = method_config_class({**config, "data": {}}, overrides, config_classes())
            keys = [key for key in _section(names).row_keys if are_rows(section.get(key))]
            found: dict[str, Any] = {key: section[key] for key in keys}
            config = {**config, "data": {**section, **{key: f"{key}.jsonl" for key in keys}}}
        else:
            found = {}
        instead = {} if validation_data is None else {"validation_data": validation_data}
        if data is not None:
            instead[_source_key(config, overrides)] = data
        in_place = {key: rows for key, rows in found.items() if key not in instead}
        return cls(config, overrides, in_place, instead, own_metrics)

    def load(self, *, resume: bool) -> MethodConfig:
        """The config with the rows written into its run's folder; nothing is written beside another run."""
        if not self.in_place and not self.instead:
            return self._loaded({}, self.config, check_files=True)
        first: Any = self._loaded({key: f"{key}.jsonl" for key in self.instead}, self.config, check_files=False)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("data: rows of a program are written by one process; got several; write a file and name it")
        for run in run_folders(first):
            refuse_busy(run)
            if not resume:
                refuse_started(run)
        folder, placed = Path(first.data.output_dir) / ROWS, {}
        there = set(folder.glob("*"))
        for key, rows in {**self.in_place, **self.instead}.items():
            if not resume:
                remove_written(folder, key)
            placed[key] = written(rows, folder, key)
        self.added.extend(place for place in placed.values() if place not in there)
        config = self.config
        if isinstance(config, Mapping) and self.in_place:
            section = config["data"]
            assert isinstance(section, Mapping), "rows were found in it"
            config = {**config, "data": {**section, **{key: placed[key] for key in self.in_place}}}
        return self._loaded({key: str(placed[key]) for key in self.instead}, config, check_files=True)

    def _loaded(self, placed: Mapping[str, str], config: WrittenConfig, *, check_files: bool) -> MethodConfig:
        named = [f"data.{key}={place}" for key, place in placed.items()]
        words, methods = [*self.overrides, *named], config_classes()
        return load(config, words, methods, check_files=check_files, own_metrics=self.own_metrics).config

    def forget(self, runs: Sequence[Path]) -> None:
        """Removes what `load` wrote and no run has taken up: the rows of a run that was refused."""
        configs = [run / "config.json" for run in runs]
        kept = [config.read_text(encoding="utf-8") for config in configs if config.is_file()]
        for place in self.added:
            if not any(place.name in config for config in kept):
                remove(place)
                with suppress(OSError):
                    place.parent.rmdir()


def _check_measured(config: Any, own: OwnMetrics) -> None:
    """Raises `UserError` where the metrics would never be measured."""
    if own and not config.validates:
        raise UserError(
            f"metrics: got {', '.join(own.functions)}, but the config validates nothing; expected validation rows and "
            'another training.validate_every than "never"'
        )


def _named(callback: Callback) -> OwnFunction:
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
    """The key by which a config names its rows to train on; the method's own where it names none."""
    found, root = method_config_class(config, overrides, config_classes())
    keys = _section(found).source_keys
    nodes = {key: find(root, ("data", key)) for key in keys}
    named = [key for key, node in nodes.items() if isinstance(node, ScalarNode) and node.value is not None]
    return named[0] if named else keys[0]
