"""A run's folder enters (`events.jsonl`, `config.json`), `report.md` and SVG curves leave. Only files are read.

Events used: "step" and "validation" (numbers by name), and the last "confusion" ({"class_names": [...], "matrix":
[[...]]}); all others are counted. Equal events give equal bytes. Left out: judging what the figures mean.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from loopos.evaluation.drawing import drawing, svg_of
from loopos.evaluation.markdown import cell, number, shown, table
from loopos.evaluation.metrics import METRIC_DIRECTION
from loopos.evaluation.policy_metrics import POLICY_METRIC_DIRECTION
from loopos.evaluation.policy_report import policy_sections
from loopos.evaluation.preference_metrics import PREFERENCE_METRIC_DIRECTION
from loopos.evaluation.preference_report import preference_sections
from loopos.storage.durable import write_whole

Event: TypeAlias = dict[str, Any]
Series: TypeAlias = list[tuple[int, float]]

STEP_CURVES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm before clipping",
}
SHOWN_SETTINGS = (
    "computation.method",
    "data.pretrained_weights",
    "data.training_data",
    "data.validation_data",
    "model.task",
    "training.trainable",
    "training.optimizer",
    "training.schedule",
    "training.learning_rate",
    "training.batch_size",
    "training.gradient_accumulation",
    "training.num_epochs",
    "training.precision",
    "training.seed",
)

_DIRECTIONS = {**METRIC_DIRECTION, **PREFERENCE_METRIC_DIRECTION, **POLICY_METRIC_DIRECTION}
_MOST_VALIDATIONS_LISTED = 40
_MOST_CLASSES_IN_TABLE = 30
_MOST_CONFUSIONS_LISTED = 20


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.md` and `run_dir/curves/*.svg` from the run's events; returns the report's path.

    Raises `FileNotFoundError` without `events.jsonl` or `config.json`, ValueError (file:line) on a broken event.
    """
    events = _read_events(run_dir / "events.jsonl")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    steps = [event for event in events if event["event"] == "step"]
    validations = [event for event in events if event["event"] == "validation"]
    confusions = [event for event in events if event["event"] == "confusion"]
    parts = [f"# Run {run_dir.resolve().name}"]
    if config.get("description"):
        parts.append(str(config["description"]))
    parts += ["## Summary", _summary(config, steps, events)]
    if validations:
        parts += ["## Validation", _best_values(validations), _validation_table(validations)]
    if curves := _draw_curves(run_dir / "curves", steps, validations):
        parts += ["## Curves", *(f"![{path.stem}](curves/{path.name})" for path in curves)]
    if confusions:
        parts += ["## Confusion", _confusion(confusions[-1])]
    parts += preference_sections(events)
    parts += policy_sections(run_dir, events)
    report = run_dir / "report.md"
    write_whole(report, ("\n\n".join(parts) + "\n").encode())
    return report


def _read_events(path: Path) -> list[Event]:
    # Evaluation may not import training, whose event log writes this file; a run cut short may end in a torn line.
    events = []
    for place, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            events.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{place}: not an event ({error})") from error
    return events


def _series(events: Iterable[Event], name: str) -> Series:
    values = [(event["step"], number(event["metrics"].get(name))) for event in events]
    return [(step, value) for step, value in values if step is not None and value is not None]


def _metric_names(validations: Sequence[Event]) -> list[str]:
    """Names of the numbers in the order in which they first occur."""
    found = [name for event in validations for name, value in event["metrics"].items() if number(value) is not None]
    return list(dict.fromkeys(found))


