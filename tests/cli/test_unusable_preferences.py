"""Preference rows that teach nothing: an error with file and line, or left out and counted, in dry runs and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from loopos.planning import dry_run
from tests.cli.conftest import Invoke, write_jsonl

GOOD = [{"prompt": f"where is {i}", "chosen": "thank you, it comes", "rejected": "just wait"} for i in range(8)]
ASKED = {"role": "user", "content": "why"}
# The reason that each row is counted under, and what the error says.
UNUSABLE: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "why", "chosen": "so", "rejected": "so"}, "the two responses are the same", "identical ('so')"),
    ({"prompt": "why", "chosen": "", "rejected": "so"}, "chosen is blank", "chosen: got ''"),
    ({"prompt": "why", "chosen": "so", "rejected": " \n"}, "rejected is blank", "rejected: got ' \\n'"),
    ({"prompt": "why", "chosen": "so", "rejected": []}, "response is empty", "rejected: got an empty list"),
    (
        {"prompt": "why", "chosen": [{"role": "assistant", "content": ""}], "rejected": "so"},
        "content is blank",
        "chosen[0].content: got ''",
    ),
    ({"prompt": "why", "chosen": [ASKED], "rejected": "so"}, "response is empty", "no message after the prompt"),
]
ROWS = [*GOOD, *(row for row, _, _ in UNUSABLE)]
THUMBS = [
    *({"prompt": f"where is {i}", "completion": "it comes", "label": bool(i % 2)} for i in range(8)),
    {"prompt": "why", "completion": "", "label": True},
    {"prompt": "why", "completion": "so", "label": None},
    {"prompt": "why", "completion": "so", "label": [True, False]},
]


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "measured_rates", lambda device, half: (1e9, 1e9))


def written(folder: Path, weights: Path, method: str, rows: list[dict[str, Any]], **data: Any) -> Path:
    content = {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 0.001, "batch_size": 4, "num_epochs": 1, "precision": "fp32", "device": "cpu"},
        "data": {
            "pretrained_weights": str(weights), "output_dir": str(folder / "run"), "validation_share": 0,
            "preference_data": str(write_jsonl(folder / "rows.jsonl", rows)), **data,
        },
    }  # fmt: skip
    file = folder / "config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.mark.parametrize("method", ["reward_model", "dpo", "kto"])
def test_rows_that_cannot_be_used_are_errors_with_their_lines(
    method: str, tmp_path: Path, pico_folder: Path, invoke: Invoke
) -> None:
    file = written(tmp_path, pico_folder, method, ROWS)
    for words in ((), ("--dry-run",)):
        result = invoke("train", file, *words)
        assert result.exit_code == 2
        for number, (_, _, message) in enumerate(UNUSABLE, start=len(GOOD) + 1):
            assert f"rows.jsonl:{number}: " in result.stderr
            assert message in result.stderr
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pytest.mark.parametrize("method", ["reward_model", "dpo", "kto"])
def test_rows_that_cannot_be_used_are_left_out_and_counted(
    method: str, tmp_path: Path, pico_folder: Path, invoke: Invoke
) -> None:
    file = written(tmp_path, pico_folder, method, ROWS, on_bad_row="skip")
    account = (
        "14 rows read, 8 used, 1 dropped (chosen is blank), 1 dropped (content is blank), 1 dropped (rejected is blank), "
        "2 dropped (response is empty), 1 dropped (the two responses are the same)"
    )
    planned = invoke("train", file, "--dry-run")
    assert (planned.exit_code, account in planned.stdout) == (0, True), planned.stderr
    with patch("loopos.methods.base.write_report"):
        result = invoke("train", file)
    assert result.exit_code == 0, result.stderr
    assert account in result.stdout + result.stderr


def test_answers_with_a_thumb_that_cannot_be_used(tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    result = invoke("train", written(tmp_path, pico_folder, "kto", THUMBS), "--dry-run")
    assert result.exit_code == 2
    messages = ("9: completion: got ''", "10: label: got None (null)", "11: label: got [True, False] (a list)")
    for message in messages:
        assert f"rows.jsonl:{message}" in result.stderr
    planned = invoke("train", written(tmp_path, pico_folder, "kto", THUMBS, on_bad_row="skip"), "--dry-run")
    account = (
        "11 rows read, 8 used, 1 dropped (as many up as down), 1 dropped (completion is blank), 1 dropped (label does"
    )
    assert (planned.exit_code, account in planned.stdout) == (0, True), planned.stderr


def test_prompts_are_cut_only_by_option_and_counted(tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    """One prompt is far longer than max_length."""
    rows = [*GOOD, {"prompt": "where is it " * 100, "chosen": "it comes", "rejected": "just wait"}]
    file = written(tmp_path, pico_folder, "dpo", rows)
    refused = invoke("train", file, "--dry-run", "training.max_length=60")
    assert refused.exit_code == 2
    assert "rows.jsonl:9: row: got" in refused.stderr
    words = ("training.max_length=60", "data.over_length=cut_prompt")
    planned = invoke("train", file, "--dry-run", *words)
    assert (planned.exit_code, "; 1 prompts cut at 60 (" in planned.stdout) == (0, True), planned.stderr
    shown = invoke("data", "preview", file, "--rows", 9, *words)
    assert shown.exit_code == 0, shown.stderr
    last = shown.stdout.partition("rows.jsonl:9")[2]
    assert last.splitlines()[1].startswith("prompt    ~")
    assert not last.splitlines()[1].endswith("~"), "the end of the prompt stays"
    assert "tokens of the prompt cut at 60" in last
    with patch("loopos.methods.base.write_report"):
        result = invoke("train", file, *words)
    assert result.exit_code == 0, result.stderr
    assert "9 rows read, 9 used" in result.stdout + result.stderr
