"""`loopos evaluate --tasks` without lm-eval, and options that only apply to tasks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke


def test_without_the_extra_it_says_how_to_get_it(
    language_run: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    result = invoke("evaluate", language_run, "--tasks", "arc_easy")
    assert result.exit_code == 1
    assert 'pip install -e ".[eval]"' in result.stderr


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        ((), "got no data; expected a data file, or --tasks"),
        (("--num-fewshot", 2), "--num-fewshot: only for tasks; add --tasks"),
        (("--chat",), "--chat: only for tasks"),
        (("--tasks", "arc_easy", "--limit", 0), "--limit: got 0"),
        (("--tasks", "arc_easy", "--num-fewshot", -1), "--num-fewshot: got -1"),
        (("--tasks", "arc_easy", "--task-folder", "nowhere"), "nowhere is not a folder"),
        (("--tasks", "arc_easy", "--metric", "loss"), "--metric: only for rows of data"),
        (("rows.jsonl", "--tasks", "arc_easy"), "rows.jsonl and --tasks: use only one of the two"),
    ],
)
def test_contradictions(language_run: Path, words: tuple[Any, ...], summary: str, invoke: Invoke) -> None:
    result = invoke("evaluate", language_run, *words)
    assert result.exit_code == 2
    assert summary in result.stderr