def _summary(config: Event, steps: Sequence[Event], events: Sequence[Event]) -> str:
    rows = []
    for setting in SHOWN_SETTINGS:
        section, name = setting.split(".")
        value = config.get(section, {}).get(name)
        if value is not None:
            rows.append((setting, f"`{cell(value)}`"))
    if steps:
        rows.append(("last step", str(steps[-1]["step"])))
    if losses := _series(steps, "loss"):
        rows.append(("training loss, first", f"{shown(losses[0][1])} (step {losses[0][0]})"))
        rows.append(("training loss, last", f"{shown(losses[-1][1])} (step {losses[-1][0]})"))
    timings = dict.fromkeys(name for event in steps for name in event["timing"] if name != "time")
    for name in timings:
        numbers = [value for event in steps if (value := number(event["timing"].get(name))) is not None]
        if numbers:
            rows.append((f"{name}, median of {len(numbers)} steps", shown(statistics.median(numbers))))
    counts = Counter(event["event"] for event in events)
    rows.append(("events", ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"))
    return table(("", "value"), rows)


def _best_values(validations: Sequence[Event]) -> str:
    rows = []
    for name in _metric_names(validations):
        series = _series(validations, name)
        finite = [point for point in series if math.isfinite(point[1])]
        if name in _DIRECTIONS and finite:
            choose = min if _DIRECTIONS[name] == "min" else max
            step, value = choose(finite, key=lambda point: point[1])
            rows.append((name, _DIRECTIONS[name], shown(value), str(step), shown(series[-1][1])))
    return table(("metric", "better", "best", "at step", "last"), rows)


def _validation_table(validations: Sequence[Event]) -> str:
    names = _metric_names(validations)
    stride = math.ceil(len(validations) / _MOST_VALIDATIONS_LISTED)
    # Counted from the end, so that the last validation is always there.
    listed = validations[::-1][::stride][::-1]
    rows = []
    for event in listed:
        values = [number(event["metrics"].get(name)) for name in names]
        rows.append([str(event["step"]), *("" if value is None else shown(value) for value in values)])
    listing = table(("step", *names), rows)
    return listing if stride == 1 else f"{listing}\n\n{len(listed)} of {len(validations)} validations: one in {stride}."


def _confusion(event: Event) -> str:
    names = [cell(name) for name in event["metrics"]["class_names"]]
    matrix: list[list[int]] = event["metrics"]["matrix"]
    place = "" if event["step"] is None else f", step {event['step']}"
    if len(names) <= _MOST_CLASSES_IN_TABLE:
        rows = [(f"**{name}**", *(str(count) for count in counts)) for name, counts in zip(names, matrix, strict=True)]
        return f"Row: true class. Column: predicted class{place}.\n\n" + table(("", *names), rows)
    pairs = [
        (count, true, predicted)
        for true, counts in enumerate(matrix)
        for predicted, count in enumerate(counts)
        if true != predicted and count > 0
    ]
    largest = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:_MOST_CONFUSIONS_LISTED]
    rows = [(names[true], names[predicted], str(count)) for count, true, predicted in largest]
    said = f"{len(names)} classes{place}: the {len(largest)} largest of {len(pairs)} confusions."
    return f"{said}\n\n" + table(("true class", "predicted class", "rows"), rows)


def _draw_curves(folder: Path, steps: Sequence[Event], validations: Sequence[Event]) -> list[Path]:
    """One SVG for each step curve that has points, and `validation.svg` with one panel a metric; returns the paths."""
    folder.mkdir(exist_ok=True)
    drawn = []
    for name, title in STEP_CURVES.items():
        lines = {"training": _series(steps, name)}
        if name == "loss":
            lines["validation"] = _series(validations, name)
        if any(lines.values()):
            drawn.append(_draw(folder / f"{name}.svg", {title: lines}))
    if names := _metric_names(validations):
        drawn.append(_draw(folder / "validation.svg", {name: {name: _series(validations, name)} for name in names}))
    return drawn


def _draw(path: Path, panels: dict[str, dict[str, Series]]) -> Path:
    """One panel a title, one line a name; gaps where a value is not finite."""
    num_columns = min(len(panels), 2)
    num_rows = math.ceil(len(panels) / num_columns)
    with drawing(4.5 * num_columns + 1.5, 2.6 * num_rows + 0.4) as figure:
        for position, (title, lines) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(num_rows, num_columns, position)
            for name, series in lines.items():
                points = [(step, value if math.isfinite(value) else math.nan) for step, value in series]
                marker = "o" if len(points) <= _MOST_VALIDATIONS_LISTED else ""
                axes.plot([step for step, _ in points], [value for _, value in points], marker=marker, ms=3, label=name)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if sum(bool(series) for series in lines.values()) > 1:
                axes.legend()
        write_whole(path, svg_of(figure).encode())
    return path
