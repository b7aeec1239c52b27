"""`loopos runs list|show|diff|report`: finished and running runs, read from their folders without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import confusion_table, say, say_json, shown, table
from loopos.cli.options import Json, argument, path
from loopos.cli.options import RunFolder as RunFolderArgument
from loopos.cli.outcome import note
from loopos.config.diagnostics import UserError
from loopos.config.figures import as_time, once

if TYPE_CHECKING:
    from loopos.evaluation.run_folder import RunFolder

# The metrics for the list, most important first; a run shows the first that it has.
_HEADLINES = ("accuracy", "micro_f1", "mae", "pair_accuracy", "step_accuracy", "reward", "loss")

RunsFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of runs.", parser=path)]
EverySetting = Annotated[bool, typer.Option("--all", help="Also show settings at their defaults.")]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FOLDER", help="Folder for the report.", show_default="the run's", parser=path
    ),
]
FirstRun = Annotated[Path, argument("A", "Output folder of a run.", parser=path)]
SecondRun = Annotated[Path, argument("B", "Output folder of another run.", parser=path)]


def list_runs(folder: RunsFolder = Path("outputs"), json: Json = False) -> int:
    """Lists runs, one per line; a broken run is reported on standard error and skipped. Raises `UserError` if there is
    no such folder.
    """
    from loopos.evaluation.run_folder import find_runs, read_run

    found = []
    for each in find_runs(folder):
        try:
            found.append(read_run(each))
        except UserError as problem:
            note(f"skipped: {problem}")
    if json:
        say_json([run.summary() for run in found])
    elif not found:
        say(f"{folder}: no runs")
    else:
        rows = [
            (run.folder, run.method, run.status, _progress(run), _headline(run), as_time(run.step_seconds), _when(run))
            for run in found
        ]
        head = ("run", "method", "state", "steps", "validation", "time", "begun")
        say(table(rows, head=head, indent=""))
    return 0


def show(folder: RunFolderArgument, every_setting: EverySetting = False, json: Json = False) -> int:
    """Shows one run, with the settings that differ from their defaults or all. Raises `UserError` for a folder without
    a run.
    """
    from loopos.config.changed_settings import changed_settings
    from loopos.config.differences import differences
    from loopos.evaluation.run_folder import read_run

    run = read_run(folder)
    if json:
        history = {key: [list(each) for each in values] for key, values in run.setting_changes().items()}
        say_json({**run.summary(), "first_metrics": run.first_metrics, "changed": history, "config": run.config})
        return 0
    say(f"{run.folder}: {run.method}, {_progress(run)} steps in {as_time(run.step_seconds)}; {run.ended}")
    say(f"started {_when(run)}; " + ("model/ exists" if run.has_model else "no model yet"))
    every = {key: value for key, (value, _) in differences(run.config, {}).items() if value is not None}
    settings = every if every_setting else changed_settings(run.config)
    say("settings" if every_setting else f"settings that differ from their defaults ({len(every)} with --all)")
    say(table([(key, _cell(value)) for key, value in settings.items()]))
    if run.setting_changes():
        say("settings changed on resume")
        say(table([(key, _over_steps(values)) for key, values in run.setting_changes().items()]))
    metrics = once(run.exported_metrics)
    if metrics:
        say("validation")
        rows = [(name, run.first_metrics.get(name), value) for name, value in metrics.items()]
        say(table(rows, head=("", "before training", f"step {run.exported_step}")))
    for sentence in filter(None, (run.outcome.verdict(), run.outcome.export_sentence())):
        say(sentence)
    if run.confusion is not None:
        say("confusion on the validation rows")
        say(confusion_table(*run.confusion))
    return 0


def report(folder: RunFolderArgument, output: ReportFolder = None, json: Json = False) -> int:
    """Writes a run's report as of now. Raises `UserError` for a folder without a run."""
    from loopos.evaluation.report import write_report
    from loopos.evaluation.run_folder import read_run

    run = read_run(folder)
    written = write_report(folder, output)
    if json:
        say_json({"markdown": str(written), "html": str(written.with_suffix(".html")), **run.summary()})
        return 0
    say(f"{written} and {written.with_suffix('.html').name}: {_progress(run)} steps; {run.ended}")
    return 0


def diff(first: FirstRun, second: SecondRun, json: Json = False) -> int:
    """Compares two runs. Raises `UserError` for a folder without a run."""
    from loopos.config.differences import differences
    from loopos.evaluation.run_folder import read_run

    one, other = read_run(first), read_run(second)
    settings = differences(one.config, other.config)
    # A setting that changed within a run differs from the other run's, whatever its last value.
    over = {
        key: tuple(run.setting_changes().get(key) for run in (one, other))
        for key in {**one.setting_changes(), **other.setting_changes()}
    }
    for key in over:
        settings.setdefault(key, (_value(one.config, key), _value(other.config, key)))
    one_metrics, other_metrics = one.exported_metrics, other.exported_metrics
    metrics = {
        name: (one_metrics.get(name), other_metrics.get(name)) for name in dict.fromkeys([*one_metrics, *other_metrics])
    }
    if json:
        say_json({"runs": [str(first), str(second)], "settings": settings, "changed": over, "metrics": metrics})
        return 0
    head = ("", str(first), str(second))
    say(f"settings that differ: {len(settings) or 'none'}")
    if settings:
        rows = []
        for key, values in settings.items():
            steps = over.get(key, (None, None))
            rows.append((key, *(_over_steps(s) if s else _cell(v) for s, v in zip(steps, values, strict=True))))
        say(table(rows, head=head))
    if metrics:
        say("validation metrics of the exported weights")
        say(table([(name, *values) for name, values in metrics.items()], head=head))
    return 0


def _progress(run: RunFolder) -> str:
    return f"{run.step}/{run.total_steps}" if run.total_steps is not None else str(run.step)


def _headline(run: RunFolder) -> str:
    metrics = run.exported_metrics
    name = next((name for name in _HEADLINES if name in metrics), None)
    if name is None:
        return ""
    return f"{name} {shown(metrics[name])}{', start not beaten' if run.outcome.beat_start is False else ''}"


def _when(run: RunFolder) -> str:
    return "" if run.began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.began))


def _over_steps(values: Sequence[tuple[int, Any]]) -> str:
    """A setting's values over the steps of a run: "0.01, from step 6: 0.02"."""
    (_, first), *later = values
    return ", ".join([_cell(first), *(f"from step {step}: {_cell(value)}" for step, value in later)])


def _value(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
