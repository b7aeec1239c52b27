"""Figures as SVG, the same bytes for the same values.

Enters: a size. Leaves: a figure of matplotlib, which is imported here alone, and its text. Left out: what is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, to be filled and taken by `svg_of` within."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "loopos", "svg.fonttype": "none", "font.size": 9.0}):
        yield Figure(figsize=(width, height), layout="constrained")


def svg_of(figure: Figure) -> str:
    """The figure's text: no date and no random names, so that equal values give equal bytes."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
