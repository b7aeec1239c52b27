"""Blocks of a report, rendered as Markdown and as one HTML file; and the opening of a run's report.

Pictures of report.md are files beside it; report.html contains them and needs no network and no script. Equal blocks
give equal text.
"""

from __future__ import annotations

import html
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loopos.config.changed_settings import changed_settings
from loopos.config.figures import figure
from loopos.evaluation.run_folder import RunFolder


def number(value: object) -> float | None:
    """A number, or the text that represents nan or inf in JSON; None for everything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with a head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    """A value on one line of a table."""
    return " ".join(str(value).replace("|", "\\|").split())


def shown(value: float) -> str:
    """A number with four significant digits."""
    return figure(value)


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of plain text; `is_important` highlights it."""

    text: str
    is_important: bool = False


@dataclass(frozen=True)
class Quotation:
    """Text of a user or of a model."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table of plain texts; columns in `numbers` are right-aligned."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """An SVG; `name` is its file name without suffix."""

    name: str
    svg: str
    caption: str = ""


Block: TypeAlias = Heading | Paragraph | Quotation | Grid | Picture


def as_markdown(title: str, blocks: Sequence[Block], *, pictures: str) -> str:
    """The report as Markdown; pictures: folder of the SVG files."""
    return "\n\n".join([f"# {title}", *(_markdown(block, pictures) for block in blocks)]) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Paragraph(text, is_important):
            return f"**{text}**" if is_important else text
        case Quotation(text):
            return f"> {cell(text)}"
        case Grid(head, rows):
            return table([cell(each) for each in head], [[cell(each) for each in row] for row in rows])
        case Picture(name, _, caption):
            return f"![{caption or name}]({pictures}/{name}.svg)"


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one HTML file, readable on light and dark screens and on paper."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [_html(block, number) for number, block in enumerate(blocks)]
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))


def _html(block: Block, number: int) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text, is_important):
            return f"<p{' class=important' if is_important else ''}>{html.escape(text)}</p>"
        case Quotation(text):
            return f"<blockquote>{html.escape(text)}</blockquote>"
        case Grid(head, rows, numbers):
            lines = [_html_row(head, "th", numbers), *(_html_row(row, "td", numbers) for row in rows)]
            return f"<div class=wide><table>{''.join(lines)}</table></div>"
        case Picture(_, svg, caption):
            label = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
            return f"<figure>{inline_svg(svg, f'p{number}-')}{label}</figure>"


def _html_row(cells: Sequence[str], tag: str, numbers: Sequence[int]) -> str:
    written = [
        f"<{tag}{' class=number' if index in numbers else ''}>{html.escape(text)}</{tag}>"
        for index, text in enumerate(cells)
    ]
    return f"<tr>{''.join(written)}</tr>"


def inline_svg(svg: str, prefix: str) -> str:
    """An SVG file's text as an element of a page: black follows the page's color, white is transparent, and ids get
    `prefix`, because those of two drawings may be equal.
    """
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'<style type="text/css">.*?</style>', "", element, flags=re.DOTALL)
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}", element)
    return element.replace("#000000", "currentColor").replace("fill: #ffffff", "fill: none")


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --line: #d5d9de; --soft: #f3f5f7; --mark: #b45309; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #17191c; --line: #3a3f45; --soft: #212529; --mark: #fbbf24; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); }
td { white-space: pre-wrap; overflow-wrap: anywhere; } .number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.important { border-left: .3rem solid var(--mark); background: var(--soft); padding: .5rem .8rem; font-weight: 600; }
blockquote { margin: 1rem 0 .3rem; padding: .3rem .8rem; border-left: .2rem solid var(--line); white-space: pre-wrap; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; stroke-linejoin: round; }
figure svg text { fill: currentColor; } figcaption { opacity: .8; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


_TRAINED = "rows trained on"


def opening(run: RunFolder) -> list[Block]:
    """The most important sentences, facts, and settings."""
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
            Paragraph("Settings that differ from their defaults."),
            Grid(("setting", "value"), rows),
        ]
    return parts


def _facts(run: RunFolder) -> Iterator[tuple[str, str]]:
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


def _times(run: RunFolder) -> Iterator[tuple[str, str]]:
    sessions = [event for event in run.events if event["event"] == "session"]
    times = [value for event in run.events if (value := number(event["timing"].get("time"))) is not None]
    if times:
        resumed = len(sessions) - 1
        again = f", resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed > 0 else ""
        yield "begun", _date(times[0]) + again
        yield "last event", _date(times[-1])
    # For the whole run: steps before a checkpoint count once, however often it was resumed.
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
    """At most `most` of the items, evenly spread and counted from the end, so that the last is always included."""
    stride = max(1, -(-len(items) // most))
    return list(items[::-1][::stride][::-1])
