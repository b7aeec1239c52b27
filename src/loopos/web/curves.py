"""Curves of a run for drawing: chosen by name and axis, smoothed over all points, then reduced to what a screen shows.

Enters: an `EventIndex`. Leaves: few points per curve whose extremes are those of all points, markers, and lines of CSV.
n: events of a kind; m: points that are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from loopos.web.event_index import KINDS, STEP, TIME, EventIndex, Numbers, Table

Axis: TypeAlias = Literal["step", "tokens", "time"]
AXES: tuple[Axis, ...] = ("step", "tokens", "time")
_MOST_MARKERS = 500
# Metrics that must be finite: others, such as the reward within a KL limit, may be −inf by definition.
_FINITE = ("loss", "gradient_norm", "policy_loss", "value_loss")
_CSV_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class View:
    """What of a curve is shown. window: events in the trailing mean, 1 for none. points: at most about this many.
    low, high: the part of the axis, all of it with None.
    """

    axis: Axis = "step"
    window: int = 1
    points: int = 1000
    low: float | None = None
    high: float | None = None


def curve(index: EventIndex, kind: str, name: str, view: View) -> dict[str, Any]:
    """One curve: `x` and `y` `[m]`, with a window also `smooth_x` and `smooth_y`, the number `n` of finite points in
    view, and the `last`, `min` and `max` of these (None if there is none). Raises `KeyError` for an unknown name.
    """
    table = index.tables[kind]
    values = table.column(name)
    x = axis_of(index, table, view.axis)[: len(values)]
    finite = np.isfinite(values) & np.isfinite(x)
    x, y = x[finite], values[finite]
    smooth = trailing_mean(y, view.window) if view.window > 1 else None
    chosen = _in_view(x, view)
    x, y = x[chosen], y[chosen]
    shown_x, shown_y = decimate(x, y, view.points)
    found: dict[str, Any] = {"x": _short(shown_x), "y": _short(shown_y), "n": len(y)}
    found |= {"last": None, "min": None, "max": None}
    if len(y):
        found |= {"last": float(y[-1]), "min": float(y.min()), "max": float(y.max())}
    if smooth is not None:
        smooth_x, smooth_y = decimate(x, smooth[chosen], view.points)
        found |= {"smooth_x": _short(smooth_x), "smooth_y": _short(smooth_y)}
    return found


def axis_of(index: EventIndex, table: Table, axis: Axis) -> Numbers:
    """`[n]`: the step of each event, the tokens trained on by then, or the seconds since the run began."""
    if axis == "time":
        return table.column(TIME) - began(index) if table.num_rows else np.empty(0)
    steps = table.column(STEP) if table.num_rows else np.empty(0)
    if axis == "step":
        return steps
    training = index.tables["step"]
    if "tokens" not in training.columns:
        return np.full(len(steps), np.nan)
    known = np.isfinite(training.column("tokens"))
    at, tokens = training.column(STEP)[known], training.column("tokens")[known]
    return np.interp(steps, np.r_[0.0, at], np.r_[0.0, tokens])


def began(index: EventIndex) -> float:
    """When the run began, in seconds since 1970; NaN if its log does not say."""
    times = [each["timing"].get("time") for each in index.notable if each["event"] == "session"]
    if times and times[0] is not None:
        return float(times[0])
    first = [table.column(TIME)[0] for table in index.tables.values() if table.num_rows]
    return float(min(first, default=math.nan))


def _in_view(x: Numbers, view: View) -> slice:
    """The points in view and one beyond each end, so that lines leave the picture; x grows."""
    low = 0 if view.low is None else max(0, int(np.searchsorted(x, view.low)) - 1)
    high = len(x) if view.high is None else int(np.searchsorted(x, view.high, side="right")) + 1
    return slice(low, high)


def trailing_mean(values: Numbers, window: int) -> Numbers:
    """`[n]`: the mean of each value and the window − 1 before it; of fewer at the beginning."""
    if not len(values):
        return values
    # Sums of differences to the mean: sums of a million values near 1e6 would lose the digits that are drawn.
    center = values.mean()
    sums = np.r_[0.0, np.cumsum(values - center)]
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts) + center)


def decimate(x: Numbers, y: Numbers, points: int) -> tuple[Numbers, Numbers]:
    """The minimum and the maximum of each of points / 2 equal parts, in their order, with the first and the last point:
    nothing that sticks out is lost. All points if there are not more.
    """
    if len(y) <= max(points, 4):
        return x, y
    parts = max(1, points // 2)
    width = math.ceil(len(y) / parts)
    full = len(y) // width * width
    rows = y[:full].reshape(-1, width)
    starts = np.arange(len(rows)) * width
    picked = [np.array([0, len(y) - 1]), starts + rows.argmin(axis=1), starts + rows.argmax(axis=1)]
    if full < len(y):
        picked.append(np.array([full + y[full:].argmin(), full + y[full:].argmax()]))
    chosen = np.unique(np.concatenate(picked))
    return x[chosen], y[chosen]


def _short(values: Numbers) -> list[float]:
    """The numbers with seven digits: a screen has no more."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def markers(index: EventIndex, axis: Axis) -> list[dict[str, Any]]:
    """What happened when: `kind` (resume, non-finite, skipped, alert, note, checkpoint, best), `x`, `step`, `text`."""
    found = [each for event in index.notable if (each := _marker(event)) is not None]
    best = [each for each in found if each["kind"] == "best"]
    # Each best validation was the best once; only the last is now.
    found = [each for each in found if each["kind"] != "best"] + best[-1:]
    found += _non_finite(index.tables["step"])
    found.sort(key=lambda each: (each["step"], each["kind"]))
    # The rare ones first, should there be too many.
    if len(found) > _MOST_MARKERS:
        found = [each for each in found if each["kind"] != "checkpoint"][:_MOST_MARKERS]
    xs = _at_steps(index, [each["step"] for each in found], axis)
    return [{**each, "x": x} for each, x in zip(found, xs, strict=True) if math.isfinite(x)]


