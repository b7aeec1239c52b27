"""Rows as other tools have them through whole runs: the same losses as from the plain rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from preference_runs import comparisons, events_of, preference_config, reward_config, thumbs

from loopos.methods.kto import KtoTrainer
from loopos.methods.preference import PreferenceTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.training.progress import RunProgress

Rows = list[dict[str, Any]]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _openai(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input": {"messages": [_message("user", row["prompt"])], "tools": []},
        "preferred_output": [_message("assistant", row["chosen"])],
        "non_preferred_output": [_message("assistant", row["rejected"])],
    }


def _swift(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = [_message("user", row["prompt"]), _message("assistant", row["chosen"])]
    return {"messages": messages, "rejected_response": row["rejected"]}


def _ultrafeedback(row: Mapping[str, Any]) -> dict[str, Any]:
    given = [{"response": row["chosen"], "overall_score": 8}, {"response": row["rejected"], "overall_score": 3.5}]
    return {"instruction": row["prompt"], "models": ["a", "b"], "completions": given}


def _label_studio(row: Mapping[str, Any]) -> dict[str, Any]:
    result = {"from_name": "pw", "to_name": "answer1,answer2", "type": "pairwise", "value": {"selected": "left"}}
    data = {"prompt": row["prompt"], "answer1": row["chosen"], "answer2": row["rejected"]}
    return {"id": 1, "data": data, "annotations": [{"was_cancelled": False, "result": [result]}]}


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "openai": _openai, "ms-swift": _swift, "ultrafeedback": _ultrafeedback, "label studio": _label_studio,
}  # fmt: skip


def _losses(run: Path) -> list[float]:
    return [step["loss"] for step in events_of(run, "step")]


def _policy_losses(run: Path, weights: Path, rows: Rows) -> list[float]:
    config = preference_config(run, weights, "dpo", rows=rows, training={"max_steps": 2})
    PreferenceTrainer(config, progress=RunProgress(quiet=True)).train()
    return _losses(run)


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> list[float]:
    """Of a policy that learns from the plain rows."""
    return _policy_losses(tmp_path_factory.mktemp("plain") / "run", pico_folder, comparisons(12))


@pytest.mark.parametrize("name", LAYOUTS)
def test_comparisons_of_other_tools_train_a_policy(
    name: str, plain_losses: list[float], tmp_path: Path, pico_folder: Path
) -> None:
    rows = [LAYOUTS[name](row) for row in comparisons(12)]
    assert len(plain_losses) == 2
    assert _policy_losses(tmp_path / "run", pico_folder, rows) == plain_losses


def test_comparisons_of_other_tools_train_a_reward_model(tmp_path: Path, pico_folder: Path) -> None:
    plain = comparisons(12)
    found = []
    for run, rows in (("plain", plain), ("other", list(map(_openai, plain)))):
        config = reward_config(tmp_path / run, pico_folder, rows=rows, training={"max_steps": 2})
        RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
        found.append(_losses(tmp_path / run))
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_answers_with_a_thumb_of_other_tools_train_a_policy(tmp_path: Path, pico_folder: Path) -> None:
    plain = thumbs(12)
    llama_factory = [{"instruction": r["prompt"], "output": r["completion"], "kto_tag": r["label"]} for r in plain]
    swift = [
        {"messages": [_message("user", r["prompt"]), _message("assistant", r["completion"])], "label": r["label"]}
        for r in plain
    ]
    found = []
    for run, rows in (("plain", plain), ("llama_factory", llama_factory), ("swift", swift)):
        config = preference_config(tmp_path / run, pico_folder, "kto", rows=rows, training={"max_steps": 2})
        KtoTrainer(config, progress=RunProgress(quiet=True)).train()
        found.append(_losses(tmp_path / run))
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2]
