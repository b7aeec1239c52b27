"""Rows that occur in training and validation are counted and reported by every method, and a prompt stays on one side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopos.config.chain_of_thought import ReasoningDataSection
from loopos.config.differences import resumed_config
from loopos.config.preferences import PreferenceTextSection
from loopos.config.pretraining import PretrainingConfig
from loopos.config.sections import DataSection, ModelSection
from loopos.data.labeled import load_labeled
from loopos.data.preference_data import load_comparisons, load_prompts
from loopos.data.repeats import key_of_prompt
from loopos.data.supervised import load_supervised
from loopos.methods.fine_tuning import FineTuner
from loopos.methods.pretraining import Pretrainer

Rows = list[dict[str, Any]]
Load = Callable[[dict[str, Any]], Any]


def _labeled(data: dict[str, Any]) -> Any:
    section = DataSection.model_validate({"pretrained_weights": "new", "output_dir": "run", **data})
    return load_labeled(section, ModelSection(), seed=42)


def _supervised(data: dict[str, Any]) -> Any:
    return load_supervised(
        ReasoningDataSection.model_validate({"pretrained_weights": "new", "output_dir": "run", **data}), seed=42
    )


def _preferences(load: Any) -> Load:
    def loaded(data: dict[str, Any]) -> Any:
        actual = {"pretrained_weights": "new", "output_dir": "run", **data}
        source = actual.pop("training_data")
        return load(PreferenceTextSection.model_validate(actual), source, seed=42)

    return loaded


CASES: dict[str, tuple[Load, Callable[[int, int], dict[str, Any]], bool]] = {
    "labeled": (_labeled, lambda asked, number: {"text": f"film {asked}", "label": f"c{number % 2}"}, True),
    "demonstrations": (
        _supervised,
        lambda asked, number: {"problem": f"{asked} + 1?", "reasoning": [f"way {number}"], "answer": "2"},
        True,
    ),
    "conversations": (
        _supervised,
        lambda asked, number: {
            "messages": [{"role": "user", "content": f"ask {asked}"}, {"role": "assistant", "content": f"r{number}"}]
        },
        True,
    ),
    "completions": (_supervised, lambda asked, number: {"prompt": f"ask {asked}", "completion": f" r{number}"}, True),
    "instructions": (
        _supervised,
        lambda asked, number: {"instruction": f"ask {asked}", "input": "x", "output": f"r{number}"},
        True,
    ),
    "comparisons": (
        _preferences(load_comparisons),
        lambda asked, number: {"prompt": f"ask {asked}", "chosen": f"good {number}", "rejected": f"bad {number}"},
        True,
    ),
    # A prompt that came before is left out: none repeats.
    "prompts": (_preferences(load_prompts), lambda asked, number: {"prompt": f"ask {asked}"}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_one_prompt_stay_together(name: str, write_rows: Callable[[str, Rows], Path]) -> None:
    load, row, repeats = CASES[name]
    file = write_rows("a.jsonl", [row(number % 20, number) for number in range(80)])
    found = load({"training_data": str(file), "validation_share": 0.2})
    train, validation = ({key_of_prompt(each) for each in side} for side in (found.train, found.validation))
    assert train.isdisjoint(validation)
    assert len(train) + len(validation) == 20
    assert any(f"of the 20 {'text' if name == 'labeled' else 'prompt'}s" in each for each in found.summary) is repeats
    assert not any("partly measure memorization" in each for each in found.summary)
    if repeats:
        by_row = load({"training_data": str(file), "validation_share": 0.2, "split_by": "row"})
        assert len(by_row.validation) == 16
        assert "of 16 rows" in by_row.summary[-1]
        assert "partly measure memorization" in by_row.summary[-1]


@pytest.mark.parametrize("name", CASES)
def test_validation_rows_that_training_has_are_counted(name: str, write_rows: Callable[[str, Rows], Path]) -> None:
    """Of five rows two are in training too, one has the same prompt with another response, two are new."""
    load, row, _ = CASES[name]
    train = [row(number, number) for number in range(10)]
    other = [row(3, 3), row(4, 4), row(5, 6), row(30, 31), row(32, 31)]
    files = write_rows("a.jsonl", train), write_rows("b.jsonl", other)
    found = load({"training_data": str(files[0]), "validation_data": str(files[1])})
    what, whole = {"labeled": "text"}.get(name, "prompt"), 3 if name == "prompts" else 2
    shared = "" if name == "prompts" else f" and 1 share their {what} with a training row"
    expected = f"validation: of 5 rows {whole} are in the training data too{shared}; "
    assert found.summary[-1] == f"{expected}metrics on them partly measure memorization"


def test_pretraining_counts_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"document {number}" for number in range(30)))
    (tmp_path / "b.txt").write_text("document 3\n\nnew")
    config = PretrainingConfig.model_validate(
        {
            "computation": {"mode": "pretraining", "method": "autoregressive"},
            "model": {"d_model": 32, "num_heads": 2, "num_layers": 1, "d_ff": 64, "vocab_size": 300},
            "training": {"learning_rate": 0.01},
            "data": {
                "training_data": str(tmp_path / "a.txt"),
                "validation_data": str(tmp_path / "b.txt"),
                "output_dir": str(tmp_path / "run"),
                "output_weights": str(tmp_path / "weights"),
            },
        }
    )
    summary: list[str] = []
    pretrainer = Pretrainer(config)
    pretrainer.progress.say = lambda *sentences: summary.extend(sentences)  # type: ignore[method-assign]
    pretrainer.load_data()
    assert any(each.startswith("validation: of 2 documents 1 are in the training data too") for each in summary)


def test_an_older_run_resumes_with_its_own_split(fine_tuning_config: Any, tmp_path: Path, write_rows: Any) -> None:
    """A run of before `data.split_by` has no such key in its config.json: it validated row by row, and still does."""
    write_rows("train.jsonl", [{"text": f"film {number % 15}", "label": number % 2} for number in range(60)])
    sections = {"training": {"max_steps": 1}, "data": {"split_by": "row", "validation_share": 0.2}}
    before = FineTuner(fine_tuning_config(**sections))
    before.train()
    recorded = tmp_path / "run" / "config.json"
    content = json.loads(recorded.read_text())
    for key in ("split_by", "encoding", "max_line_bytes", "max_expansion"):
        del content["data"][key]
    recorded.write_text(json.dumps(content))
    after = FineTuner(fine_tuning_config(training={"max_steps": 2}, data={"validation_share": 0.2}))
    after.train(resume=True)
    assert [each.row.line for each in after.data.validation] == [each.row.line for each in before.data.validation]
    assert json.loads(recorded.read_text())["data"]["split_by"] == "row"
    again = FineTuner(fine_tuning_config(training={"max_steps": 3}, data={"validation_share": 0.2}))
    again.train(resume=True)
    assert [each.row.line for each in again.data.validation] == [each.row.line for each in before.data.validation]


def test_a_new_run_and_a_named_key_are_unchanged(fine_tuning_config: Any, tmp_path: Path) -> None:
    config = fine_tuning_config()
    assert resumed_config(config, tmp_path / "nowhere").data.split_by == "prompt"
    (tmp_path / "config.json").write_text(json.dumps({"data": {"split_by": "row"}}))
    assert resumed_config(config, tmp_path).data.split_by == "row"
    named = fine_tuning_config(data={"split_by": "prompt"})
    assert resumed_config(named, tmp_path).data.split_by == "prompt"
