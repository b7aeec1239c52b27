"""`loopos runs list|show|diff` over the pico run and a second one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke


@pytest.fixture(scope="module")
def two_runs(trained: Any, project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trained run, and a copy whose config has another seed and a key less."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        (folder / name).mkdir()
        for file in ("config.json", "events.jsonl"):
            shutil.copy(project / "outputs" / "first" / file, folder / name / file)
    changed = json.loads((folder / "second" / "config.json").read_text(encoding="utf-8"))
    changed["training"]["seed"] = 7
    del changed["training"]["momentum"]
    (folder / "second" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return folder / "first", folder / "second"


def test_list(two_runs: tuple[Path, Path], invoke: Invoke) -> None:
    result = invoke("runs", "list", two_runs[0].parent)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["run", "method", "state", "steps", "validation", "time", "begun"]
    assert [line.split()[0] for line in lines[1:]] == [str(path) for path in two_runs]
    assert lines[1].split()[1:5] == ["fine_tuning", "finished", "(epochs)", "12/12"]
    listed = json.loads(invoke("runs", "list", two_runs[0].parent, "--json").stdout)
    assert [each["run"] for each in listed] == [str(path) for path in two_runs]
    assert listed[0]["step"] == 12


def test_list_of_a_folder_without_runs(tmp_path: Path, invoke: Invoke) -> None:
    assert invoke("runs", "list", tmp_path).stdout == f"{tmp_path}: no runs\n"
    assert invoke("runs", "list", tmp_path / "absent").exit_code == 2


def test_show(trained: Any, project: Path, invoke: Invoke) -> None:
    folder = project / "outputs" / "first"
    result = invoke("runs", "show", folder)
    assert result.stdout.startswith(f"{folder}: fine_tuning, 12/12 steps")
    assert "training.learning_rate" in result.stdout
    assert "true class" in result.stdout
    shown = json.loads(invoke("runs", "show", folder, "--json").stdout)
    assert shown["metrics"] == json.loads(trained.stdout)["metrics"]
    assert shown["config"]["training"]["batch_size"] == 8


def test_show_keeps_to_what_is_not_at_its_default(trained: Any, project: Path, invoke: Invoke) -> None:
    folder = project / "outputs" / "first"
    lines = invoke("runs", "show", folder).stdout.splitlines()
    assert lines[0].endswith("finished all 2 epochs")
    settings = {line.split()[0] for line in lines if line.startswith("  ") and "." in line.split()[0]}
    assert {name for name in settings if not name.startswith("data.")} == {
        *(
            "computation.method",
            "computation.mode",
            "model.num_classes",
            "model.pooling",
            "training.batch_size",
            "training.device",
        ),
        *(
            "training.learning_rate",
            "training.num_epochs",
            "training.precision",
            "training.schedule",
            "training.warmup",
        ),
    }
    # The validation stands on a screen of 24 lines; nothing is there twice.
    assert [line for line in lines[:24] if line.split()[:1] == ["accuracy"]]
    assert not [line for line in lines if line.split()[:1] == ["micro_f1"]]
    every = invoke("runs", "show", folder, "--all").stdout.splitlines()
    assert len(every) > len(lines) + 30
    assert [line for line in every if line.split()[:2] == ["training.schedule", "constant"]]


def test_a_report_of_a_killed_run_is_written_from_its_files(
    trained: Any, project: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopos.evaluation.report.curves_svg", lambda *values, **named: "<svg/>")
    events = (project / "outputs" / "first" / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in events if '"event":"step"' in line or '"session"' in line or '"step":0' in line]
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "events.jsonl").write_text("".join(kept) + '{"event":"val')
    shutil.copy(project / "outputs" / "first" / "config.json", killed)
    before = sorted(killed.iterdir())
    result = invoke("runs", "report", killed, "-o", tmp_path / "report")
    assert result.exit_code == 0, result.stderr
    assert "12/12 steps; still running, or killed" in result.stdout
    assert sorted(killed.iterdir()) == before
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Still running, or killed." in text
    assert "| rows trained on | 48 |" in text
    assert "| rows validated on | 12 |" in text
    assert "torch 2" in text
    assert (tmp_path / "report" / "report.html").is_file()
    told = json.loads(invoke("runs", "report", killed, "--json").stdout)
    assert (told["markdown"], told["step"]) == (str(killed / "report.md"), 12)
    assert invoke("runs", "report", tmp_path).exit_code == 2


def test_diff(two_runs: tuple[Path, Path], invoke: Invoke) -> None:
    found = json.loads(invoke("runs", "diff", *two_runs, "--json").stdout)
    assert found["settings"] == {"training.momentum": [0.0, None], "training.seed": [42, 7]}
    assert found["metrics"]["accuracy"][0] == found["metrics"]["accuracy"][1]
    summary = invoke("runs", "diff", *two_runs).stdout
    assert "settings that differ: 2" in summary
    assert invoke("runs", "diff", two_runs[0], two_runs[0]).stdout.startswith("settings that differ: none")


def test_runs_need_no_torch() -> None:
    import subprocess
    import sys

    program = "import sys, loopos.cli.runs, loopos.cli.data_check; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"[" * 50_000 + b"]" * 50_000),
        ("config.json", b'{"computation": "\xff"}'),
        ("config.json", b"3"),
        ("events.jsonl", b"[" * 50_000 + b"]" * 50_000 + b"\n"),
    ],
)
def test_a_broken_run_does_not_end_the_list(
    file: str, content: bytes, two_runs: tuple[Path, Path], tmp_path: Path, invoke: Invoke
) -> None:
    for name, source in zip(("one", "two"), two_runs, strict=True):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "one" / file).write_bytes(content)
    result = invoke("runs", "list", tmp_path, "--json")
    assert result.exit_code == 0
    assert [each["run"] for each in json.loads(result.stdout)] == [str(tmp_path / "two")]
    assert result.stderr.startswith(f"skipped: {tmp_path / 'one' / file}")
    assert len(result.stderr.splitlines()) == 1
