"""`loopos predict` and `loopos evaluate` on the pico run: order, count, formats, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from loopos.cli.answers import rendered
from tests.cli.conftest import ENDINGS, Invoke, rows, write_jsonl

CLASSES = {"good", "bad", "where"}


@pytest.fixture
def run_folder(trained: Any, project: Path) -> Path:
    return project / "outputs" / "first"


def test_standard_input_gives_one_prediction_a_line(run_folder: Path, invoke: Invoke) -> None:
    texts = [f"bad {ENDINGS[0]}", "where is it", f"good {ENDINGS[1]}"]
    result = invoke("predict", run_folder, "-", text="\n".join(texts))
    assert result.exit_code == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 3
    for answer in answers:
        assert set(answer["probabilities"]) == CLASSES
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probability"] == max(answer["probabilities"].values())
        assert answer["probabilities"][answer["label"]] == answer["probability"]


def test_files_of_every_format_give_the_same_predictions_in_order(
    run_folder: Path, tmp_path: Path, invoke: Invoke
) -> None:
    texts = [row["text"] for row in rows(9)]
    plain, data = tmp_path / "texts.txt", write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    plain.write_text("\n".join(texts) + "\n", encoding="utf-8")
    results = [
        invoke("predict", run_folder, "-", text="\n".join(texts)),
        invoke("predict", run_folder, plain),
        invoke("predict", run_folder, data),
    ]
    assert results[0].stdout.count("\n") == 9
    assert results[0].stdout == results[1].stdout == results[2].stdout
    assert "read as one text per line" in results[1].stderr


def test_a_txt_file_with_a_header_is_data(run_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("text\tlabel\ngood value\tgood\nbad film\tbad\n", encoding="utf-8")
    result = invoke("predict", run_folder, file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 2


def test_columns_name_the_text(run_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"remark": "good value", "text": 5}])
    result = invoke("predict", run_folder, file, "--columns", "text=remark")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(run_folder: Path, tmp_path: Path, invoke: Invoke, suffix: str, delimiter: str) -> None:
    output = tmp_path / f"answers.{suffix}"
    result = invoke("predict", run_folder, "-", "-o", output, text="bad film\ngood film\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    with output.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file, delimiter=delimiter))
    assert len(read) == 2
    assert list(read[0])[:3] == ["text", "label", "probability"]
    assert [row["text"] for row in read] == ["bad film", "good film"]
    assert set(read[0]) == {"text", "label", "probability", *(f"probability_{name}" for name in CLASSES)}
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_labels_of_a_multi_label_row_are_joined_in_a_table() -> None:
    predictions = [{"labels": ["a", "b"], "probabilities": {"a": 0.75, "b": 0.5}}, {"labels": [], "probabilities": {}}]
    assert rendered(predictions[:1], "csv") == "labels,probability_a,probability_b\na|b,0.75,0.5\n"
    assert rendered([{"value": 1.5}], "tsv") == "value\n1.5\n"
    assert json.loads(rendered(predictions[1:], "jsonl")) == {"labels": [], "probabilities": {}}


def test_a_blank_line_is_an_error_with_its_number(run_folder: Path, invoke: Invoke) -> None:
    result = invoke("predict", run_folder, "-", text="good\n\nbad\n  \n")
    assert result.exit_code == 2
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == ["standard input:2", "standard input:4"]


@pytest.mark.parametrize(
    ("arguments", "summary"),
    [
        (["--format", "xml"], "--format: got xml"),
        (["-o", "answers.parquet"], "--output: got the suffix .parquet"),
        (["--columns", "text"], "--columns: got text; expected ROLE=COLUMN"),
        (["--columns", "text=a", "--columns", "text=b"], "--columns: got text twice"),
        (["-o", "no/such/folder.csv"], "there is no folder"),
    ],
)
def test_wrong_options(run_folder: Path, invoke: Invoke, arguments: list[str], summary: str) -> None:
    result = invoke("predict", run_folder, "-", *arguments, text="good\n")
    assert result.exit_code == 2
    assert summary in result.stderr
    assert result.stdout == ""


def test_the_input_is_not_overwritten(run_folder: Path, project: Path, invoke: Invoke) -> None:
    result = invoke("predict", run_folder, project / "test.jsonl", "-o", project / "test.jsonl")
    assert result.exit_code == 2
    assert "which is the input" in result.stderr


def test_input_that_is_not_utf8_is_named_by_line(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    from loopos.cli.predict import read_texts
    from loopos.config.diagnostics import DataError
    from loopos.data.decoding import TextRules

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good\nb\xe4d\n")))
    with pytest.raises(DataError, match=r"standard input:2: encoding: got the byte 0xe4"):
        read_texts("-", {}, TextRules())


def test_a_folder_without_a_run(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("predict", tmp_path, "-", text="good\n")
    assert result.exit_code == 2
    assert "no trained model here" in result.stderr


def test_evaluate_prints_one_object(run_folder: Path, project: Path, invoke: Invoke, trained: Any) -> None:
    result = invoke("evaluate", run_folder, project / "test.jsonl", "--json")
    assert result.exit_code == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert metrics["rows"] == 12
    assert {"accuracy", "macro_f1", "micro_f1", "log_loss"} <= set(metrics)
    assert sum(map(sum, metrics["confusion"])) == 12
    # The validation file again: the best validation's accuracy is the exported model's.
    assert metrics["accuracy"] == pytest.approx(json.loads(trained.stdout)["best_metric"])


def test_evaluate_as_text(run_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows(6), {"text": " ", "label": "bad"}])
    refused = invoke("evaluate", run_folder, file)
    assert refused.exit_code == 2
    assert "rows.jsonl:7: text" in refused.stderr
    result = invoke("evaluate", run_folder, file, "--skip-bad-rows")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith(f"{file}: 6 rows, 1 dropped")
    assert "accuracy" in result.stdout
    assert "true class" in result.stdout
