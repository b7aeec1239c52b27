"""A run of an older version, with its own names of keys, events and metrics, opens and reports under those of today.

`older_run/` was recorded by the version before the names changed; times and paths are made the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from loopos.config.changed_settings import changed_settings
from loopos.evaluation.report import write_report
from loopos.evaluation.run_folder import read_run
from loopos.storage.events import EVENT_NAMES, METRIC_NAMES, read

RUN = Path(__file__).parent / "older_run"


def copied(folder: Path) -> Path:
    """A copy of the run; reading a run writes nothing, a report does."""
    folder.mkdir()
    for name in ("config.json", "events.jsonl"):
        (folder / name).write_bytes((RUN / name).read_bytes())
    return folder


def test_the_files_have_the_old_names() -> None:
    text = "".join((RUN / name).read_text(encoding="utf-8") for name in ("config.json", "events.jsonl"))
    for name in ("alarm", "end_share", "end_share_drop", "num_workers", "prefetch_batches"):
        assert f'"{name}"' in text


def test_settings_events_and_metrics_have_the_names_of_today(tmp_path: Path) -> None:
    run = read_run(copied(tmp_path / "run"))
    assert run.config["guards"]["eos_rate_drop"] == 0.0
    assert not {"num_workers", "prefetch_batches"} & set(run.config["training"])
    assert {key for key in changed_settings(run.config) if key.startswith("guards.")} == {
        "guards.eos_rate_drop",
        "guards.entropy_share",
    }
    kinds = [event["event"] for event in run.events]
    assert (kinds.count("alert"), kinds.count("rollout"), kinds.count("alarm")) == (1, 3, 0)
    assert [event["metrics"]["name"] for event in run.events if event["event"] == "alert"] == ["eos_rate"]
    rates = [event["metrics"]["eos_rate"] for event in run.events if event["event"] == "rollout"]
    assert rates == [0.125, 0.0, 0.0]
    assert run.events[0]["metrics"]["settings"]["guards"]["eos_rate_drop"] == 0.0
    assert run.last_metrics["eos_rate"] == 0.0
    assert "end_share" not in run.last_metrics
    assert run.setting_changes() == {}


def test_its_report_names_the_guard_and_its_alert(tmp_path: Path) -> None:
    folder = copied(tmp_path / "run")
    write_report(folder)
    report = (folder / "report.md").read_text(encoding="utf-8")
    (row,) = [line for line in report.splitlines() if "guards.eos_rate_drop" in line and "step 1" in line]
    assert "fraction of finished responses at most 0 below its start" in row
    assert "step 1: 0, limit 0.125" in row
    assert "eos_rate" in report
    assert "end_share" not in report


def test_new_names_are_no_old_ones() -> None:
    for names in (EVENT_NAMES, METRIC_NAMES):
        assert names
        assert not set(names) & set(names.values())


def test_an_event_of_today_is_read_as_it_is(tmp_path: Path) -> None:
    event = {"event": "alert", "step": 1, "metrics": {"name": "kl", "value": 1.0}, "timing": {}}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert list(read(tmp_path / "events.jsonl")) == [event]
