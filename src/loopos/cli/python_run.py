"""`loopos.train`: a config and rows of a Python program, trained as `loopos train` trains a file.

Enters: a config (file, dict, or checked) and rows. Leaves: a `FitResult`. Left out: the command's own words and exit
codes (`cli.train`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopos.cli.train import TrainOptions, run_folders
from loopos.cli.train import train as train_config
from loopos.config.faults import UserError
from loopos.config.load import load
from loopos.config.sections import MethodConfig
from loopos.data.column_check import check_columns
from loopos.data.given_rows import GivenRows, written
from loopos.evaluation.run_claim import refuse_started
from loopos.methods.table import config_classes
from loopos.storage.folder_lock import refuse_busy
from loopos.training.fit_result import FitResult

ROWS = "rows"
"""The folder of rows given in Python, in that of the run."""


def train(
    config: MethodConfig | str | os.PathLike[str] | Mapping[str, object],
    overrides: Sequence[str],
    *,
    data: GivenRows | None,
    validation_data: GivenRows | None,
    options: TrainOptions,
) -> FitResult:
    """As `loopos.train`. Raises `UserError`."""
    given = {"training_data": data, "validation_data": validation_data}
    rows = {key: value for key, value in given.items() if value is not None}
    checked = config if isinstance(config, MethodConfig) else None
    if checked is not None and (rows or overrides):
        raise UserError("data and overrides go with a file or a dict: got a config that is checked already")
    if checked is None:
        assert not isinstance(config, MethodConfig)
        checked = _with_rows(config, overrides, rows, resume=options.resume)
    check_columns(checked)
    return train_config(checked, options)


def _with_rows(
    config: str | os.PathLike[str] | Mapping[str, object],
    overrides: Sequence[str],
    rows: Mapping[str, GivenRows],
    *,
    resume: bool,
) -> MethodConfig:
    """The config with the rows written into its run's folder; nothing is written beside another run."""
    if not rows:
        return load(config, overrides, config_classes()).config
    named = [f"data.{key}={key}.jsonl" for key in rows]
    first: Any = load(config, [*overrides, *named], config_classes(), check_files=False).config
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("data: rows of a program are written by one process; got several; write a file and name it")
    for folder in run_folders(first):
        refuse_busy(folder)
        if not resume:
            refuse_started(folder)
    folder = Path(first.data.output_dir) / ROWS
    placed = [f"data.{key}={written(value, folder, key)}" for key, value in rows.items()]
    return load(config, [*overrides, *placed], config_classes()).config
