"""`loopos evaluate -o` and `--report`, and the columns and the encoding of files that `predict` and `evaluate` read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from loopos.cli.commands import app
from tests.cli.conftest import ENDINGS, Invoke, rows, write_jsonl


@pytest.fixture
def run_folder(trained: Any, project: Path) -> Path:
    return project / "outputs" / "first"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 8 as trained; the labels of rows 9 to 11 are wrong on purpose."""
    told = rows(12)
    for row in told[9:]:
        row["label"] = {"good": "bad", "bad": "where", "where": "good"}[row["label"]]
    return write_jsonl(tmp_path_factory.mktemp("mixed") / "rows.jsonl", told)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_rows_of_an_evaluation(run_folder: Path, mixed: Path, tmp_path: Path, invoke: Invoke, suffix: str) -> None:
    output = tmp_path / f"rows.{suffix}"
    result = invoke("evaluate", run_folder, mixed, "-o", output, "--json")
    assert result.exit_code == 0, result.stderr
    if suffix == "jsonl":
        found: list[dict[str, Any]] = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        with output.open(newline="") as file:
            found = [{**row, "correct": row["correct"] == "True"} for row in csv.DictReader(file)]
    source = [json.loads(line) for line in mixed.read_text().splitlines()]
    assert sorted(int(row["line"]) for row in found) == list(range(1, 13))
    for row in found:
        actual = source[int(row["line"]) - 1]
        assert (row["text"], row["true"]) == (actual["text"], actual["label"])
        assert row["correct"] == (row["predicted"] == row["true"])
    wrong = [not row["correct"] for row in found]
    assert wrong == sorted(wrong, reverse=True)
    metrics = json.loads(result.stdout)
    assert sum(wrong) == round(12 * (1 - metrics["accuracy"])) > 0
    sure = [float(row["probability"]) for row in found if not row["correct"]]
    assert sure == sorted(sure, reverse=True)
    assert [each["support"] for each in metrics["classes"]] == [sum(row) for row in metrics["confusion"]]


@pytest.mark.parametrize("command", ["evaluate", "evaluate language", "score", "winrate", "generate"])
def test_the_input_is_not_overwritten(
    run_folder: Path, pico_folder: Path, tmp_path: Path, invoke: Invoke, command: str
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    before = file.read_bytes()
    words: list[object] = {
        "evaluate": ["evaluate", run_folder, file],
        "evaluate language": ["evaluate", pico_folder, file],
        "score": ["score", run_folder, file],
        "winrate": ["winrate", pico_folder, pico_folder, file, "--judge", "module:judge"],
        "generate": ["generate", pico_folder, "--input", file, "--json"],
    }[command]
    result = invoke(*words, "-o", file)
    assert (result.exit_code, "which is the input" in result.stderr) == (2, True), result.stderr
    assert file.read_bytes() == before


def test_the_figures_of_classes_are_on_screen(run_folder: Path, mixed: Path, invoke: Invoke) -> None:
    result = invoke("evaluate", run_folder, mixed)
    head = next(line for line in result.stdout.splitlines() if "precision" in line)
    assert head.split() == ["class", "precision", "recall", "F1", "support"]


@pytest.mark.usefixtures("drawn")
def test_the_report_is_one_page(run_folder: Path, mixed: Path, tmp_path: Path, invoke: Invoke) -> None:
    page = tmp_path / "report.html"
    result = invoke("evaluate", run_folder, mixed, "--report", page)
    assert result.exit_code == 0, result.stderr
    text = page.read_text(encoding="utf-8")
    assert all(part in text for part in ("<path ", "Classes", "Confusion", "Most confident mistakes", ENDINGS[0]))
    refused = invoke("evaluate", run_folder, mixed, "--report", tmp_path / "report.pdf")
    assert (refused.exit_code, "expected a file that ends in .html" in refused.stderr) == (2, True)


def test_a_prediction_is_added_beside_all_columns(run_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    source, output = tmp_path / "tickets.csv", tmp_path / "answers.csv"
    source.write_text('id,text,label,Note\n007,good film,bad,"a, b"\nx8,bad film,good,\n', encoding="utf-8")
    result = invoke("predict", run_folder, source, "-o", output)
    assert result.exit_code == 0, result.stderr
    with output.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0])[:6] == ["id", "text", "label", "Note", "predicted_label", "probability"]
    assert [(row["id"], row["label"], row["Note"]) for row in found] == [("007", "bad", "a, b"), ("x8", "good", "")]
    assert {row["predicted_label"] for row in found} <= {"good", "bad", "where"}
    assert 'the prediction is in "predicted_label"' in result.stderr
    # Predicted once more, nothing is lost or written over.
    again = invoke("predict", run_folder, output)
    row = json.loads(again.stdout.splitlines()[0])
    assert (row["label"], row["predicted_label"]) == ("bad", found[0]["predicted_label"])
    assert row["predicted_label_2"] == found[0]["predicted_label"]


