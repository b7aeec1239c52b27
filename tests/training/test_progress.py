"""The terminal output of a run, with 120 columns and in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from loopos.training import progress as module
from loopos.training.progress import RunProgress

POLICY = {
    "policy_loss": 0.3352,
    "value_loss": 3.9951,
    "entropy": 2.2431,
    "clip_share": 0.0,
    "value_clip_share": 0.125,
    "approximate_kl": 0.0012,
    "ratio": 1.0,
}


class Clock:
    """A clock that the test controls."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def bar_line(progress: RunProgress) -> str:
    """The text of the bar on the terminal."""
    assert progress._bar is not None
    written = Console(file=io.StringIO(), width=120, force_terminal=False)
    written.print(progress._bar.make_tasks_table(progress._bar.tasks))
    text = written.file.getvalue()  # type: ignore[attr-defined]
    return str(text.rstrip("\n"))


def test_the_bar_of_a_policy_keeps_its_count_and_time_on_120_columns(clock: Clock) -> None:
    progress = RunProgress(console=Console(file=io.StringIO(), width=120, force_terminal=True))
    progress.begin(16, 0)
    assert "-:--:--" not in bar_line(progress)
    clock.now += 40.0
    progress.step(1, POLICY, 4000, 40.0)
    line = bar_line(progress)
    assert len(line) <= 120
    assert "\n" not in line
    for shown in ("training", "━", "1/16", "0:10:00", "100 tokens/s", "policy_loss 0.3352", "value_loss 3.9951"):
        assert shown in line, shown
    # Whole names and values only, and those at the end go first.
    assert "value_clip" not in line
    assert "ratio" not in line
    progress.end()


def test_the_time_left_is_known_however_slow_a_step_is(clock: Clock) -> None:
    """Rich's own estimate is forgotten after 30 seconds without a step."""
    progress = RunProgress(console=Console(file=io.StringIO(), width=120, force_terminal=True))
    progress.begin(100, 90)
    for step in (91, 92):
        clock.now += 50.0
        progress.step(step, {"loss": 1.0}, 10, 50.0)
    clock.now += 45.0
    # 8 steps of 50 seconds, of which 45 seconds are gone.
    assert "0:05:55" in bar_line(progress)
    clock.now += 1000.0
    assert "0:00:00" in bar_line(progress)
    progress.end()


def summary(**metrics: float) -> str:
    written = io.StringIO()
    RunProgress(console=Console(file=written, width=120)).validation(8, metrics, "best", first="reward")
    return written.getvalue().rstrip("\n")


def test_a_validation_is_one_short_line_with_each_figure_once() -> None:
    line = summary(loss=0.25, accuracy=0.9667, macro_f1=0.95, micro_f1=0.9667, log_loss=0.25, num_pairs=29.0)
    assert line == ("validation at step 8: loss 0.25 · accuracy 0.9667 · macro_f1 0.95 · num_pairs 29 · best")


def test_a_long_validation_keeps_what_decides(clock: Clock) -> None:
    line = summary(**{f"some_metric_{index}": index / 7 for index in range(12)}, reward=-1.95)
    assert line.startswith("validation at step 8: reward -1.95 · some_metric_0 0 · ")
    assert line.endswith(" · best")
    assert len(line) <= 120


def test_figures_that_only_look_alike_are_both_there() -> None:
    line = summary(loss=0.25, log_loss=0.26, accuracy=0.5, micro_f1=0.75)
    assert "log_loss 0.26" in line
    assert "micro_f1 0.75" in line
