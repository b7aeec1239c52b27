"""The event log: exact lines, torn ends, rewinding, fingerprints, full disks, TensorBoard."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.evaluation.run_folder import read_run
from loopos.storage import events
from loopos.storage.durable import JSON, DiskFull
from loopos.storage.events import EventLog, EventLogError, TensorBoardTracker, TrackerWriter, fingerprint, read


def write_steps(log: EventLog, first: int, last: int, seconds: float = 0.1) -> None:
    for step in range(first, last + 1):
        log.write("step", step=step, metrics={"loss": 1.0 / step}, timing={"seconds": seconds})


def test_an_event_is_one_line_and_keeps_its_key_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", step=7, metrics={"loss": 0.5, "b": 1, "a": "é\n"}, timing={"seconds": 2.0})
        log.write("session", step=None, metrics={}, timing={})
    assert (
        path.read_bytes()
        == (
            '{"event":"step","step":7,"metrics":{"loss":0.5,"b":1,"a":"é\\n"},"timing":{"seconds":2.0}}\n'
            '{"event":"session","step":null,"metrics":{},"timing":{}}\n'
        ).encode()
    )
    assert [event["step"] for event in read(path)] == [7, None]


def test_values_without_a_json_form_are_texts_at_any_depth(tmp_path: Path) -> None:
    metrics: dict[str, JSON] = {"a": float("nan"), "b": [float("inf"), {"c": float("-inf")}], "d": (1, 2.5)}
    with EventLog(tmp_path / "e") as log:
        log.write("validation", step=1, metrics=metrics, timing={"seconds": float("inf")})
    (event,) = read(tmp_path / "e")
    assert event["metrics"] == {"a": "nan", "b": ["inf", {"c": "-inf"}], "d": [1, 2.5]}
    assert event["timing"] == {"seconds": "inf"}


def test_what_was_written_is_there_for_readers_at_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e")
    write_steps(log, 1, 3)
    assert len(list(read(tmp_path / "e"))) == 3
    assert log.offset() == (tmp_path / "e").stat().st_size
    log.close()


def test_reopening_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with EventLog(tmp_path / "e") as log:
            assert log.torn_bytes == 0
            write_steps(log, step, step)
    assert [event["step"] for event in read(tmp_path / "e")] == [1, 2]


@pytest.mark.parametrize("torn", [b"{", b'{"event":"step","step":3,"metrics":{}', b'{"text":"' + b"x" * 200_000])
@pytest.mark.parametrize("num_whole", [0, 2])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes, num_whole: int) -> None:
    path = tmp_path / "e"
    with EventLog(path) as log:
        write_steps(log, 1, num_whole)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(list(read(path))) == num_whole
    with EventLog(path) as log:
        assert log.torn_bytes == len(torn)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("broken", [b"{\n", b"\n", b"\xff\n", b"[1]\n", b'"text"\n'])
def test_a_broken_line_elsewhere_is_named(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "e"
    with EventLog(path) as log:
        write_steps(log, 1, 1)
    path.write_bytes(path.read_bytes() + broken + path.read_bytes())
    with pytest.raises(EventLogError, match=rf"{path}:2: "):
        list(read(path))


def test_names_of_older_versions_are_read_under_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every reader; the file keeps its names."""
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("check", step=1, metrics={"loss": 2.0, "size": 3}, timing={"seconds": 0.5})
        log.write("check", step=2, metrics={"size": 3, "tokens": 4}, timing={})
    monkeypatch.setattr(events, "EVENT_NAMES", {"check": "validation"})
    monkeypatch.setattr(events, "METRIC_NAMES", {"size": "tokens"})
    (tmp_path / "config.json").write_text("{}")
    first, second = read_run(tmp_path).events
    expected = {"event": "validation", "step": 1, "metrics": {"loss": 2.0, "tokens": 3}, "timing": {"seconds": 0.5}}
    assert first == expected
    assert second["metrics"]["tokens"] == 4
    assert read_run(tmp_path).last_metrics == second["metrics"]
    assert "check" in (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize("reader", [lambda folder: list(read(folder / "events.jsonl")), read_run])
def test_a_line_nested_too_deeply_is_named(reader: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "events.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(EventLogError, match=r"events\.jsonl:1: not an event"):
        reader(tmp_path)


def test_rewinding_makes_the_resumed_log_equal_the_uninterrupted(tmp_path: Path) -> None:
    with EventLog(tmp_path / "whole") as log:
        write_steps(log, 1, 6)
    with EventLog(tmp_path / "resumed") as log:
        write_steps(log, 1, 4)
        offset = log.offset()
        write_steps(log, 5, 5)
    with EventLog(tmp_path / "resumed") as log:
        log.rewind(offset)
        assert log.offset() == offset
        log.write("session", step=None, metrics={"resumed": True}, timing={})
        write_steps(log, 5, 6, seconds=9.0)
    steps = [event["step"] for event in read(tmp_path / "resumed")]
    assert steps == [1, 2, 3, 4, None, 5, 6]
    assert fingerprint(tmp_path / "resumed") == fingerprint(tmp_path / "whole")


def test_rewinding_to_nothing_and_to_the_end(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e") as log:
        write_steps(log, 1, 2)
        log.rewind(log.offset())
        assert len(list(read(tmp_path / "e"))) == 2
        log.rewind(0)
        assert (tmp_path / "e").read_bytes() == b""


def test_a_log_of_another_run_is_refused(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e") as log:
        write_steps(log, 1, 2)
        before = (tmp_path / "e").read_bytes()
        with pytest.raises(EventLogError, match="checkpoint was saved at byte 9,999"):
            log.rewind(9999)
        with pytest.raises(EventLogError, match="no event ends at byte 5,"):
            log.rewind(5)
    assert (tmp_path / "e").read_bytes() == before


def test_the_fingerprint_sees_numbers_and_order_but_no_clock(tmp_path: Path) -> None:
    def logged(name: str, *events: tuple[str, float, float]) -> str:
        with EventLog(tmp_path / name) as log:
            for kind, loss, seconds in events:
                log.write(kind, step=1, metrics={"loss": loss}, timing={"seconds": seconds})
        return fingerprint(tmp_path / name)

    original = logged("a", ("step", 0.5, 1.0), ("validation", 0.25, 1.0))
    assert len(original) == 64
    assert logged("b", ("session", 3.0, 1.0), ("step", 0.5, 2.0), ("validation", 0.25, 3.0)) == original
    assert logged("c", ("step", 0.5000000000000001, 1.0), ("validation", 0.25, 1.0)) != original
    assert logged("d", ("validation", 0.25, 1.0), ("step", 0.5, 1.0)) != original
    assert logged("e", ("step", 0.5, 1.0)) != original


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e"
    log = EventLog(path)
    write_steps(log, 1, 1)
    before = path.read_bytes()
    real_write = os.write
    outcomes = iter([7, OSError(errno.ENOSPC, "full")])

    def write_seven_then_fail(descriptor: int, content: bytes) -> int:
        outcome = next(outcomes)
        if isinstance(outcome, OSError):
            raise outcome
        return real_write(descriptor, content[:outcome])

    monkeypatch.setattr(os, "write", write_seven_then_fail)
    with pytest.raises(DiskFull, match="an event needs"):
        write_steps(log, 2, 2)
    monkeypatch.undo()
    assert path.read_bytes() == before
    write_steps(log, 2, 2)
    log.close()
    assert [event["step"] for event in read(path)] == [1, 2]


def test_a_write_cut_short_by_the_system_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    with EventLog(tmp_path / "e") as log:
        monkeypatch.setattr(os, "write", lambda descriptor, content: real_write(descriptor, content[:5]))
        write_steps(log, 1, 2)
        monkeypatch.undo()
    assert [event["metrics"]["loss"] for event in read(tmp_path / "e")] == [1.0, 0.5]


def test_reading_events_does_not_import_torch() -> None:
    code = "import sys, loopos.storage.events; print('torch' in sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert finished.stdout.strip() == "False"


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_missing_tensorboard_is_reported_with_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(MissingRequirement, match=r"pip install .*\[track\]"):
        TensorBoardTracker(tmp_path)


def test_tensorboard_receives_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    adapter = TrackerWriter("tensorboard", TensorBoardTracker, tmp_path)
    adapter.write("step", step=1, metrics={"loss": 0.5, "note": "text", "flag": True}, timing={"seconds": 2.0})
    adapter.write("step", step=2, metrics={"loss": 0.25}, timing={})
    adapter.write("session", step=None, metrics={"cores": 2}, timing={})
    adapter.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(accumulator.Tags()["scalars"]) == ["step/loss", "step/seconds"]
    assert [(point.step, point.value) for point in accumulator.Scalars("step/loss")] == [(1, 0.5), (2, 0.25)]


def test_lines_are_plain_json(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e") as log:
        log.write("confusion", step=3, metrics={"class_names": ["a"], "matrix": [[4]]}, timing={})
    assert json.loads((tmp_path / "e").read_text()) == {
        "event": "confusion",
        "step": 3,
        "metrics": {"class_names": ["a"], "matrix": [[4]]},
        "timing": {},
    }


class Broken:
    """A tracker whose folder is missing."""

    def __init__(self, run_dir: Path, *, resumed_step: int | None = None) -> None:
        self.resumed_step = resumed_step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        raise FileNotFoundError(f"no folder at step {step} after {self.resumed_step}")

    def close(self) -> None:
        pass


def test_what_a_tracker_raises_names_it(tmp_path: Path) -> None:
    writer = TrackerWriter("mine", Broken, tmp_path, resumed_step=3)
    # Without a step there is nothing to pass on.
    writer.write("session", step=None, metrics={"cores": 2}, timing={})
    with pytest.raises(
        UserError, match=r"tracker mine, log: raised FileNotFoundError at .*: no folder at step 4 after 3"
    ):
        writer.write("step", step=4, metrics={"loss": 0.5}, timing={})
    writer.close()
    with pytest.raises(UserError, match="tracker dict: raised TypeError"):
        TrackerWriter("dict", lambda run_dir: {}, tmp_path)
    with pytest.raises(
        UserError, match=r"tracker mine: it has no method log; expected log\(step, metrics\) and close\(\)"
    ):
        TrackerWriter("mine", lambda run_dir, resumed_step: {}, tmp_path)
