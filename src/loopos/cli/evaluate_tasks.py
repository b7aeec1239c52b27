"""`loopos evaluate --tasks`: evaluates a language model or an ensemble on lm-eval tasks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopos.cli.answers import say, say_json, table
from loopos.cli.opened_models import open_reasoner, require_language_model
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.row_files import refuse_unwritable, write_whole
from loopos.cli.sampling_options import place_diagnostics, refuse
from loopos.config.diagnostics import MissingRequirement, printable_json
from loopos.config.extras import install_command
from loopos.config.figures import as_time

_PACKAGE = "lm_eval"
_DEFAULT_FILTER = "none"
# lm-eval's fields beside the metrics of a task.
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The options of `loopos evaluate` for tasks of lm-eval."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    num_fewshot: int | None = None
    chat: bool = False

    def changed(self) -> list[str]:
        """The options other than the task names that differ from their defaults, as written on the command line."""
        actual = {"--task-folder": self.folder, "--num-fewshot": self.num_fewshot, "--chat": self.chat or None}
        return [name for name, value in actual.items() if value is not None]


def run(
    source: str,
    options: TaskOptions,
    *,
    limit: int | None,
    seed: int,
    output: Path | None,
    device: str,
    precision: str,
    as_json: bool,
    verbose: bool,
) -> int:
    """Evaluates and prints. Raises `UserError`."""
    diagnostics = list(place_diagnostics(device, precision))
    if limit is not None and limit < 1:
        diagnostics.append(f"--limit: got {limit}; expected 1 or more")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        diagnostics.append(f"--num-fewshot: got {options.num_fewshot}; expected 0 or more")
    if options.folder is not None and not options.folder.is_dir():
        diagnostics.append(f"--task-folder: {options.folder} is not a folder; expected one with task files (.yaml)")
    refuse(diagnostics)
    if output is not None:
        refuse_unwritable(output)
    opened = require_language_model(source)
    if importlib.util.find_spec(_PACKAGE) is None:
        raise MissingRequirement(f"--tasks needs lm_eval; run\n  {install_command('eval')}")
    restart_with_settings()
    hush_libraries(verbose=verbose)
    reasoner = open_reasoner(opened, device=device, precision=precision)
    from loopos.evaluation.harness import EngineModel, run_tasks

    model, began = EngineModel(reasoner, seed=seed, note=note), time.monotonic()
    names = [name.strip() for each in options.names for name in each.split(",") if name.strip()]
    found = run_tasks(
        model, names, num_fewshot=options.num_fewshot, limit=limit, folder=options.folder, chat=options.chat
    )
    seconds = time.monotonic() - began
    if output is not None:
        _write(output, found["samples"])
    tasks = {name: _metrics(results) for name, results in found["results"].items()}
    if as_json:
        version = importlib.metadata.version(_PACKAGE)
        say_json({"model": source, "tasks": tasks, "seconds": seconds, "lm_eval": version})
        return 0
    rows = [(name, metric, value) for name, metrics in tasks.items() for metric, value in metrics.items()]
    say(table(rows, head=("task", "metric", "value")))
    say(f"  {as_time(seconds)}")
    return 0


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Metric → value. lm-eval's keys are "metric,filter"; the filter is dropped unless the task has one."""
    found = {}
    for key, value in results.items():
        metric, _, filter_name = key.partition(",")
        if key in _NOT_METRICS or isinstance(value, bool | str) or value is None or metric.endswith("_stderr"):
            continue
        found[metric if filter_name in ("", _DEFAULT_FILTER) else key] = float(value)
    return found


def _write(file: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    lines = [
        printable_json(json.dumps({"task": name, **sample}, ensure_ascii=False, default=str)) + "\n"
        for name, each in samples.items()
        for sample in each
    ]
    write_whole(file, "".join(lines))
    note(f"{file}: {len(lines)} documents")
