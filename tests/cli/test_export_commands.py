"""`loopos export` and `loopos ensemble` by the command line, and what reads an ensemble as a model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.conftest import Invoke, rows, write_jsonl


@pytest.fixture(scope="module")
def second(trained: Any, project: Path, invoke: Invoke) -> Path:
    """A run beside the first, of another seed."""
    folder = project / "outputs" / "to_export"
    result = invoke("train", project / "run.json", f"data.output_dir={folder}", "training.seed=9", "--quiet")
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def pair(second: Path, project: Path, tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Path:
    out = tmp_path_factory.mktemp("pair") / "pair"
    result = invoke(
        "ensemble", project / "outputs" / "first", second, "-o", out, "--method", "majority", "--test",
        project / "test.jsonl",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "ensemble" in result.stdout
    assert "accuracy" in result.stdout
    return out


def test_export_prints_what_it_found(language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke(
        "export", language_run, "--format", "huggingface", "--type", "bf16", "-o", tmp_path / "out", "--json"
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["type"] == "bf16"
    assert 0 < told["largest_difference"] < 0.1
    assert told["pushed"] is None
    AutoModelForCausalLM.from_pretrained(told["folder"])


def test_export_reports_it_as_text(language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("export", language_run, "--format", "huggingface", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "verified: outputs differ by at most 0 " in result.stdout


def test_onnx_equals_torch(trained: Any, project: Path, tmp_path: Path, invoke: Invoke) -> None:
    """The graph's logits of padded texts beside those of the model that LoopOS opens."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime
    import torch
    from transformers import AutoTokenizer

    run, out = project / "outputs" / "first", tmp_path / "out"
    result = invoke("export", run, "--format", "onnx", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["type"] == "f32"
    assert told["largest_difference"] < 1e-4
    assert told["same_likeliest"] == 1.0
    texts = ["good film", "where is it, the parcel came late and nobody replies", "bad"]
    actual = AutoTokenizer.from_pretrained(out)(texts, padding=True, padding_side="right", return_tensors="np")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    expected = {each.name for each in session.get_inputs()}
    [logits] = session.run(None, {name: value for name, value in actual.items() if name in expected})
    found = torch.softmax(torch.from_numpy(logits), -1)
    answers = [
        json.loads(line) for line in invoke("predict", run, "-", text="\n".join(texts) + "\n").stdout.splitlines()
    ]
    assert len(answers) == len(texts)
    for row, answer in zip(found.tolist(), answers, strict=True):
        assert row == pytest.approx(list(answer["probabilities"].values()), abs=1e-4)


def test_mistakes_end_in_a_line(trained: Any, project: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("export", project / "outputs" / "first", "--format", "gguf", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "holds only language models" in result.stderr
    assert "Traceback" not in result.stderr
    result = invoke("ensemble", project / "outputs" / "first", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "expected two or more" in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_ensemble_predicts_as_a_model_does(pair: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("predict", pair, "-", text="good film\nwhere is it\n")
    assert result.exit_code == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert sum(answer["votes"].values()) == 2
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["mutual_information"] >= 0
    output = tmp_path / "answers.csv"
    assert invoke("predict", pair, "-", "-o", output, text="good film\nbad film\n").exit_code == 0
    with output.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2
    assert {"label", "probability", "variance", "entropy", "tied", "votes_good", "probability_bad"} <= set(read[0])


def test_an_ensemble_is_evaluated_as_a_model_is(pair: Path, project: Path, invoke: Invoke) -> None:
    result = invoke("evaluate", pair, project / "test.jsonl", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"] == 12
    asked = invoke("generate", pair, "-p", "hello")
    assert asked.exit_code == 2
    assert "cannot generate text" in asked.stderr


def test_weights_are_fitted_by_the_command(second: Path, project: Path, tmp_path: Path, invoke: Invoke) -> None:
    fit = write_jsonl(tmp_path / "fit.jsonl", rows(24))
    result = invoke(
        "ensemble", project / "outputs" / "first", second, "-o", tmp_path / "out", "--method", "weighted", "--fit", fit,
        "--copy", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert sum(told["weights"].values()) == pytest.approx(1)
    [measured] = told["measured"]
    assert measured["ensemble"]["log_loss"] <= min(each["log_loss"] for each in measured["members"].values()) + 1e-9
    assert (tmp_path / "out" / "members" / "2" / "head.safetensors").is_file()
