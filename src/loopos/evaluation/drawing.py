"""Figures as SVG, with equal bytes for equal values. The only module that imports matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

Series: TypeAlias = Sequence[tuple[float, float]]
"""Points (x, y); the line has a gap where y is not finite."""

_MOST_MARKED = 40
_MOST_NAMED_CLASSES = 40


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches; fill it and call `svg_of` within the context."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "loopos", "svg.fonttype": "none", "font.size": 9.0}):
        yield Figure(figsize=(width, height), layout="constrained")


def svg_of(figure: Figure) -> str:
    """The figure as SVG text, without date and random names, so that equal values give equal bytes."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def curves_svg(panels: Mapping[str, Mapping[str, Series]], *, axis: str) -> str:
    """One panel per title with one line per name; axis: label of x."""
    num_columns = min(len(panels), 2)
    num_rows = math.ceil(len(panels) / num_columns)
    with drawing(4.5 * num_columns + 1.5, 2.6 * num_rows + 0.4) as figure:
        for position, (title, lines) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(num_rows, num_columns, position)
            for name, series in lines.items():
                heights = [y if math.isfinite(y) else math.nan for _, y in series]
                marker = "o" if len(series) <= _MOST_MARKED else ""
                axes.plot([x for x, _ in series], heights, marker=marker, ms=3, label=name)
            axes.set_title(title, parse_math=False)
            axes.set_xlabel(axis)
            axes.grid(alpha=0.3)
            if sum(bool(series) for series in lines.values()) > 1:
                axes.legend()
        return svg_of(figure)


def confusion_svg(class_names: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """A confusion matrix `[C, C]`, row = true class, column = predicted class: the deeper a cell's color, the larger
    its fraction of the row. Up to 40 classes are named; up to 20 have counts in their cells.
    """
    num_classes = len(class_names)
    size = min(12.0, 2.5 + 0.42 * num_classes)
    with drawing(size, size * 0.85) as figure:
        axes = figure.add_subplot()
        for row, counts in enumerate(matrix):
            total = sum(counts)
            for column, count in enumerate(counts):
                if count == 0:
                    continue
                corner = (column - 0.5, row - 0.5)
                # Color by opacity, so that the figure works on light and dark paper.
                color, fraction = "tab:blue" if row == column else "tab:orange", count / total
                axes.add_patch(_rectangle(corner, color, 0.1 + 0.7 * fraction))
                if num_classes <= 20:
                    axes.text(column, row, f"{count:,}", ha="center", va="center")
        axes.set_xlim(-0.5, num_classes - 0.5)
        axes.set_ylim(num_classes - 0.5, -0.5)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if num_classes <= _MOST_NAMED_CLASSES:
            labels = [_short(name) for name in class_names]
            axes.set_xticks(range(num_classes), labels, rotation=90, parse_math=False)
            axes.set_yticks(range(num_classes), labels, parse_math=False)
        return svg_of(figure)


def residuals_svg(true: Sequence[float], predicted: Sequence[float]) -> str:
    """Predicted over true values, with the line of equality; and the errors predicted − true over the true values."""
    with drawing(9.0, 3.8) as figure:
        left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        ends = [min(*true, *predicted), max(*true, *predicted)] if true else [0.0, 1.0]
        left.plot(ends, ends, "-", color="tab:orange", lw=1)
        left.plot(true, predicted, "o", ms=3, alpha=0.5)
        left.set_ylabel("predicted")
        right.axhline(0.0, color="tab:orange", lw=1)
        right.plot(true, [p - t for t, p in zip(true, predicted, strict=True)], "o", ms=3, alpha=0.5)
        right.set_ylabel("predicted − true")
        for axes in (left, right):
            axes.set_xlabel("true")
            axes.grid(alpha=0.3)
        return svg_of(figure)


def _rectangle(corner: tuple[float, float], color: str, opacity: float) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor=color, alpha=opacity, linewidth=0)


def _short(name: str) -> str:
    one_line = " ".join(name.split())
    return one_line if len(one_line) <= 24 else f"{one_line[:23]}…"