@pytest.fixture(scope="module")
def named(project: Path, trained: Any, tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Path:
    """A run with unusual column names, where the column "text" is not the input."""
    folder = tmp_path_factory.mktemp("named")
    told = [{"What happened": row["text"], "Kind": row["label"], "text": f"no. {i}"} for i, row in enumerate(rows(24))]
    write_jsonl(folder / "train.jsonl", told)
    config = json.loads((project / "run.json").read_text())
    config["training"]["num_epochs"] = 1
    config["data"] |= {
        "training_data": str(folder / "train.jsonl"),
        "validation_data": str(folder / "train.jsonl"),
        "output_dir": str(folder / "run"),
        "columns": {"text": "What happened", "label": "Kind"},
    }
    (folder / "run.json").write_text(json.dumps(config))
    assert invoke("train", folder / "run.json").exit_code == 0
    return folder


@pytest.mark.parametrize("recorded", [True, False])
def test_the_columns_of_training_are_remembered(named: Path, invoke: Invoke, recorded: bool) -> None:
    description = named / "run" / "model" / "loopos.json"
    content = json.loads(description.read_text())
    assert content["columns"] == {"text": "What happened", "label": "Kind"}
    if not recorded:  # a run of a version that did not record them
        del content["columns"]
    description.write_text(json.dumps(content))
    # As that version left the folder: without digests of its files.
    (named / "run" / "model" / "loopos-manifest.json").unlink(missing_ok=True)
    try:
        measured = invoke("evaluate", named / "run", named / "train.jsonl", "--json")
        assert measured.exit_code == 0, measured.stderr
        predicted = invoke("predict", named / "run", named / "train.jsonl")
        other = invoke("predict", named / "run", named / "train.jsonl", "--columns", "text=text")
    finally:
        description.write_text(json.dumps({**content, "columns": {"text": "What happened", "label": "Kind"}}))
    texts = [json.loads(line)["What happened"] for line in predicted.stdout.splitlines()]
    by_line = invoke("predict", named / "run", "-", text="\n".join(texts)).stdout.splitlines()
    for one, two in zip(by_line, predicted.stdout.splitlines(), strict=True):
        assert json.loads(one)["probabilities"] == json.loads(two)["probabilities"]
    # --columns wins.
    assert json.loads(other.stdout.splitlines()[0])["probabilities"] != json.loads(by_line[0])["probabilities"]


def test_a_file_in_another_encoding(run_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    source = tmp_path / "rows.csv"
    source.write_bytes("text,label\ngood café,good\nbad café,bad\n".encode("cp1252"))
    refused = invoke("predict", run_folder, source)
    assert (refused.exit_code, "rows.csv:2" in refused.stderr) == (2, True)
    assert "--encoding cp1252" in refused.stderr
    result = invoke("predict", run_folder, source, "--encoding", "cp1252")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["good café", "bad café"]
    piped = invoke("predict", run_folder, "-", "--encoding", "cp1252", text="good café".encode("cp1252"))
    assert json.loads(piped.stdout)["text"] == "good café"
    assert invoke("evaluate", run_folder, source, "--encoding", "cp1252").exit_code == 0
    wrong = invoke("evaluate", run_folder, source, "--encoding", "base64")
    assert (wrong.exit_code, "--encoding: got base64" in wrong.stderr) == (2, True)


@pytest.mark.parametrize("command", ["predict", "evaluate", "generate", "winrate", "score"])
def test_commands_that_read_data_take_an_encoding(command: str) -> None:
    import typer

    (found,) = (each for name, each in typer.main.get_command(app).commands.items() if name == command)  # type: ignore[attr-defined]
    assert "--encoding" in {option for parameter in found.params for option in parameter.opts}
