"""Parts of a report, as Markdown and as one HTML file.

Enters: headings, paragraphs, tables, pictures. Leaves: the text of report.md, whose pictures lie in files beside it,
and of report.html, which holds them all and needs no network and no script. Equal parts give equal text. Left out:
what a report says.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loopos.evaluation.markdown import cell, table


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of plain text; `is_important` sets it apart."""

    text: str
    is_important: bool = False


@dataclass(frozen=True)
class Quotation:
    """Text of a user or of a model."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table of plain texts; columns in `numbers` are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """An SVG; `name` is that of its file without ending."""

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
        f"<{tag}{' class=number' if place in numbers else ''}>{html.escape(text)}</{tag}>"
        for place, text in enumerate(cells)
    ]
    return f"<tr>{''.join(written)}</tr>"


def inline_svg(svg: str, prefix: str) -> str:
    """An SVG file's text as an element of a page: black follows the page's colour, white is see-through, and ids begin
    with `prefix`, since those of two drawings may be the same.
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
