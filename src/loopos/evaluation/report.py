"""Writes a run's report.md and report.html from its folder, at any moment: while it trains, after a kill, at its end.

report.html contains all pictures; those of report.md are in `curves/`. Equal events give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from loopos.config.figures import figure, once
from loopos.evaluation.audit import audit_blocks, signs_of, weights_of
from loopos.evaluation.blocks import (
    Block,
    Grid,
    Heading,
    Paragraph,
    Picture,
    Quotation,
    as_html,
    as_markdown,
    number,
    opening,
    spread,
)
from loopos.evaluation.drawing import curves_svg
from loopos.evaluation.metrics import METRIC_DIRECTION, METRIC_MEANING
from loopos.evaluation.policy_metrics import POLICY_METRIC_DIRECTION
from loopos.evaluation.policy_report import policy_blocks
from loopos.evaluation.preference_metrics import PREFERENCE_METRIC_DIRECTION
from loopos.evaluation.preference_report import preference_blocks
from loopos.evaluation.run_folder import RunFolder, read_run
from loopos.evaluation.run_outcome import FLAGS
from loopos.evaluation.step_metrics import STEP_METRIC_DIRECTION
from loopos.evaluation.task_report import task_blocks
from loopos.storage.durable import write_whole

# Default number of samples.
_SHOWN = 3
_MOST_CHARACTERS = 2000


def samples_blocks(run: RunFolder) -> list[Block]:
    """The first prompts, with the answers before training and at the last validation; nothing without samples."""
    records = run.samples
    steps = sorted({each["step"] for each in records})
    if not steps:
        return []
    shown = (run.config.get("evaluation") or {}).get("samples")
    most = shown if isinstance(shown, int) and shown > 0 else _SHOWN
    first, last = ([each for each in records if each["step"] == step] for step in (steps[0], steps[-1]))
    title = "Answers before and after" if steps[0] == 0 and len(steps) > 1 else "Answers"
    parts: list[Block] = [Heading(title)]
    for index, record in enumerate(last[:most]):
        parts.append(Quotation(_short(_first_of(record, "prompt", "problem"))))
        rows = []
        if index < len(first) and len(steps) > 1:
            rows.append(_row("before training" if steps[0] == 0 else f"step {steps[0]}", first[index]))
        rows.append(_row(f"step {steps[-1]}", record))
        reference = _first_of(record, "reference", "expected", "wanted")
        if reference:
            rows.append(("in the data", "", _short(reference)))
        named = next((name for name in ("reward", "is_right", "judge") if name in record), "")
        parts.append(Grid(("", named, "answer"), rows))
    return parts


def _row(name: str, record: Mapping[str, Any]) -> tuple[str, str, str]:
    reward, right = number(record.get("reward", record.get("judge"))), record.get("is_right")
    scored = figure(reward) if reward is not None else {True: "right", False: "wrong"}.get(right, "")  # type: ignore[arg-type]
    return name, scored, _short(_first_of(record, "response", "text", "answer"))


def _first_of(record: Mapping[str, Any], *names: str) -> str:
    return next((str(record[name]) for name in names if record.get(name) not in (None, "")), "")


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


Event: TypeAlias = dict[str, Any]
Series: TypeAlias = list[tuple[int, float]]

STEP_CURVES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm before clipping",
}
_PICTURES = "curves"
_DIRECTIONS = {**METRIC_DIRECTION, **PREFERENCE_METRIC_DIRECTION, **STEP_METRIC_DIRECTION, **POLICY_METRIC_DIRECTION}
_MOST_VALIDATIONS_LISTED = 40


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes report.md, report.html and `curves/*.svg` into `output`, by default the run folder; returns the path of
    report.md. Each file is replaced atomically. Raises `UserError` for a folder without a run, or with a broken config
    or event.
    """
    run = read_run(run_dir)
    title, blocks = f"Run {run_dir.resolve().name}", report_blocks(run)
    folder = output or run_dir
    (folder / _PICTURES).mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Picture):
            write_whole(folder / _PICTURES / f"{block.name}.svg", block.svg.encode())
    write_whole(folder / "report.html", as_html(title, blocks).encode())
    write_whole(folder / "report.md", as_markdown(title, blocks, pictures=_PICTURES).encode())
    return folder / "report.md"


