"""A trained run, opened: predictions in the order of the input, and the very metrics that validation logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import WORDS, class_rows, config_of, events_of, text_of, train, write_jsonl

import loopos
from loopos.config.diagnostics import DataError, UserError
from loopos.evaluation.outputs import NonFiniteOutputs, interpret, measure
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.run_outcome import FLAGS


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predictor")


def held_out(task: str) -> list[dict[str, Any]]:
    """Noisy rows, so that no metric is perfect."""
    rows = []
    for i in range(30):
        word = WORDS[i % 3]
        noisy = (i * 7) % 5 == 0
        if task == "classification":
            label: Any = ["praise", "anger", "question"][(i + noisy) % 3]
        elif task == "multi_label":
            label = ["a", "b"][: 1 + (i % 3 == 0)] if not noisy else ["b"]
        else:
            label = [4.5, -2.25, 1.0][i % 3] + (1.5 if noisy else 0.0)
        rows.append({"text": text_of(word, i), "label": label})
    return rows


@pytest.fixture(scope="module")
def runs(home: Path, pico_folder: Path) -> dict[str, Path]:
    """A run of each task, validated on rows of its own."""
    folders = {}
    for task in ("classification", "multi_label", "regression"):
        validation = write_jsonl(home / f"{task}_validation.jsonl", held_out(task))
        training = {"num_epochs": 3, "learning_rate": 0.004}
        data = {"validation_data": str(validation)}
        rows = held_out(task)[::-1]
        train(config_of(home / task, pico_folder, rows, model={"task": task}, training=training, data=data))
        folders[task] = home / task
    return folders


def best_validation(run: Path) -> dict[str, float]:
    return [event["metrics"] for event in events_of(run, "validation") if event["metrics"]["best"]][-1]


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
def test_evaluating_gives_the_metrics_of_the_best_validation(task: str, runs: dict[str, Path], home: Path) -> None:
    logged = {name: value for name, value in best_validation(runs[task]).items() if name not in (*FLAGS, "loss")}
    found = Predictor.open(runs[task]).evaluate_file(str(home / f"{task}_validation.jsonl"))
    assert len(logged) >= 5
    assert found["rows"] == 30
    for name, value in logged.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    if task == "classification":
        matrix = events_of(runs[task], "confusion")[-1]["metrics"]
        assert found["confusion"] == matrix["matrix"]
        assert found["class_names"] == ["anger", "praise", "question"]
        assert sum(map(sum, found["confusion"])) == 30
        assert sum(found["confusion"][i][i] for i in range(3)) / 30 == pytest.approx(found["accuracy"])


def test_predictions_come_in_the_order_of_the_input(runs: dict[str, Path]) -> None:
    predictor = Predictor.open(runs["classification"])
    # From 1 to some 180 tokens, in no order of length.
    texts = [" ".join([WORDS[i % 3]] * (1 + (i * 53) % 180)) for i in range(40)]
    together = predictor.predict(texts)
    assert len(together) == 40
    for text, prediction in zip(texts[:12], together, strict=False):
        alone = predictor.predict([text])
        assert len(alone) == 1
        assert alone[0]["probabilities"] == pytest.approx(prediction["probabilities"], abs=1e-5)
        assert alone[0]["label"] == max(prediction["probabilities"], key=prediction["probabilities"].__getitem__)
    assert predictor.predict([]) == []


def test_a_file_gives_a_prediction_a_row_with_or_without_labels(runs: dict[str, Path], home: Path) -> None:
    texts = [text_of(WORDS[i % 3], i) for i in range(7)]
    bare = write_jsonl(home / "bare.jsonl", [{"text": text} for text in texts])
    labeled = write_jsonl(home / "labeled.jsonl", [{"text": text, "label": "nonsense"} for text in texts])
    predictor = Predictor.open(runs["classification"])
    expected = predictor.predict(texts)
    assert predictor.predict_file(str(bare)) == expected
    assert predictor.predict_file(str(labeled)) == expected
    other = write_jsonl(home / "other_column.jsonl", [{"review": text, "id": i} for i, text in enumerate(texts)])
    assert predictor.predict_file(str(other), {"text": "review"}) == expected


def test_a_row_without_text_is_an_error_with_its_line(runs: dict[str, Path], home: Path) -> None:
    file = write_jsonl(home / "gap.jsonl", [{"text": "good"}, {"text": None}])
    with pytest.raises(DataError, match=r"gap\.jsonl:2"):
        Predictor.open(runs["classification"]).predict_file(str(file))


def test_labels_outside_the_classes_are_errors_or_counted(runs: dict[str, Path], home: Path) -> None:
    rows = [*held_out("classification")[:10], {"text": "good", "label": "unheard"}, {"text": "bad", "label": "of"}]
    file = write_jsonl(home / "unheard.jsonl", rows)
    predictor = Predictor.open(runs["classification"])
    with pytest.raises(DataError) as caught:
        predictor.evaluate_file(str(file))
    assert [diagnostic.line for diagnostic in caught.value.diagnostics] == [11, 12]
    found = predictor.evaluate_file(str(file), on_bad_row="skip")
    assert found["rows"] == 10
    assert sum(found["dropped"].values()) == 2


def test_texts_are_cut_where_training_cut_them_and_counted(home: Path, pico_folder: Path) -> None:
    run = home / "short"
    train(config_of(run, pico_folder, class_rows(24), training={"num_epochs": 1, "max_length": 5}))
    predictor = Predictor.open(run)
    long = "good the parcel came late please change it my card was charged"
    assert predictor.predict([long])[0]["probabilities"] == pytest.approx(
        predictor.predict([predictor.tokenizer.decode(predictor.tokenizer(long)["input_ids"][:5])])[0]["probabilities"],
        abs=1e-6,
    )
    predictor.predict([long, "bad", long])
    assert (predictor.tokens.used, predictor.tokens.cut) == (3, 2)
    file = write_jsonl(home / "long.jsonl", [{"text": long, "label": 0}, {"text": "bad", "label": 1}])
    assert predictor.evaluate_file(str(file))["truncated"] == 1


def test_a_run_in_bf16_predicts_as_it_validated(home: Path, pico_folder: Path) -> None:
    validation = write_jsonl(home / "bf16_validation.jsonl", held_out("classification"))
    run = home / "bf16"
    training = {"num_epochs": 2, "precision": "bf16", "learning_rate": 0.004}
    train(config_of(run, pico_folder, class_rows(60, ("praise", "anger", "question")), training=training,
                    data={"validation_data": str(validation)}))  # fmt: skip
    predictor = Predictor.open(run)
    model = predictor.model.backbone.model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert predictor.model.head.weight.dtype == torch.float32
    # The frequencies of rotary positions stay in fp32, as in training: in bf16 positions would run together.
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    found = predictor.evaluate_file(str(validation))
    assert found["log_loss"] == pytest.approx(best_validation(run)["log_loss"], abs=1e-6)
    whole = Predictor.open(run, precision="fp32").evaluate_file(str(validation))
    assert whole["log_loss"] == pytest.approx(found["log_loss"], abs=0.02)


def test_opening_through_the_package_and_what_it_refuses(runs: dict[str, Path], tmp_path: Path) -> None:
    opened = loopos.load(runs["regression"])
    value = opened.predict(["good"])[0]["value"]
    assert isinstance(value, float)
    assert Predictor.open(runs["regression"] / "model").predict(["good"])[0]["value"] == value
    with pytest.raises(UserError, match="no trained model here"):
        loopos.load(tmp_path)
    with pytest.raises(UserError, match="got int3, expected one of bf16, fp16, fp32"):
        Predictor.open(runs["regression"], precision="int3")


def test_what_outputs_mean_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]])
    assert interpret("classification", logits).tolist() == [pytest.approx([0.5, 0.5]), pytest.approx([0.25, 0.75])]
    assert interpret("multi_label", logits).tolist() == [pytest.approx([0.5, 0.5]), pytest.approx([0.5, 0.75])]
    values = interpret("regression", torch.tensor([[2.0], [-1.0]]), target_mean=10.0, target_std=3.0)
    assert values.tolist() == [16.0, 7.0]
    assert measure("multi_label", interpret("multi_label", logits), [[1, 0], [0, 1]], threshold=0.6)[
        "micro_f1"
    ] == pytest.approx(2 / 3)


def test_outputs_that_are_no_numbers_are_no_predictions(runs: dict[str, Path]) -> None:
    predictor = Predictor.open(runs["classification"])
    with torch.no_grad():
        predictor.model.head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteOutputs, match="outputs for 2 of 2 rows are not finite"):
        predictor.predict(["good", "bad"])
