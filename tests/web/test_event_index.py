"""The incremental reader of logs: columns, torn lines, truncation, caches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_files import RunWriter, finished_run, loss_at

from loopos.storage.events import EventLogError, read
from loopos.web import event_index
from loopos.web.event_index import STEP, EventIndex


def index_of(folder: Path) -> EventIndex:
    index = EventIndex(folder / "events.jsonl")
    index.update()
    return index


def state_of(index: EventIndex) -> object:
    tables = {
        kind: {name: table.column(name).tolist() for name in table.columns} for kind, table in index.tables.items()
    }
    return json.dumps([tables, index.notable, index.offset, index.num_events])


def test_columns_hold_what_the_log_has(root: Path) -> None:
    run = finished_run(root / "a")
    index = index_of(run.folder)
    table = index.tables["step"]
    assert table.num_rows == 100
    assert table.column(STEP).tolist() == list(range(1, 101))
    assert table.column("loss").tolist() == [loss_at(step) for step in range(1, 101)]
    assert set(table.names) == {"loss", "learning_rate", "tokens", "rows", "skipped", "seconds", "tokens_per_second"}
    assert index.tables["validation"].column("loss").tolist() == [2.5, 1.2, 0.9]
    assert "best" not in index.tables["validation"].names
    assert [each["event"] for each in index.notable] == [
        each["event"] for each in read(run.folder / "events.jsonl") if each["event"] != "step"
    ]
    assert index.last_step == 100
    assert index.offset == (run.folder / "events.jsonl").stat().st_size


def test_missing_metrics_are_gaps_and_infinities_stay(root: Path) -> None:
    run = RunWriter(root / "a")
    run.write("step", 1, {"loss": float("nan"), "note": "text", "parts": [1, 2]})
    run.write("step", 2, {"loss": float("inf"), "late": 3})
    run.write("step", 3, {"late": 4, "flag": True})
    run.close()
    table = index_of(run.folder).tables["step"]
    assert table.names == ["loss", "late", "flag"]
    assert np.array_equal(table.column("loss"), [np.nan, np.inf, np.nan], equal_nan=True)
    assert np.array_equal(table.column("late"), [np.nan, 3, 4], equal_nan=True)


def test_reading_bit_by_bit_equals_reading_once(root: Path) -> None:
    """A log that grows by odd numbers of bytes, so that most looks end within a line."""
    run = finished_run(root / "a")
    data = (run.folder / "events.jsonl").read_bytes()
    growing = root / "b" / "events.jsonl"
    growing.parent.mkdir()
    index = EventIndex(growing)
    growing.touch()
    assert not index.update()
    for end in [*range(0, len(data), 997), len(data)]:
        with growing.open("ab") as file:
            file.write(data[growing.stat().st_size : end])
        index.update()
        assert data[: index.offset].endswith(b"\n") or index.offset == 0
    assert state_of(index) == state_of(index_of(run.folder))
    assert not index.update()


@pytest.mark.parametrize("keeps", [0, 40, 70])
def test_a_log_that_a_resumed_run_rewrote_is_read_again(
    root: Path, keeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is truncated to a checkpoint and written on, until it is longer than before: only the bytes differ."""
    monkeypatch.setattr(event_index, "BLOCK_BYTES", 2048)
    run = RunWriter(root / "a")
    run.session()
    sizes = {0: 0}
    for step in range(1, 91):
        run.steps(step, step)
        sizes[step] = run.log.offset()
    index = EventIndex(run.log.path)
    index.update()
    run.log.rewind(sizes[keeps])
    run.time += 1000
    run.session(keeps)
    run.steps(keeps + 1, 100, lambda step: 7.0)
    assert index.update()
    assert state_of(index) == state_of(index_of(run.folder))
    losses = index.tables["step"].column("loss")
    assert losses[-1] == 7.0
    assert len(losses) == 100
    run.log.rewind(sizes[keeps])
    assert index.update()
    assert index.tables["step"].num_rows == keeps
    run.close()


def test_what_was_handed_out_does_not_change(root: Path) -> None:
    run = RunWriter(root / "a")
    run.steps(1, 5)
    index = index_of(run.folder)
    before = index.tables["step"].column("loss")
    kept = before.copy()
    run.log.rewind(0)
    run.steps(1, 90, lambda step: 9.0)
    index.update()
    assert np.array_equal(before, kept)
    run.close()


def test_a_broken_line_is_named(root: Path) -> None:
    run = RunWriter(root / "a")
    run.steps(1, 3)
    run.close()
    with run.log.path.open("ab") as file:
        file.write(b"{broken\n")
    with pytest.raises(EventLogError, match=r"events\.jsonl:4: not an event"):
        index_of(run.folder)


@pytest.mark.parametrize("line", [b"{}", b"[]", b"1],[2", b'{"event":"step","step":1,"metrics":3,"timing":{}}'])
def test_lines_that_are_no_events_are_refused(root: Path, line: bytes) -> None:
    (root / "events.jsonl").write_bytes(line + b"\n" + line + b"\n")
    with pytest.raises(EventLogError, match=r"events\.jsonl:1"):
        EventIndex(root / "events.jsonl").update()


def test_names_of_older_versions_are_those_of_today(root: Path) -> None:
    run = RunWriter(root / "a")
    run.rollout(1, 0)
    run.write("rollout", 2, {"iteration": 1, "end_share": 0.5})
    run.write("alarm", 2, {"name": "end_share", "value": 0.1, "limit": 0.2})
    run.close()
    index = index_of(run.folder)
    assert index.tables["rollout"].column("eos_rate").tolist() == [0.9, 0.5]
    assert [(each["event"], each["metrics"]["name"]) for each in index.notable] == [("alert", "eos_rate")]


def test_the_cache_of_a_long_log(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(root / "a")
    index, cache = index_of(run.folder), tmp_path / "cache"
    index.save(cache)
    assert not cache.exists(), "a short log is parsed faster"
    monkeypatch.setattr(event_index, "_WORTH_SAVING", 1)
    index.save(cache)
    again = EventIndex(run.log.path)
    assert again.load(cache)
    assert state_of(again) == state_of(index)
    assert not again.update()
    more = RunWriter(run.folder)
    more.session(100)
    more.close()
    assert again.update()
    assert state_of(again) == state_of(index_of(run.folder))
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert not EventIndex(run.log.path).load(cache)
    assert not EventIndex(root / "other.jsonl").load(cache)


def test_a_cache_of_another_log_is_not_believed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_index, "_WORTH_SAVING", 1)
    run = finished_run(root / "a")
    index_of(run.folder).save(tmp_path / "cache")
    run.log.path.unlink()
    other = RunWriter(run.folder)
    other.session()
    other.steps(1, 300, lambda step: 3.0)
    other.close()
    index = EventIndex(run.log.path)
    assert index.load(tmp_path / "cache")
    assert index.update()
    assert state_of(index) == state_of(index_of(run.folder))
