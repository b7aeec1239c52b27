"""LoopOS in a Jupyter kernel: the quickstart runs, progress is shown in place, and the kernel's interrupt stops in order."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pico_runs import class_rows, write_jsonl

import loopos

# nbformat and nbclient are imported by the tests that use them, so that without the extra dev only these fail.
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
SECONDS = 240


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels leave nothing in the home folder."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))


def quickstart() -> Any:
    import nbformat

    return nbformat.read(QUICKSTART, as_version=4)


def client_of(notebook: Any, folder: Path) -> Any:
    """What executes a notebook in a folder."""
    from nbclient import NotebookClient

    return NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})


def executed(notebook: Any, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    client_of(notebook, folder).execute()
    return notebook


def shown(cell: Any, kind: str) -> list[str]:
    """What a cell displays in a format."""
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.slow
def test_the_quickstart_runs(pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPOS_QUICKSTART_MODEL", str(pico_folder))
    notebook = executed(quickstart(), tmp_path / "work")
    [outputs] = (tmp_path / "work" / "outputs").iterdir()
    runs = [loopos.Run(outputs / name) for name in ("head", "full", "replies")]
    assert [run.state for run in runs] == ["finished"] * 3
    assert [run.step for run in runs] == [40, 40, 22]
    [trains] = [cell for cell in notebook.cells if cell.source.startswith("def train(")]
    # Lines before, the bar with its table, lines after: an output each.
    before, progress, after = shown(trains, "text/html")
    assert "320 rows read, 320 used\n" in before
    assert "head/model" in after
    assert 'value="40" max="40"' in progress
    assert [f"<td>{step}</td>" in progress for step in (0, 20, 40)] == [True] * 3
    assert [step["step"] for step in runs[0].history if step["event"] == "validation"] == [0, 20, 40]
    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    ]
    # The texts before and after: nothing else is printed, and no library warns.
    assert [stream.name for stream in streams if stream.text.strip()] == ["stdout"] * len(streams)
    assert "before: " in "".join(stream.text for stream in streams)


def test_what_the_quickstart_shows_is_real() -> None:
    notebook = quickstart()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shows = {mime for cell in code for output in cell.outputs for mime in output.get("data", {})}
    assert {"text/html", "image/png"} <= shows
    assert "smollm2-135m: LlamaModel, 134,515,008 parameters" in "".join(
        text for cell in code for text in shown(cell, "text/html")
    )


CELL = """
import os, signal, time
from pathlib import Path
import loopos

def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]

def waits(event):
    if event["event"] == "step" and event["step"] == 7:
        Path("reached").touch()
        while not Path("interrupted").exists():
            time.sleep(0.01)

before, pid = handlers(), os.getpid()
config = {
    "computation": {"mode": "posttraining", "method": "fine_tuning"},
    "training": {"learning_rate": 0.01, "num_epochs": 2, "batch_size": 4, "precision": "fp32", "device": "cpu"},
    "data": {"pretrained_weights": %r, "training_data": "rows.jsonl", "output_dir": "run"},
}
run = loopos.train(config, callbacks=[waits])
"""
AFTER = "print(run.step, run.stopped_by, run.state, handlers() == before, os.getpid() == pid)"
RESUME = (
    "Path('interrupted').touch()\nrun = loopos.train(config, resume=True)\nprint(run.step, run.stopped_by, run.state)"
)


def test_the_kernel_s_interrupt_stops_in_order_and_the_run_resumes(pico_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    rows = write_jsonl(folder / "rows.jsonl", class_rows(24))
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [new_code_cell(source) for source in (CELL % str(pico_folder), AFTER, RESUME)]
    client = client_of(new_notebook(cells=cells), folder)
    interrupted = []

    def interrupt() -> None:
        ends = time.monotonic() + SECONDS
        while not (folder / "reached").exists() and time.monotonic() < ends:
            time.sleep(0.02)
        # As the stop button of a notebook does it.
        asyncio.run(client.km.interrupt_kernel())
        interrupted.append(True)
        (folder / "interrupted").touch()

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    client.execute()
    watcher.join()
    assert interrupted
    texts = ["".join(output.get("text", "") for output in cell.outputs).strip() for cell in client.nb.cells]
    assert texts[1] == "7 SIGINT interrupted True True"
    assert texts[2].splitlines()[-1] == "12 epochs finished"
    config = {
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {"learning_rate": 0.01, "num_epochs": 2, "batch_size": 4, "precision": "fp32", "device": "cpu"},
        "data": {"pretrained_weights": str(pico_folder), "training_data": str(rows), "output_dir": tmp_path / "whole"},
    }
    whole, resumed = loopos.train(config, quiet=True), loopos.Run(folder / "run")
    kept = [
        [event["metrics"] for event in run.events if event["event"] in ("step", "validation")]
        for run in (whole, resumed)
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 15
