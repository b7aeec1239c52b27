"""Tasks of reasoning-gym as rows, by a stand-in for the package where it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from preference_runs import events_of, ppo_config

from loopos.config.diagnostics import DataError, MissingRequirement
from loopos.config.paths import check_rows
from loopos.data import rows
from loopos.methods.ppo import PpoTrainer
from loopos.training.progress import RunProgress


@dataclass
class SumsConfig:
    size: int
    seed: int | None = None
    most: int = 9

    def validate(self) -> None:
        if self.most < 1:
            raise AssertionError("most must be positive")


class Sums:
    """Sums of two numbers, as the package's data sets have them."""

    def __init__(self, config: SumsConfig) -> None:
        self.config = config

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.config.size):
            left, right = (self.config.seed or 0) + index, index * 2 % self.config.most
            yield {
                "question": f"What is {left} + {right}?",
                "answer": str(left + right),
                "metadata": {"source_dataset": "sums", "source_index": index},
            }


@pytest.fixture
def gym(monkeypatch: pytest.MonkeyPatch) -> None:
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")

    def create_dataset(name: str, **settings: Any) -> Sums:
        config = SumsConfig(**settings)
        config.validate()
        return Sums(config)

    def scorer(name: str) -> Any:
        return lambda answer, entry: 1.0 if entry["answer"] in answer else 0.01

    factory.DATASETS = {"sums": (Sums, SumsConfig)}  # type: ignore[attr-defined]
    factory.create_dataset = create_dataset  # type: ignore[attr-defined]
    package.get_score_answer_fn = scorer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def values(source: str) -> list[dict[str, object]]:
    return [dict(row.values) for row in rows.read(source)]


@pytest.mark.usefixtures("gym")
def test_rows_of_a_task() -> None:
    found = values("reasoning-gym:sums?size=2&seed=5")
    assert found[0] == {
        "question": "What is 5 + 0?",
        "answer": "5",
        "metadata": {"source_dataset": "sums", "source_index": 0},
    }
    assert len(found) == 2
    assert len(values("reasoning-gym:sums")) == 500
    assert values("reasoning-gym:sums?seed=0") == values("reasoning-gym:sums")


@pytest.mark.usefixtures("gym")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning-gym:sum", "the task 'sum'; expected a task of reasoning-gym.*\n?.*did you mean \"sums\""),
        ("reasoning-gym:sums?siez=3", "the setting 'siez'; expected one of size, seed, most"),
        ("reasoning-gym:sums?most=0", r"settings that the task refuses \(AssertionError: most must be positive\)"),
    ],
)
def test_mistakes_are_named(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        values(source)


def test_a_missing_package_is_named_and_the_form_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingRequirement, match="the package reasoning-gym is not installed"):
        values("reasoning-gym:sums")
    assert not [*check_rows("data.prompts", "reasoning-gym:sums?size=2&seed=5", "")]
    (problem,) = check_rows("data.prompts", "reasoning-gym:sums?size", "")
    assert problem.expected == 'a task and its settings, such as "reasoning-gym:chain_sum?size=2000&seed=1"'


@pytest.mark.usefixtures("gym")
def test_a_policy_trains_on_a_task_with_its_scorer(tmp_path: Path, pico_folder: Path) -> None:
    data = {"prompts": "reasoning-gym:sums?size=12&seed=3"}
    config = ppo_config(tmp_path / "run", pico_folder, functions=["reasoning_gym"], data=data)
    PpoTrainer(config, progress=RunProgress(quiet=True)).train()
    assert all(0.01 <= each["score_reasoning_gym"] <= 1.0 for each in events_of(tmp_path / "run", "rollout"))


def test_the_real_package() -> None:
    pytest.importorskip("reasoning_gym")
    found = values("reasoning-gym:chain_sum?size=3&seed=1")
    assert len(found) == 3
    assert found == values("reasoning-gym:chain_sum?size=3&seed=1")
    assert found != values("reasoning-gym:chain_sum?size=3&seed=2")
