"""`loopos data check` and `loopos data preview`: what they count, what they mark, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.cli.data_preview import CUT, POOLED, UNPOOLED, shown_tokens
from tests.cli.conftest import Invoke, write_jsonl


class Letters:
    """A tokenizer of single letters: token n is the n-th letter."""

    def decode(self, tokens: list[int], clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return "".join("abcdefgh"[token] for token in tokens)


def fates(whole: list[int], kept: list[int], pooling: str) -> list[tuple[str, str]]:
    return [(piece.text, piece.fate) for piece in shown_tokens(Letters(), whole, kept, pooling)]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [POOLED, POOLED, POOLED]),
        ("max", [POOLED, POOLED, POOLED]),
        ("first", [POOLED, UNPOOLED, UNPOOLED]),
        ("last", [UNPOOLED, UNPOOLED, POOLED]),
    ],
)
def test_what_is_pooled(pooling: str, expected: list[str]) -> None:
    assert [fate for _, fate in fates([0, 1, 2], [0, 1, 2], pooling)] == expected


def test_what_is_cut_from_the_end_and_from_the_middle() -> None:
    assert fates([0, 1, 2, 3], [0, 1], "last") == [("a", UNPOOLED), ("b", POOLED), ("c", CUT), ("d", CUT)]
    assert fates([0, 1, 2, 3], [0, 3], "mean") == [("a", POOLED), ("b", CUT), ("c", CUT), ("d", POOLED)]


def test_preview_shows_tokens_cuts_and_labels(project: Path, invoke: Invoke) -> None:
    result = invoke("data", "preview", project / "run.json", "--rows", "2", "training.max_length=6")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{project / 'train.jsonl'}:1"
    assert lines[1].count("[") == 1
    assert "[pooled] by last" in result.stdout
    mean = invoke("data", "preview", project / "run.json", "training.max_length=6", "model.pooling=mean").stdout
    assert mean.splitlines()[1].count("[") == 6
    assert lines[1].count("~") >= 2
    assert lines[2].startswith("6 tokens, ")
    assert lines[2].endswith("cut at 6 · label 'good' -> 1")
    assert lines[4] == f"{project / 'train.jsonl'}:2"
    assert "48 rows read, 48 used" in result.stdout
    assert "\x1b[" not in result.stdout


def test_preview_in_colour(project: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    result = invoke("data", "preview", project / "run.json", "--rows", "1")
    assert "\x1b[32m" in result.stdout


def test_check_counts_rows_labels_and_lengths(tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("review,stars\nfine,yes\nawful,no\nfine,yes\nfine,no\n", encoding="utf-8")
    result = invoke("data", "check", file, "--columns", "label=stars", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["formats"], found["rows"], found["used"], found["num_faults"]) == (["csv"], 4, 4, 0)
    assert found["columns"] == ["review", "stars"]
    assert found["roles"] == {"text": "review", "label": "stars"}
    assert (found["task"], found["labels"]) == ("classification", {"no": 2, "yes": 2})
    assert found["characters"] == {"least": 4, "median": 4.0, "mean": 4.2, "most": 5}
    assert found["repeated"] == {"texts": 1, "rows": 3}
    assert found["conflicts"] == [{"text": "fine", "labels": ["yes", "no"], "lines": [2, 4, 5]}]


@pytest.mark.parametrize(
    ("labels", "task", "counted"),
    [
        ([1.5, -0.5, 2.0], "regression", {"least": -0.5, "mean": 1.0, "greatest": 2.0}),
        ([["a"], ["a", "b"], []], "multi_label", {"a": 2, "b": 1}),
        ([0, 2, 2], "classification", {"0": 1, "2": 2}),
    ],
)
def test_check_of_each_task(
    tmp_path: Path, invoke: Invoke, labels: list[Any], task: str, counted: dict[str, float]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {i}", "label": x} for i, x in enumerate(labels)])
    found = json.loads(invoke("data", "check", file, "--json").stdout)
    assert (found["task"], found["labels"]) == (task, counted)


def test_check_lists_diagnostics_and_ends_with_2(tmp_path: Path, invoke: Invoke) -> None:
    bad = [{"text": "", "label": "a"} for _ in range(25)]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}, *bad])
    result = invoke("data", "check", file)
    assert result.exit_code == 2
    assert f"{file}:3: text: got" in result.stdout
    assert "problems  25" in result.stdout
    assert result.stdout.splitlines()[-1] == "... and 5 more problems"
    found = json.loads(invoke("data", "check", file, "--json").stdout)
    assert (len(found["faults"]), found["num_faults"], found["rows"], found["used"]) == (20, 25, 27, 2)


def test_check_of_rows_without_a_label(tmp_path: Path, invoke: Invoke) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    result = invoke("data", "check", file)
    assert result.exit_code == 0
    assert "no label column" in result.stdout


def test_check_of_a_file_without_a_text_column(tmp_path: Path, invoke: Invoke) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"a": "one", "label": 0}])
    result = invoke("data", "check", file)
    assert result.exit_code == 2
    assert "--columns: no text column found. Columns: 'a', 'label'" in result.stdout
    assert "choose one: --columns text=COLUMN" in result.stdout


def test_check_of_a_file_that_is_not_there(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("data", "check", tmp_path / "absent.jsonl")
    assert result.exit_code == 2
    assert "absent.jsonl" in result.stderr
