"""Curves: decimation that loses no extreme, means over windows, axes, markers, CSV."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from run_files import BEGAN, RunWriter, finished_run, policy_run

from loopos.evaluation.run_folder import read_run
from loopos.web.curves import View, axis_of, csv_lines, curve, decimate, frontier, markers, trailing_mean
from loopos.web.event_index import EventIndex, Table


def index_of(folder: Path) -> EventIndex:
    index = EventIndex(folder / "events.jsonl")
    index.update()
    return index


@pytest.mark.parametrize("number", [0, 1, 4, 5, 99, 100, 101, 1000, 99_991])
def test_decimation_keeps_every_extreme(number: int) -> None:
    y = np.random.default_rng(number).normal(size=number)
    x = np.arange(number) * 2.0
    if number > 50:
        y[37], y[41] = 1e6, -1e6
    few_x, few_y = decimate(x, y, 100)
    assert len(few_y) <= min(number, 104)
    assert (np.diff(few_x) > 0).all()
    assert np.array_equal(few_y, y[(few_x / 2).astype(int)]), "points of the curve, none invented"
    if number:
        assert (few_x[0], few_x[-1]) == (x[0], x[-1])
        assert (few_y.min(), few_y.max()) == (y.min(), y.max())


def test_each_part_keeps_its_minimum_and_maximum() -> None:
    y = np.array([3.0, 1, 2, 9, 5, 5, 5, 4, 0, 7, 8, 6])
    x, few = decimate(np.arange(12.0), y, 6)
    # Parts of four: minimum and maximum of 3 1 2 9, of 5 5 5 4, of 0 7 8 6, and both ends.
    assert x.tolist() == [0, 1, 3, 4, 7, 8, 10, 11]
    assert few.tolist() == [3, 1, 9, 5, 4, 0, 8, 6]


def test_the_trailing_mean() -> None:
    assert trailing_mean(np.array([1.0, 2, 6, 7]), 3).tolist() == [1, 1.5, 3, 5]
    assert trailing_mean(np.empty(0), 3).tolist() == []
    values = 1e9 + np.random.default_rng(0).normal(size=5000)
    expected = [values[max(0, end - 50) : end].mean() for end in range(1, 5001)]
    assert np.abs(trailing_mean(values, 50) - expected).max() < 1e-5


def test_a_curve_by_steps_tokens_and_time(root: Path) -> None:
    index = index_of(finished_run(root / "a").folder)
    by_step = curve(index, "step", "loss", View())
    assert by_step["x"][:3] == [1, 2, 3]
    assert (by_step["n"], by_step["last"]) == (100, index.tables["step"].column("loss")[-1])
    assert curve(index, "step", "loss", View(axis="tokens"))["x"][:3] == [100, 200, 300]
    # The session is the first event, then a validation, then steps a second apart.
    assert curve(index, "step", "loss", View(axis="time"))["x"][:3] == [2, 3, 4]
    assert curve(index, "validation", "loss", View(axis="tokens"))["x"] == [0, 5000, 10000]
    with pytest.raises(KeyError):
        curve(index, "step", "nothing", View())


def test_a_part_of_the_axis_has_a_point_beyond_each_end(root: Path) -> None:
    index = index_of(finished_run(root / "a").folder)
    part = curve(index, "step", "loss", View(low=20, high=30))
    assert part["x"] == list(range(19, 32))
    smooth = curve(index, "step", "loss", View(low=20, high=30, window=10))
    whole = curve(index, "step", "loss", View(window=10))
    assert smooth["smooth_y"] == whole["smooth_y"][18:31], "the mean is that of all points, not of those in view"


def test_numbers_that_are_not_finite_are_left_out(root: Path) -> None:
    run = RunWriter(root / "a")
    for step, loss in enumerate((1.0, math.nan, math.inf, 4.0), start=1):
        run.write("step", step, {"loss": loss})
    run.close()
    found = curve(index_of(run.folder), "step", "loss", View())
    assert (found["x"], found["y"], found["n"]) == ([1, 4], [1, 4], 2)
    assert [(each["kind"], each["step"]) for each in markers(index_of(run.folder), "step")] == [("non-finite", 3)]


def test_markers(root: Path) -> None:
    index = index_of(finished_run(root / "a").folder)
    found = {(each["kind"], each["step"], each["x"]) for each in markers(index, "tokens")}
    assert found == {("checkpoint", 50, 5000), ("resume", 50, 5000), ("alert", 80, 8000), ("best", 100, 10000)}


def test_skipped_steps_are_marked(root: Path) -> None:
    run = RunWriter(root / "a")
    for step, skipped in enumerate((0, 0, 1, 1, 3), start=1):
        run.write("step", step, {"loss": 1.0, "skipped": skipped})
    run.close()
    assert [each["step"] for each in markers(index_of(run.folder), "step")] == [3, 5]


def test_reward_over_kl(root: Path) -> None:
    found = frontier(index_of(policy_run(root / "ppo").folder))
    assert found["source"] == "rollout"
    run = read_run(root / "ppo")
    rollouts = [each for each in run.events if each["event"] == "rollout"]
    assert found["points"] == [
        {"step": each["step"], "kl": each["metrics"]["kl"], "reward": each["metrics"]["reward"]} for each in rollouts
    ]
    assert [each["n"] for each in found["best_of_n"]] == [1, 4, 16]
    assert found["best_of_n"][1]["kl"] == pytest.approx(math.log(4) - 0.75)
    assert frontier(index_of(finished_run(root / "a").folder)) == {"source": "", "points": [], "best_of_n": []}


def test_csv_has_every_number(root: Path) -> None:
    run = RunWriter(root / "a")
    run.write("step", 1, {"loss": 0.1, '=name, with"': 1e300})
    run.write("step", 2, {"loss": math.inf, "tokens": 12})
    run.close()
    rows = list(csv.reader(io.StringIO("".join(csv_lines(index_of(run.folder), "step")))))
    assert rows[0] == ["step", "time", "loss", "'=name, with\"", "tokens"]
    assert rows[1] == ["1", str(int(BEGAN + 1)), "0.1", "1e+300", ""]
    assert rows[2] == ["2", str(int(BEGAN + 2)), "inf", "", "12"]


def test_a_run_without_steps_has_no_tokens(root: Path) -> None:
    index = index_of(policy_run(root / "a").folder)
    assert axis_of(index, Table(), "time").tolist() == []
    run = RunWriter(root / "b")
    run.rollout(0, 0)
    run.close()
    assert curve(index_of(run.folder), "rollout", "reward", View(axis="tokens"))["x"] == []
