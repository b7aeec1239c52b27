"""`loopos.train` with rows of a program, and `loopos.load` of every kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from pico_runs import class_rows

import loopos
from loopos.config.faults import DataError, UserError
from loopos.evaluation.ensemble import open_predictor
from loopos.evaluation.reasoning import Reasoner


def config_of(folder: Path, pico_folder: Path) -> dict[str, Any]:
    return {
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {
            "learning_rate": 0.01,
            "optimizer": "adamw",
            "num_epochs": 1,
            "device": "cpu",
            "precision": "fp32",
        },
        "data": {"pretrained_weights": pico_folder, "output_dir": folder},
    }


@pytest.fixture(scope="module")
def of_a_file(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("file")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in class_rows(24)))
    loopos.train(config_of(folder / "run", pico_folder), [f"data.training_data={file}"], quiet=True)
    return folder / "run"


@pytest.mark.parametrize("kind", ["list", "frame", "dataset"])
def test_rows_of_a_program_train_as_a_file_does(kind: str, of_a_file: Path, tmp_path: Path, pico_folder: Path) -> None:
    rows = class_rows(24)
    given: Any = {
        "list": lambda: rows,
        "frame": lambda: pandas.DataFrame(rows),
        "dataset": lambda: datasets.Dataset.from_list(rows),
    }[kind]()
    loopos.train(config_of(tmp_path / "run", pico_folder), data=given, quiet=True)
    texts = [row["text"] for row in rows[:4]]
    assert loopos.load(tmp_path / "run", device="cpu").predict(texts) == loopos.load(
        of_a_file, "head", device="cpu"
    ).predict(texts)
    with pytest.raises(UserError, match="already contains a run"):
        loopos.train(config_of(tmp_path / "run", pico_folder), data=rows, quiet=True)


def test_a_row_that_cannot_be_written_is_named(tmp_path: Path, pico_folder: Path) -> None:
    rows: list[Any] = [*class_rows(3), {"text": "a", "label": {1}}]
    with pytest.raises(DataError, match=r"training_data \(row 3\)"):
        loopos.train(config_of(tmp_path / "run", pico_folder), data=rows)
    rows[3] = "a text"
    with pytest.raises(DataError, match=r"row 3\).*str 'a text'"):
        loopos.train(config_of(tmp_path / "run", pico_folder), data=rows)


def test_a_language_model_is_opened(pico_folder: Path) -> None:
    model = loopos.load(pico_folder, "language", device="cpu")
    assert isinstance(model, Reasoner)
    settings = loopos.SamplingSettings(max_new_tokens=5)
    first, second = model.generate(["good", "bad parcel"], settings)
    # Greedy: the same alone, in pieces, and by the engine under it.
    assert model.chat("bad parcel", settings) == second
    assert "".join(model.stream([{"role": "user", "content": "bad parcel"}], settings)) == second
    [completion] = model.engine.generate([model.prompt("good")], model.sampling(settings))
    assert completion.text == first
    assert len(model.generate(["good"], loopos.SamplingSettings(max_new_tokens=2, temperature=1.0), n=3)) == 3
    with pytest.raises(UserError, match=r'message 0: got .*; expected a dict with "role" and "content"'):
        model.chat([{"role": "user"}])


def test_another_kind_is_refused(of_a_file: Path, pico_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'got a model of kind "head", which has predict\(\); expected "language"'):
        loopos.load(of_a_file, "language")
    with pytest.raises(UserError, match='got a model of kind "language"'):
        loopos.load(pico_folder, "reward")
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no trained model here"):
            loopos.load(place)
    assert open_predictor(of_a_file).columns == {"text": "text", "label": "label"}
