"""The opening of a run's report: how it ended, against its start, when and where it ran, and with which settings.

Enters: a `Run`. Leaves: blocks. Left out: validations and curves (`report`), what one method reports (`policy_report`,
`preference_report`, `task_report`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loopos.config.figures import figure
from loopos.config.method_configs import changed_settings
from loopos.evaluation.blocks import Block, Grid, Heading, Paragraph
from loopos.evaluation.markdown import number
from loopos.evaluation.run_folder import Run

_TRAINED = "rows trained on"


def opening(run: Run) -> list[Block]:
    """The sentences that matter most, facts, settings."""
    description = str(run.config.get("description") or run.config.get("computation", {}).get("description") or "")
    parts: list[Block] = [Paragraph(description)] if description else []
    parts.append(Heading("Summary"))
    reason = run.ended
    parts.append(Paragraph(f"{reason[0].upper()}{reason[1:]}."))
    if verdict := run.outcome.verdict():
        parts.append(Paragraph(f"{verdict[0].upper()}{verdict[1:]}.", is_important=run.outcome.beat_start is False))
    if sentence := run.outcome.export_sentence():
        parts.append(Paragraph(f"{sentence[0].upper()}{sentence[1:]}."))
    parts.append(Grid(("", ""), list(_facts(run))))
    changed = changed_settings(run.config)
    if changed:
        rows = [(key, "null" if value is None else str(value)) for key, value in changed.items()]
        parts += [
            Heading("Settings"),
            Paragraph("Those that are not at their defaults."),
            Grid(("setting", "value"), rows),
        ]
    return parts


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    yield "method", run.method or "unknown"
    yield from _times(run)
    sessions = [event["metrics"] for event in run.events if event["event"] == "session"]
    last: Mapping[str, Any] = sessions[-1] if sessions else {}
    total = "" if run.total_steps is None else f" of {run.total_steps:,}"
    yield "optimizer steps", f"{run.step:,}{total}"
    yield from _rows(last)
    steps = [event for event in run.events if event["event"] == "step"]
    if steps and (tokens := number(steps[-1]["metrics"].get("tokens"))) is not None:
        yield "tokens trained on", f"{tokens:,.0f}"
    losses = [(event["step"], value) for event in steps if (value := number(event["metrics"].get("loss"))) is not None]
    if losses:
        yield "training loss, first", f"{figure(losses[0][1])} (step {losses[0][0]})"
        yield "training loss, last", f"{figure(losses[-1][1])} (step {losses[-1][0]})"
    spent = [value for event in steps if (value := number(event["timing"].get("seconds"))) is not None]
    if spent:
        yield "seconds a step, median", figure(statistics.median(spent))
    if run.tokens_a_second is not None:
        yield "tokens a second", f"{run.tokens_a_second:,.0f}"
    yield from _machine(last)


def _times(run: Run) -> Iterator[tuple[str, str]]:
    sessions = [event for event in run.events if event["event"] == "session"]
    times = [value for event in run.events if (value := number(event["timing"].get("time"))) is not None]
    if times:
        resumed = len(sessions) - 1
        again = f", resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed > 0 else ""
        yield "begun", _date(times[0]) + again
        yield "last event", _date(times[-1])
    # Of the whole run: what was trained before a checkpoint counts once, however often it was resumed.
    ended = [event for event in run.events if event["event"] == "end"]
    seconds = number(ended[-1]["timing"].get("seconds")) if ended else None
    if seconds is None:
        kinds = ("step", "validation", "checkpoint")
        seconds = sum(float(e["timing"].get("seconds", 0.0)) for e in run.events if e["event"] in kinds)
    yield "time in steps, validations and saves", _span(seconds)


def _rows(session: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counts = session.get("num_rows")
    if isinstance(counts, Mapping):
        yield _TRAINED, f"{counts['training']:,}"
        if counts.get("validation") is not None:
            yield "rows validated on", f"{counts['validation']:,}"
    accounts = session.get("rows")
    if isinstance(accounts, list) and accounts:
        yield "rows read", "; ".join(map(str, accounts))


def _machine(session: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    versions, machine = session.get("versions"), session.get("machine")
    if isinstance(versions, Mapping):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if isinstance(machine, Mapping):
        has_amx = machine.get("amx")
        amx = "" if has_amx is None else ", AMX" if has_amx else ", no AMX"
        yield (
            "machine",
            f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('threads')} threads{amx}",
        )
        device, processes = machine.get("device"), machine.get("processes")
        yield "device", f"{device}" + (f", {processes} processes" if processes != 1 else "")
    if "precision" in session:
        yield "precision", str(session["precision"])


def _counted(number_of: Any, name: str) -> str:
    return f"{number_of} {name}{'' if number_of == 1 else 's'}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{figure(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread and counted from the end, so that the last is always there."""
    stride = max(1, -(-len(items) // most))
    return list(items[::-1][::stride][::-1])
