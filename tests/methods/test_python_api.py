"""`loopos.train` with rows of a program, and `loopos.load` of every kind of model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import datasets
import pandas
import pytest
from pico_runs import class_rows
from preference_runs import ASKED, comparisons
from transformers.utils import logging as of_transformers

import loopos
from loopos.config.diagnostics import DataError, UserError
from loopos.evaluation.predictor import open_predictor
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
    actual: Any = {
        "list": lambda: rows,
        "frame": lambda: pandas.DataFrame(rows),
        "dataset": lambda: datasets.Dataset.from_list(rows),
    }[kind]()
    loopos.train(config_of(tmp_path / "run", pico_folder), data=actual, quiet=True)
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


PROBLEMS = [{"problem": f"add {i} and 2", "reasoning": [f"{i} + 2 = {i + 2}"], "answer": str(i + 2)} for i in range(12)]
TEXTS = [{"text": f"the parcel {i} came late. it broke after two days. please change it."} for i in range(12)]
PROMPTS = [{"prompt": prompt} for prompt in ASKED]
SHORT = {"max_new_tokens": 8}
FUNCTIONS = {"functions": [{"name": "preference_runs:length_of"}]}


def language_config(method: str, folder: Path, weights: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """A short run of a language method with its rows in `data`."""
    training = {"learning_rate": 1e-3, "batch_size": 4, "num_epochs": 1, "precision": "fp32", "device": "cpu"}
    mode = "pretraining" if method == "autoregressive" else "posttraining"
    config: dict[str, Any] = {"computation": {"mode": mode, "method": method}, "training": training}
    where = {"output_dir": str(folder / "run"), "pretrained_weights": str(weights)}
    if method in ("ppo", "rlhf"):
        training |= {"max_iterations": 1, "inner_epochs": 1, "validate_every": "never", "value_model": "shared"}
        config["generation"] = SHORT
    if method == "ppo":
        config["reward"] = FUNCTIONS
    if method == "chain_of_thought":
        config |= {"generation": SHORT, "evaluation": {"problems": 2, "samples": 2}}
    if method == "autoregressive":
        del where["pretrained_weights"]
        where["output_weights"] = str(folder / "weights")
        config["model"] = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300}
    return {**config, "data": {**where, **data}}


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("chain_of_thought", {"reasoning_examples": PROBLEMS, "validation_data": PROBLEMS[:3]}),
        ("sft", {"training_data": PROBLEMS, "validation_data": PROBLEMS[:3]}),
        ("reward_model", {"preference_data": comparisons(16), "validation_data": pandas.DataFrame(comparisons(4))}),
        ("ppo", {"prompts": datasets.Dataset.from_list(PROMPTS), "validation_share": 0.0}),
        ("rlhf", {"preference_data": comparisons(16), "prompts": iter(PROMPTS)}),
        ("autoregressive", {"input_file": TEXTS, "validation_data": TEXTS[:2]}),
    ],
)
def test_rows_are_accepted_wherever_a_file_name_is(
    method: str, data: dict[str, Any], tmp_path: Path, pico_folder: Path
) -> None:
    config = language_config(method, tmp_path, pico_folder, data)
    assert loopos.train(config, quiet=True).step >= 1
    written: dict[str, Any] = {}
    # rlhf is two runs, each with its own rows.
    for file in (tmp_path / "run").rglob("config.json"):
        if file.parent.name in ("run", "reward_model"):
            written |= {key: value for key, value in json.loads(file.read_text())["data"].items() if value}
    actual = [key for key, value in data.items() if not isinstance(value, float)]
    for key in actual:
        assert re.fullmatch(rf"{tmp_path}/run/rows/{key}-[0-9a-f]{{12}}(\.jsonl)?", written[key]), key
    assert len(list((tmp_path / "run" / "rows").iterdir())) == len(actual)


def test_data_replaces_the_file_named_in_the_config(tmp_path: Path, pico_folder: Path) -> None:
    named = {"preference_data": "is/not/there.jsonl", "validation_data": "neither/is/this.jsonl"}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(language_config("reward_model", tmp_path, pico_folder, named)))
    loopos.train(file, data=comparisons(16), validation_data=comparisons(4), quiet=True)
    kept = (tmp_path / "run" / "rows").iterdir()
    assert sorted(place.name.partition("-")[0] for place in kept) == ["preference_data", "validation_data"]
    # Without a source of its own the config gets the rows under the method's name for them.
    config = language_config("reward_model", tmp_path / "other", pico_folder, {})
    loopos.train(config, data=comparisons(16), quiet=True)
    assert json.loads((tmp_path / "other" / "run" / "config.json").read_text())["data"]["preference_data"]


def test_a_run_resumes_with_its_rows_and_refuses_others_by_key(tmp_path: Path, pico_folder: Path) -> None:
    config = language_config("reward_model", tmp_path, pico_folder, {"preference_data": comparisons(16)})
    first = loopos.train(config, ["training.max_steps=2"], quiet=True)
    config["data"]["preference_data"] = comparisons(12)
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(
        UserError, match=r"does not belong to the run(?s:.*)data\.preference_data: was .*/rows/preference_data-"
    ):
        loopos.train(config, resume=True, quiet=True)
    assert sorted((tmp_path / "run").rglob("*")) == before
    config["data"]["preference_data"] = pandas.DataFrame(comparisons(16))
    assert loopos.train(config, resume=True, quiet=True).step > first.step


def test_what_holds_no_rows_is_refused(tmp_path: Path, pico_folder: Path) -> None:
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(class_rows(3)))
    rows: Any
    for rows, got in ((splits, "a DatasetDict with the keys train"), ({"text": ["a"]}, "a dict with the keys text")):
        with pytest.raises(DataError, match=rf"training_data.*{got}; expected rows: a list of dicts"):
            loopos.train(config_of(tmp_path / "run", pico_folder), data=rows)
    with pytest.raises(DataError, match=r"training_data.*int 3; expected rows"):
        loopos.train(config_of(tmp_path / "run", pico_folder), data=cast(Any, 3))


def test_the_libraries_are_silent_and_as_they_were_afterwards(
    tmp_path: Path, pico_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOOPOS_VERBOSE", raising=False)
    before = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity_warning()  # type: ignore[no-untyped-call]
    of_transformers.enable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.logging.set_verbosity_info()
    datasets.enable_progress_bars()
    try:
        rows = datasets.Dataset.from_list(comparisons(16))
        # A bar is drawn where nothing silences it: what is silent below is so by LoopOS.
        rows.save_to_disk(str(tmp_path / "rows"))
        assert "Saving the dataset" in capfd.readouterr().err
        config = language_config("reward_model", tmp_path, pico_folder, {"preference_data": rows})
        loopos.train(config, quiet=True)
        loopos.load(tmp_path / "run", "reward", device="cpu")
        assert capfd.readouterr() == ("", "")
        assert (of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()) == (logging.WARNING, True)
        assert datasets.logging.get_verbosity() == datasets.logging.INFO
        assert not datasets.are_progress_bars_disabled()
    finally:
        datasets.logging.set_verbosity_warning()
        of_transformers.set_verbosity(before[0])
        if not before[1]:
            of_transformers.disable_progress_bar()  # type: ignore[no-untyped-call]


def test_a_language_model_is_opened(pico_folder: Path) -> None:
    model = loopos.load(pico_folder, "language", device="cpu")
    assert isinstance(model, Reasoner)
    settings = loopos.SamplingParams(max_new_tokens=5)
    first, second = model.generate(["good", "bad parcel"], settings)
    # Greedy: the same alone, in pieces, and by the engine under it.
    assert model.chat("bad parcel", settings) == second
    assert "".join(model.stream([{"role": "user", "content": "bad parcel"}], settings)) == second
    [completion] = model.engine.generate([model.prompt("good")], model.sampling(settings))
    assert completion.text == first
    assert len(model.generate(["good"], loopos.SamplingParams(max_new_tokens=2, temperature=1.0), n=3)) == 3
    with pytest.raises(UserError, match=r'message 0: got .*; expected a dict with "role" and "content"'):
        model.chat([{"role": "user"}])


def test_another_kind_is_refused(of_a_file: Path, pico_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'got a model of kind "head", which has predict\(\); expected "language"'):
        loopos.load(of_a_file, "language")
    with pytest.raises(UserError, match='got a model of kind "language"'):
        loopos.load(pico_folder, "reward")
    for place, summary in ((tmp_path, "no trained model here"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(UserError, match=summary):
            loopos.load(place)
    assert open_predictor(of_a_file).columns == {"text": "text", "label": "label"}
