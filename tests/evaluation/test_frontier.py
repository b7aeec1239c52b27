"""The plot of reward over KL: labels, positions of the points, deterministic text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree

import pytest

from loopos.evaluation.policy_report import FrontierPoint, frontier_svg

PATH = [
    FrontierPoint("start", 0.0, 1.0),
    FrontierPoint("iteration 5", 1.0, 3.0),
    FrontierPoint("iteration 9", 4.0, 2.0),
]
DRAWS = [FrontierPoint("best of 4", 0.64, 2.0), FrontierPoint("best of 16 & $more$ <", 1.83, 2.5)]
SVG = "{http://www.w3.org/2000/svg}"


def texts(drawing: str) -> list[str]:
    found = [element.text or "" for element in xml.etree.ElementTree.fromstring(drawing).iter(f"{SVG}text")]
    assert found
    return found


def line(drawing: str) -> str:
    """The longest path of the first series' color: the line."""
    paths = [element.attrib for element in xml.etree.ElementTree.fromstring(drawing).iter(f"{SVG}path")]
    return max(
        (path["d"] for path in paths if "stroke: #1f77b4" in path.get("style", "") and "clip-path" in path), key=len
    )


def test_what_is_named() -> None:
    found = texts(frontier_svg(PATH, best_of_n=DRAWS, title="Reward of $5"))
    for name in (
        "start",
        "iteration 9",
        "best of 4",
        "best of 16 & $more$ <",
        "Reward of $5",
        "KL to the reference, nats",
        "reward",
        "policy",
        "best of n",
    ):
        assert found.count(name) == 1, name
    assert "iteration 5" not in found


def test_the_line_visits_the_points_in_their_order() -> None:
    drawn = [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", line(frontier_svg(PATH)))]
    assert len(drawn) == 3
    (x0, y0), (x1, y1), (x2, y2) = drawn
    # KL 0, 1, 4 to the right; rewards 1, 3, 2 upwards, and SVG counts downwards.
    assert x0 < x1 < x2
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 4, abs=1e-3)
    assert y1 < y2 < y0
    assert (y0 - y2) / (y0 - y1) == pytest.approx(1 / 2, abs=1e-3)


def test_a_point_that_is_not_finite_is_a_gap_without_a_name() -> None:
    lost = FrontierPoint("lost", math.nan, 1.0)
    drawing = frontier_svg([*PATH, lost, *PATH, lost], best_of_n=[*DRAWS, FrontierPoint("best of all", 9.0, math.inf)])
    assert {"lost", "best of all"}.isdisjoint(texts(drawing))
    assert line(drawing).count("M") == 2
    assert texts(drawing).count("iteration 9") == 1


def test_each_series_on_its_own() -> None:
    assert "best of n" not in texts(frontier_svg(PATH))
    assert "policy" not in texts(frontier_svg([], best_of_n=DRAWS))
    assert texts(frontier_svg(PATH[:1])).count("start") == 1


def test_equal_points_give_equal_text() -> None:
    drawing = frontier_svg(PATH, best_of_n=DRAWS)
    assert drawing == frontier_svg(list(PATH), best_of_n=tuple(DRAWS))
    assert drawing != frontier_svg(PATH[:2], best_of_n=DRAWS)
    assert "dc:date" not in drawing


def test_without_a_finite_point_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="0 points"):
        frontier_svg([])
    with pytest.raises(ValueError, match="1 points, none of them finite"):
        frontier_svg([FrontierPoint("lost", math.nan, math.inf)])