def _marker(event: dict[str, Any]) -> dict[str, Any] | None:
    metrics, step = event["metrics"], event["step"] or 0
    match event["event"]:
        case "session" if metrics.get("resumed"):
            return {"kind": "resume", "step": step, "text": "resumed"}
        case "alert" | "note" as kind:
            return {"kind": kind, "step": step, "text": str(metrics.get("message") or metrics.get("name", ""))}
        case "checkpoint":
            return {"kind": "checkpoint", "step": step, "text": "checkpoint"}
        case "validation" if metrics.get("best"):
            return {"kind": "best", "step": step, "text": "best validation so far"}
    return None


def _non_finite(table: Table) -> Iterator[dict[str, Any]]:
    """Steps that were skipped, and values of the loss or gradient that are not finite."""
    if not table.num_rows:
        return
    steps = table.column(STEP)
    if "skipped" in table.columns:
        skipped = table.column("skipped")
        for row in np.flatnonzero(np.diff(skipped, prepend=0.0) > 0)[:_MOST_MARKERS]:
            yield {"kind": "non-finite", "step": int(steps[row]), "text": "step skipped: loss or gradient not finite"}
        return
    bad = np.zeros(table.num_rows, dtype=bool)
    for name in _FINITE:
        if name in table.columns:
            # NaN also where another event has no such metric: only infinities and gaps of the loss's own count.
            bad |= np.isinf(table.column(name))
    for row in np.flatnonzero(bad)[:_MOST_MARKERS]:
        yield {"kind": "non-finite", "step": int(steps[row]), "text": "loss or gradient not finite"}


def _at_steps(index: EventIndex, steps: Sequence[int], axis: Axis) -> list[float]:
    if axis == "step" or not steps:
        return [float(step) for step in steps]
    table = index.tables["step"]
    if not table.num_rows:
        return [math.nan] * len(steps)
    x = axis_of(index, table, axis)
    known = np.isfinite(x)
    if not known.any():
        return [math.nan] * len(steps)
    return [float(value) for value in np.interp(steps, np.r_[0.0, table.column(STEP)[known]], np.r_[0.0, x[known]])]


def frontier(index: EventIndex) -> dict[str, Any]:
    """Reward over KL: `points` of the policy in order, by validations or else by the prompts of each iteration
    (`source`), and `best_of_n` of the policy before training.
    """
    source = next((kind for kind in ("validation", "rollout") if {"kl", "reward"} <= set(index.tables[kind].names)), "")
    points = []
    if source:
        table = index.tables[source]
        rows = np.stack([table.column(STEP), table.column("kl"), table.column("reward")], axis=1)
        points = [
            {"step": int(step), "kl": kl, "reward": reward}
            for step, kl, reward in rows[np.isfinite(rows).all(axis=1)].tolist()
        ]
    best = [
        {name: event["metrics"][name] for name in ("n", "kl", "reward")}
        for event in index.notable
        if event["event"] == "best_of_n" and isinstance(event["metrics"].get("reward"), float | int)
    ]
    return {"source": source, "points": points, "best_of_n": best}


def names(index: EventIndex) -> dict[str, list[str]]:
    """The metrics of each kind of event."""
    return {kind: index.tables[kind].names for kind in KINDS if index.tables[kind].num_rows}


def csv_lines(index: EventIndex, kind: str) -> Iterator[str]:
    """All numbers of a kind as CSV, with a head, in parts of some thousand lines. Raises `KeyError`."""
    table = index.tables[kind]
    metrics = table.names
    yield ",".join(["step", "time", *(_csv_cell(name) for name in metrics)]) + "\n"
    num_rows = table.num_rows
    for start in range(0, num_rows, _CSV_ROWS):
        part = slice(start, min(num_rows, start + _CSV_ROWS))
        columns = [table.column(name)[part].tolist() for name in (STEP, TIME, *metrics)]
        yield "".join(",".join(_csv_number(value) for value in row) + "\n" for row in zip(*columns, strict=True))


def _csv_number(value: float) -> str:
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _csv_cell(name: str) -> str:
    """A name as one CSV cell, which no spreadsheet reads as a formula."""
    safe = f"'{name}" if name[:1] in "=+-@\t\r" else name
    return '"' + safe.replace('"', '""') + '"' if any(letter in safe for letter in ',"\n\r') else safe
