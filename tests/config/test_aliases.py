"""Old names of keys are read with a note, recorded settings too; keys that do nothing are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.aliases import IGNORED_KEYS, RENAMED_KEYS, current_key, current_settings
from loopos.config.diagnostics import ConfigError
from loopos.config.differences import changes
from loopos.config.keys import section_class
from loopos.config.load import LoadedConfig, load
from loopos.config.methods import config_classes

VALUES = {
    "reward.centring": ("reward_model", 0.25),
    "reward.normalise": ("reward_model", False),
    "reward.normalise_over": ("reward_model", 7),
    "guards.end_share_drop": ("ppo", 0.5),
    "self_improvement.rationalise": ("chain_of_thought", True),
}
SOURCES = {"reward_model": "preference_data", "rlhf": "preference_data", "ppo": "prompts"}


def written(method: str, **sections: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "pretrained_weights": "smollm2-135m",
        SOURCES.get(method, "training_data"): "rows.jsonl",
        "output_dir": "out",
    }
    if method == "ppo":
        data["reward_model"] = "judge"
    return {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 1e-5},
        "data": data,
        **sections,
    }


def loaded(config: dict[str, Any], overrides: tuple[str, ...] = ()) -> LoadedConfig:
    return load(config, overrides, config_classes(), check_files=False)


def test_every_old_key_has_a_value_here() -> None:
    assert VALUES.keys() == RENAMED_KEYS.keys()


@pytest.mark.parametrize("old", VALUES)
def test_an_old_key_sets_the_new_one_and_a_note_names_it(old: str) -> None:
    (method, value), new = VALUES[old], RENAMED_KEYS[old]
    (section, key), name = old.split("."), new.split(".")[1]
    more = {"rounds": 1} if section == "self_improvement" else {}
    found = loaded(written(method, **{section: {key: value, **more}}))
    assert getattr(getattr(found.config, section), name) == value
    assert f"{old} is now {new}; the old name still works" in found.notes
    assert not [note for note in loaded(written(method, **{section: {name: value, **more}})).notes if old in note]


def test_of_both_names_the_command_line_wins_and_two_values_are_a_fault(tmp_path: Path) -> None:
    both = written("reward_model", reward={"centring": 0.5, "center_rewards": 0.5})
    assert loaded(both).config.model_dump()["reward"]["center_rewards"] == 0.5
    for override in ("reward.centring=0.125", "reward.center_rewards=0.125"):
        config = written("reward_model", reward={"centring": 0.5})
        assert loaded(config, (override,)).config.model_dump()["reward"]["center_rewards"] == 0.125
    file = tmp_path / "run.json"
    file.write_text(json.dumps(written("reward_model", reward={"centring": 0.5, "center_rewards": 0.25}), indent=1))
    with pytest.raises(ConfigError) as raised:
        load(str(file), [], config_classes(), check_files=False)
    (diagnostic,) = raised.value.diagnostics
    assert (diagnostic.field, diagnostic.actual) == ("reward.centring", "0.5, but reward.center_rewards is 0.25")
    assert diagnostic.line == file.read_text().splitlines().index('  "centring": 0.5,') + 1


def test_a_wrong_value_is_reported_under_the_name_that_was_written() -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(written("reward_model", reward={"normalise_over": 0}))
    assert [(each.field, each.expected) for each in raised.value.diagnostics] == [
        ("reward.normalise_over", "a whole number >= 1")
    ]


def test_an_old_key_of_another_method_stays_unknown() -> None:
    with pytest.raises(ConfigError, match=r"the unknown key \"centring\""):
        loaded(written("ppo", reward={"centring": 0.5}))


@pytest.mark.parametrize("section", ["training", "data", "reward_training"])
def test_keys_that_do_nothing_are_accepted_with_a_note(section: str) -> None:
    config = written("rlhf", reward_training={"learning_rate": 1e-5})
    for key in ("num_workers", "prefetch_batches"):
        config[section][key] = 3
    found = loaded(config)
    expected = [f"{key} has no effect: {reason}" for key, reason in IGNORED_KEYS.items() if key.startswith(section)]
    assert len(expected) == 2
    assert found.notes == expected
    assert "num_workers" not in json.dumps(found.config.model_dump())


def test_no_method_knows_an_old_name() -> None:
    classes = list(config_classes().values())
    fields = [(name, field) for each in classes for name, field in each.model_fields.items()]
    assert len(classes) >= 7
    for key in (*RENAMED_KEYS, *IGNORED_KEYS):
        section, name = key.split(".")
        for found in (section_class(field) for other, field in fields if other == section):
            assert found is not None
            assert name not in found.model_fields


def test_recorded_settings_are_compared_under_the_names_of_today() -> None:
    old = {
        "reward": {"centring": 0.0, "normalise": True},
        "training": {"num_workers": 0, "batch_size": 4},
        "guards": None,
    }
    new = {"reward": {"center_rewards": 0.1, "normalize": True}, "training": {"batch_size": 4}, "guards": None}
    assert changes(current_settings(old), new) == {"reward.center_rewards": (0.0, 0.1)}
    assert current_settings({"reward": {"centring": 1, "center_rewards": 2}}) == {"reward": {"center_rewards": 2}}
    assert (current_key("reward.normalise"), current_key("reward.heads")) == ("reward.normalize", "reward.heads")
    assert old["reward"] == {"centring": 0.0, "normalise": True}