def report_blocks(run: RunFolder) -> list[Block]:
    """The whole report of a run."""
    steps = [event for event in run.events if event["event"] == "step"]
    validations = [event for event in run.events if event["event"] == "validation"]
    parts = opening(run)
    if validations:
        parts += [Heading("Validation"), _against_start(run, validations), *_validation_table(validations)]
    parts += _notes(run.events)
    policy = policy_blocks(run)
    curves = _curves(steps, [] if policy else validations)
    if curves:
        parts += [Heading("Curves"), *curves]
    parts += [*task_blocks(run.events), *preference_blocks(run.events), *policy]
    audited = audit_blocks(signs_of(run.rollouts or run.samples, weights_of(run.config))) if policy else []
    return [*parts, *samples_blocks(run), *audited]


def _series(events: Iterable[Event], name: str) -> Series:
    values = [(event["step"], number(event["metrics"].get(name))) for event in events]
    return [(step, value) for step, value in values if step is not None and value is not None]


def metric_names(events: Sequence[Event]) -> list[str]:
    """Names of the numeric metrics in order of first occurrence, each figure under one name."""
    names = [name for event in events for name, value in event["metrics"].items() if number(value) is not None]
    numeric = {name for event in events for name in once(event["metrics"])}
    return [name for name in dict.fromkeys(names) if name in numeric and name not in FLAGS]


def _against_start(run: RunFolder, validations: Sequence[Event]) -> Grid:
    """Every metric before training, at its best after it, and for the exported weights."""
    rows = []
    sessions = [event["metrics"] for event in run.events if event["event"] == "session"]
    directions = {**_DIRECTIONS, **(sessions[-1].get("own_metrics", {}) if sessions else {})}
    before, exported = run.outcome.start, run.outcome.exported
    after = [event for event in validations if event["step"] != 0]
    for name in metric_names(validations):
        finite = [point for point in _series(after, name) if math.isfinite(point[1])]
        best = ("", "")
        if name in directions and finite:
            choose = min if directions[name] == "min" else max
            step, value = choose(finite, key=lambda point: point[1])
            best = (figure(value), str(step))
        first = number(before.metrics.get(name)) if before is not None else None
        chosen = number(exported.metrics.get(name)) if exported is not None else None
        decides = " (decides)" if name == run.outcome.metric else ""
        rows.append((f"{name}{decides}", directions.get(name, ""), _cell(first), *best, _cell(chosen)))
    step_text = "" if exported is None else f", step {exported.step}"
    head = ("metric", "better", "before training", "best after", "at step", f"exported{step_text}")
    return Grid(head, rows, numbers=range(2, 6))


def _validation_table(validations: Sequence[Event]) -> list[Block]:
    names, listed = metric_names(validations), spread(validations, _MOST_VALIDATIONS_LISTED)
    rows = [(str(event["step"]), *(_cell(number(event["metrics"].get(name))) for name in names)) for event in listed]
    parts: list[Block] = [Grid(("step", *names), rows, numbers=range(len(names) + 1))]
    if len(listed) < len(validations):
        parts.append(Paragraph(f"{len(listed)} of {len(validations)} validations."))
    meanings = [f"{name}: {METRIC_MEANING[name]}" for name in names if name in METRIC_MEANING]
    return [*parts, Paragraph(f"{'. '.join(meanings)}.")] if meanings else parts


def _notes(events: Sequence[Event]) -> list[Block]:
    """What the run noted about itself, at which step."""
    found = [f"Step {each['step']}: {each['metrics']['message']}." for each in events if each["event"] == "note"]
    return [Heading("Notes"), *map(Paragraph, found)] if found else []


def _cell(value: float | None) -> str:
    return "" if value is None else figure(value)


def _curves(steps: Sequence[Event], validations: Sequence[Event]) -> list[Block]:
    """One picture per step curve that has points, and one with a panel per validation metric."""
    drawn: list[Block] = []
    for name, title in STEP_CURVES.items():
        lines = {"training": _series(steps, name)}
        if name == "loss":
            lines["validation"] = _series(validations, name)
        if any(lines.values()):
            drawn.append(Picture(name, curves_svg({title: lines}, axis="step")))
    if names := metric_names(validations):
        panels = {name: {name: _series(validations, name)} for name in names}
        drawn.append(Picture("validation", curves_svg(panels, axis="step")))
    return drawn
