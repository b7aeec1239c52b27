"""`loopos train` on the pico model: its output, exit codes, refusals, and dry run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loopos.cli.commands import app
from loopos.planning import dry_run
from tests.cli.conftest import Invoke


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes a second; one test does it."""
    monkeypatch.setattr(dry_run, "measured_rates", lambda device, half: (1e9, 1e9))


def test_the_answer_is_one_json_object(trained: Any, project: Path) -> None:
    answer = json.loads(trained.stdout)
    assert answer["run"] == str(project / "outputs" / "first")
    assert answer["step"] == 12
    assert answer["stopped_by"] == "epochs"
    assert answer["best_metric"] == answer["metrics"]["accuracy"]
    assert Path(answer["model"], "config.json").is_file()
    assert answer["tokens"] > 0


def test_quiet_prints_nothing_else(trained: Any) -> None:
    assert trained.stderr == ""


def test_the_settings_of_the_process_are_recorded_in_the_run(trained: Any, project: Path) -> None:
    session = (project / "outputs" / "first" / "events.jsonl").read_text(encoding="utf-8").splitlines()[0]
    kept = json.loads(session)["metrics"]["environment"]
    assert kept["set_by_loopos"] == ""
    assert kept["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]


def test_a_run_is_not_overwritten(trained: Any, project: Path, invoke: Invoke) -> None:
    result = invoke("train", project / "run.json")
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert result.stdout == ""


def test_a_finished_run_resumed_ends_at_once_with_the_same_answer(trained: Any, project: Path, invoke: Invoke) -> None:
    result = invoke("train", project / "run.json", "--resume", "--json")
    assert result.exit_code == 0
    first, second = json.loads(trained.stdout), json.loads(result.stdout)
    assert (second["step"], second["metrics"]) == (first["step"], first["metrics"])


def test_the_summary_is_short_and_progress_is_on_standard_error(project: Path, invoke: Invoke) -> None:
    folder = project / "outputs" / "second"
    result = invoke("train", project / "run.json", f"data.output_dir={folder}", "training.max_steps=2")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{folder}: 2 steps at ")
    assert lines[0].endswith("stopped at max_steps 2")
    assert f"  predict with it: loopos predict {folder} INPUT" in lines
    assert lines[1].startswith("  validation at step 2: loss ")
    assert "micro_f1" not in lines[1]
    assert len(lines) == 4
    assert "validation at step 2" in result.stderr


def test_a_run_that_did_not_beat_its_start_says_so_in_its_last_line(
    project: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loopos.methods.fine_tuning import FineTuner

    monkeypatch.setattr("loopos.methods.base.write_report", lambda folder: None)
    told: dict[str, str] = {}
    for name, words in (("worse", []), ("json", ["--json"])):
        left = [0.75, 0.25, 0.5]
        monkeypatch.setattr(FineTuner, "validate", lambda self, world=None, left=left: {"accuracy": left.pop(0)})
        result = invoke("train", project / "run.json", f"data.output_dir={project}/outputs/{name}", *words)
        assert result.exit_code == 0, result.stderr
        told[name] = result.stdout
    lines = told["worse"].splitlines()
    assert lines[0].endswith("finished all 2 epochs")
    assert lines[-1] == (
        "  training did not beat the start: accuracy is 0.5 at best (step 12) and was 0.75 before training"
    )
    assert not [line for line in lines if "best validation" in line]
    found = json.loads(told["json"])
    assert (found["beat_start"], found["best_step"], found["best_metric"]) == (False, None, None)
    assert (found["start_metric"], found["exported_step"], found["metrics"]) == (0.75, 12, {"accuracy": 0.5})
    shown = json.loads(invoke("runs", "show", f"{project}/outputs/json", "--json").stdout)
    assert (shown["beat_start"], shown["best_step"], shown["ended"]) == (False, None, "finished all 2 epochs")


def test_diagnostics_show_without_torch_in_a_few_lines(tmp_path: Path, guide_config: Path) -> None:
    """The guide's config, unchanged, in a folder without its files."""
    program = (
        "import sys, typer\n"
        "from loopos.cli.commands import app\n"
        "try:\n"
        "    app(['train', 'fine_tuning.json'])\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    (tmp_path / "fine_tuning.json").write_bytes(guide_config.read_bytes())
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) <= 12
    assert [line for line in lines if line.startswith("fine_tuning.json:21:27: data.pretrained_weights: ")]
    assert [line for line in lines if line.startswith("fine_tuning.json:22:22: data.training_data: ")]


@pytest.fixture
def guide_config() -> Path:
    return Path(__file__).parents[2] / "configs" / "fine_tuning.json"


def test_a_signal_ends_the_run_in_order(trained: Any, project: Path) -> None:
    """Ctrl-C gives 130 after a checkpoint. The run is a forked process: a fresh one would import torch again."""
    folder, output = project / "outputs" / "interrupted", project / "output.txt"
    words = ["train", str(project / "run.json"), "--quiet", f"data.output_dir={folder}"]
    words += ["training.num_epochs=100000", "training.validate_every=never"]
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), sys.__stdout__.fileno())
            sys.stdout = open(sys.__stdout__.fileno(), "w", closefd=False)  # noqa: SIM115 (ends with the process)
            app(words)
        except SystemExit as ended:
            sys.stdout.flush()
            code = int(str(ended.code))
        finally:
            os._exit(code)
    events = folder / "events.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if events.exists() and events.read_text(encoding="utf-8").count('"event":"step"') >= 2:
            break
        time.sleep(0.02)
    os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    summary = output.read_text(encoding="utf-8")
    assert "interrupted by Ctrl-C" in summary
    assert f"loopos runs report {folder}" in summary
    assert "--resume" in summary
    assert len(list((folder / "checkpoints").glob("step-*"))) == 1
    assert not (folder / "model").exists()


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_counts_and_writes_nothing(project: Path, invoke: Invoke) -> None:
    folder = project / "outputs" / "dry"
    result = invoke("train", project / "run.json", f"data.output_dir={folder}", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    # Two layers of d 32, 4 heads, 2 key heads, d_ff 64: 3072 + 6144 + 64 each; 400 embeddings; a norm; 3 classes.
    assert plan["model"]["parameters"] == 2 * (3072 + 6144 + 64) + 400 * 32 + 32 + 3 * 32
    assert plan["model"]["trained"] == plan["model"]["parameters"]
    assert plan["rows"] == {"train": 48, "validation": 12}
    assert plan["steps"] == {"epoch": 6, "all": 12}
    assert plan["tokens"]["all"] == 2 * plan["tokens"]["epoch"]
    assert plan["memory"]["optimizer"] == 8 * plan["model"]["trained"]
    assert plan["memory"]["peak"] == sum(
        plan["memory"][name] for name in plan["memory"] if name not in ("peak", "there")
    )
    assert plan["time"]["seconds"] > 0
    assert not folder.exists()


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_counts_what_the_run_then_uses(trained: Any, project: Path, invoke: Invoke) -> None:
    result = invoke("train", project / "run.json", "--dry-run", "--json")
    assert json.loads(result.stdout)["tokens"]["all"] == json.loads(trained.stdout)["tokens"]


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize(
    ("overrides", "trained_parameters"),
    [
        (["training.trainable=head"], 96),
        # Rank 2 on seven linear layers of two: 2 · (inputs + outputs) each.
        (["training.trainable=lora", 'training.lora={"rank": 2}'], 96 + 2 * 2 * (64 + 48 + 48 + 64 + 96 + 96 + 96)),
        (["training.freeze_layers=1"], 96 + 3072 + 6144 + 64 + 32),
    ],
)
def test_a_dry_run_counts_what_trains(
    project: Path, invoke: Invoke, overrides: list[str], trained_parameters: int
) -> None:
    result = invoke("train", project / "run.json", *overrides, "--dry-run", "--json")
    assert json.loads(result.stdout)["model"]["trained"] == trained_parameters


def test_a_dry_run_as_text(project: Path, invoke: Invoke) -> None:
    result = invoke("train", project / "run.json", "--dry-run")
    names = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert names == ["model", "trains", "data", "rows", "tokens", "steps", "memory", "disk", "time", "verdict"]
