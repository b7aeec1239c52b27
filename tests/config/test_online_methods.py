"""Methods of reinforcement learning: the defaults that an algorithm brings, and checks of groups of responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.algorithms import ALGORITHMS
from loopos.config.diagnostics import ConfigError
from loopos.config.load import LoadedConfig, load
from loopos.config.methods import ONLINE_METHODS, config_classes
from loopos.config.ppo import PpoConfig
from loopos.config.rlhf import RlhfConfig


def loaded(folder: Path, method: str, *overrides: str, **training: Any) -> LoadedConfig:
    rows = folder / "prompts.jsonl"
    rows.write_text('{"prompt": "2 + 2", "answer": "4"}\n')
    config = {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 1e-6, **training},
        "reward": {"functions": [{"name": "exact"}]},
        "data": {
            "pretrained_weights": "built-in", "prompts": str(rows), "output_dir": "run", "validation_share": 0.0
        },
    }  # fmt: skip
    file = folder / "run.json"
    file.write_text(json.dumps(config))
    return load(file, overrides, config_classes(), check_files=False)


def settings(folder: Path, method: str, *overrides: str, **training: Any) -> PpoConfig:
    found = loaded(folder, method, *overrides, **training).config
    assert isinstance(found, PpoConfig)
    return found


def value_of(config: PpoConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("name", [name for name in ONLINE_METHODS if name != "ppo"])
def test_a_method_and_an_algorithm_of_ppo_have_the_same_defaults(name: str, tmp_path: Path) -> None:
    method = settings(tmp_path, name)
    algorithm = settings(tmp_path, "ppo", algorithm=name)
    assert method.training.algorithm == name
    assert method.training == algorithm.training
    assert method.generation == algorithm.generation
    defaults = ALGORITHMS[name].defaults
    assert len(defaults) >= 4
    assert {key: value_of(method, key) for key in defaults} == defaults
    assert loaded(tmp_path, name).notes == []
    assert (method.value_model, method.needs_reference) == (None, method.training.kl_coefficient > 0)


def test_a_config_overrides_the_defaults_of_its_algorithm(tmp_path: Path) -> None:
    found = settings(tmp_path, "dapo", "training.clip_epsilon_high=0.5", "generation.responses_per_prompt=4")
    assert (found.training.clip_epsilon_high, found.generation.responses_per_prompt) == (0.5, 4)
    assert (found.training.dynamic_sampling, found.generation.overlong_tokens) == (3, 13)
    # The default of the section, set by the user, is a value like any other.
    assert settings(tmp_path, "dapo", dynamic_sampling=0).training.dynamic_sampling == 0


def test_ppo_and_the_algorithms_of_users_keep_the_defaults_of_the_section(tmp_path: Path) -> None:
    found = settings(tmp_path, "ppo", value_model="shared")
    assert (found.training.algorithm, found.training.inner_epochs, found.training.batch_size) == ("ppo", 4, 16)


def test_rlhf_takes_the_defaults_of_its_algorithm(tmp_path: Path) -> None:
    found = RlhfConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "rlhf"},
            "training": {"learning_rate": 1e-6, "algorithm": "grpo", "inner_epochs": 2},
            "data": {"pretrained_weights": "built-in", "preference_data": "rows.jsonl", "output_dir": "run"},
        }
    ).ppo_config()
    assert (found.generation.responses_per_prompt, found.training.inner_epochs) == (8, 2)
    assert (found.training.loss_normalization, found.needs_reference) == ("sequence", False)


@pytest.mark.parametrize(
    ("method", "overrides", "field", "expected"),
    [
        ("grpo", ["training.algorithm=dapo"], "training.algorithm", '"grpo", or nothing'),
        ("grpo", ["training.algorithm=grop"], "training.algorithm", '"grpo"'),
        ("grpo", ["generation.responses_per_prompt=1"], "generation.responses_per_prompt", "at least 2"),
        ("reinforce_pp", ["training.dynamic_sampling=2"], "training.dynamic_sampling", "at least 2"),
        ("grpo", ["training.batch_size=12"], "training.batch_size", "a multiple of responses_per_prompt (8)"),
        (
            "grpo",
            ["training.curriculum={}", "rollout.engine=ray", "rollout.max_staleness=1"],
            "training.curriculum",
            "max_staleness 0",
        ),
        ("grpo", ["training.curriculum.floor=0"], "training.curriculum.floor", "> 0"),
        ("grpo", ["generation.overlong_buffer=2"], "generation.overlong_buffer", "<= 1"),
    ],
)
def test_each_mistake_is_one_diagnostic(
    method: str, overrides: list[str], field: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, method, *overrides)
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.field == field
    assert expected in diagnostic.expected


@pytest.mark.parametrize(
    ("method", "overrides", "noted"),
    [
        ("grpo", ["training.gae_lambda=0.5"], ["training.gae_lambda"]),
        ("grpo", ["training.kl_estimator=k2"], ["training.kl_estimator"]),
        ("grpo", ["training.kl_coefficient=0.1", "training.kl_estimator=k2"], []),
        ("grpo", ["generation.overlong_penalty=2"], ["generation.overlong_penalty"]),
        ("reinforce_pp", ["training.advantage_scale=batch"], ["training.advantage_scale"]),
        ("grpo", ["evaluation.responses=4"], ["evaluation.responses"]),
    ],
)
def test_keys_without_effect_are_noted(method: str, overrides: list[str], noted: list[str], tmp_path: Path) -> None:
    assert [note.split()[0] for note in loaded(tmp_path, method, *overrides).notes] == noted
