"""`loopos merge` by recipe and by options; `loopos validate` and `loopos schema` read recipes too."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Invoke, write_jsonl


@pytest.fixture(scope="module")
def moved(language_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language run with its weights doubled."""
    folder = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(language_run, folder)
    tensors = load_file(folder / "model" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "model" / "model.safetensors")
    (folder / "model" / "loopos-manifest.json").unlink()
    return folder


def test_two_runs_by_name(language_run: Path, moved: Path, invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = invoke(
        "merge",
        language_run,
        moved,
        "--method",
        "linear",
        "--weight",
        1,
        "--weight",
        3,
        "-o",
        out,
        "dtype=fp32",
        "--json",
    )
    assert told.exit_code == 0, told.stderr
    answer = json.loads(told.stdout)
    assert (answer["model"], answer["method"], answer["soup"]) == (str(out), "linear", None)
    before, after = (load_file(each / "model.safetensors") for each in (language_run / "model", out))
    assert answer["tensors"] == len(after)
    for name in before:
        torch.testing.assert_close(after[name], 1.75 * before[name])
    summary = invoke("generate", out, "-p", "What is 2 + 2?", "--max-new-tokens", 4, "--device", "cpu")
    assert summary.exit_code == 0, summary.stderr


def test_a_recipe_with_overrides_and_an_evaluation(
    language_run: Path, moved: Path, invoke: Invoke, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the parcel came late"}] * 3)
    recipe = {"method": "slerp", "models": [str(language_run), str(moved)], "output_dir": str(tmp_path / "out")}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    checked = invoke("validate", file)
    assert (checked.exit_code, checked.stdout) == (0, f"{file}: valid (merge, slerp)\n")
    told = invoke("merge", file, "t=0.25", "--evaluate", rows)
    assert told.exit_code == 0, told.stderr
    assert "slerp of 2 models" in told.stdout
    assert "perplexity" in told.stdout
    measured = json.loads(invoke("merge", file, "t=0.25", "--evaluate", rows, "--json").stdout)["measured"][str(rows)]
    alone = json.loads(invoke("evaluate", tmp_path / "out", rows, "--metric", "loss", "--json").stdout)
    assert measured["result"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["t"] == 0.25
    again = invoke("merge", tmp_path / "out" / "recipe.json", "evaluate=[]")
    assert again.exit_code == 0, again.stderr


def test_a_merged_classifier_predicts(trained: Any, project: Path, invoke: Invoke, tmp_path: Path) -> None:
    run = project / "outputs" / "first"
    assert invoke("merge", run, run, "--method", "linear", "-o", tmp_path / "out").exit_code == 0
    answers = [invoke("predict", each, project / "test.jsonl") for each in (run, tmp_path / "out")]
    labels = [[json.loads(line)["label"] for line in each.stdout.splitlines()] for each in answers]
    assert len(labels[0]) == 12
    assert labels[0] == labels[1]
    measured = invoke("evaluate", tmp_path / "out", project / "test.jsonl", "--json")
    assert "accuracy" in json.loads(measured.stdout)


def test_diagnostics_come_at_once_and_without_a_traceback(language_run: Path, invoke: Invoke, tmp_path: Path) -> None:
    told = invoke(
        "merge",
        language_run,
        language_run,
        "--method",
        "tise",
        "--weight",
        1,
        "--device",
        "tpu",
        "-o",
        tmp_path / "out",
    )
    assert told.exit_code == 2
    assert "--weight: got 1; expected 2" in told.stderr
    assert "--device: got tpu" in told.stderr
    told = invoke("merge", language_run, "--method", "tise", "-o", tmp_path / "out", "density=3")
    assert told.exit_code == 2
    assert 'did you mean "ties"?' in told.stderr
    assert "density" in told.stderr
    told = invoke("merge", language_run, tmp_path / "gone", "--method", "linear", "-o", tmp_path / "out")
    assert told.exit_code == 2
    assert "gone" in told.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_reported(
    language_run: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loopos.merging import merge

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(merge, "write_tensors", full)
    told = invoke("merge", language_run, "--method", "linear", "-o", tmp_path / "out")
    assert told.exit_code == 74
    assert "the disk is full: the merged model needs" in told.stderr
    assert list(tmp_path.iterdir()) == []


def test_validate_reports_a_faulty_recipe(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: ties\nmodels: [smollm2-135m]\noutput_dir: out\ndensity: 0\n")
    told = invoke("validate", file, "--json")
    assert told.exit_code == 2
    fields = {diagnostic["field"] for diagnostic in json.loads(told.stdout)["faults"]}
    assert fields == {"density", "base"}


def test_the_schema_of_recipes(invoke: Invoke) -> None:
    schema = json.loads(invoke("schema", "--method", "merge").stdout)
    assert {"method", "models", "density"} <= set(schema["properties"])
    assert all("description" in part for name, part in schema["properties"].items() if name != "$schema")


def test_diagnostics_show_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from loopos.cli.commands import app\n"
        f"app(['merge', {str(tmp_path)!r}, '--method', 'none', '-o', 'out'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ), timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert "method: got" in ended.stderr
