"""`loopos runs list|show|diff`: finished and running runs, read from their folders.

Enters: folders. Leaves: tables or JSON. Nothing is written, and torch is not imported.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from loopos.cli.answers import as_time, confusion_table, say, say_json, table
from loopos.cli.outcome import note
from loopos.config.faults import UserError
from loopos.evaluation.run_folder import Run, differences, find_runs, read_run

# The metrics worth a column in a list, best first; a run shows the first that it has.
_HEADLINES = ("accuracy", "micro_f1", "mae", "pair_accuracy", "reward", "loss")


def list_runs(folder: Path, *, as_json: bool) -> int:
    """One line a run; one that is broken is named on standard error, and the others are listed. Raises `UserError` if
    there is no such folder.
    """
    found = []
    for path in find_runs(folder):
        try:
            found.append(read_run(path))
        except UserError as problem:
            note(f"left out: {problem}")
    if as_json:
        say_json([run.summary() for run in found])
    elif not found:
        say(f"{folder}: no runs")
    else:
        rows = [
            (run.path, run.method, run.status, _progress(run), _headline(run), as_time(run.seconds), _when(run))
            for run in found
        ]
        head = ("run", "method", "ended by", "steps", "best", "time", "begun")
        say(table(rows, head=head, indent=""))
    return 0


def show(folder: Path, *, as_json: bool) -> int:
    """One run in full. Raises `UserError` for a folder without a run."""
    run = read_run(folder)
    if as_json:
        say_json({**run.summary(), "first_metrics": run.first_metrics, "config": run.config})
        return 0
    say(f"{run.path}: {run.method}, {_progress(run)} steps in {as_time(run.seconds)}; ended by {run.status}")
    say(f"begun {_when(run)}; " + ("model/ is there" if run.has_model else "no model yet"))
    say("settings")
    say(table([(key, _told(value)) for key, (value, _) in differences(run.config, {}).items() if value is not None]))
    metrics = [name for name in run.best_metrics if name != "best"]
    if metrics:
        say(f"validation, best at step {run.best_step}")
        rows = [(name, run.first_metrics.get(name), run.best_metrics[name]) for name in metrics]
        say(table(rows, head=("", "first", "best")))
    if run.confusion is not None:
        say("confusion on the validation rows")
        say(confusion_table(*run.confusion))
    return 0


def diff(first: Path, second: Path, *, as_json: bool) -> int:
    """Two runs side by side. Raises `UserError` for a folder without a run."""
    one, other = read_run(first), read_run(second)
    settings = differences(one.config, other.config)
    names = [name for name in dict.fromkeys([*one.best_metrics, *other.best_metrics]) if name != "best"]
    metrics = {name: (one.best_metrics.get(name), other.best_metrics.get(name)) for name in names}
    if as_json:
        say_json({"runs": [str(first), str(second)], "settings": settings, "metrics": metrics})
        return 0
    head = ("", str(first), str(second))
    say(f"settings that differ: {len(settings) or 'none'}")
    if settings:
        say(table([(key, _told(values[0]), _told(values[1])) for key, values in settings.items()], head=head))
    if metrics:
        say("metrics of the best validation")
        say(table([(name, *values) for name, values in metrics.items()], head=head))
    return 0


def _progress(run: Run) -> str:
    return f"{run.step}/{run.total_steps}" if run.total_steps is not None else str(run.step)


def _headline(run: Run) -> str:
    name = next((name for name in _HEADLINES if name in run.best_metrics), None)
    return "" if name is None else f"{name} {run.best_metrics[name]:.4f}"


def _when(run: Run) -> str:
    return "" if run.began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.began))


def _told(value: Any) -> str:
    return "-" if value is None else str(value)
