"""Learning rates outside the usual range give a note that names the range; usual ones give none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.learning_rates import DESTRUCTIVE_RATES, OTHER_OPTIMIZERS, USUAL_RATES
from loopos.config.load import load
from loopos.config.methods import config_classes

ROOT = Path(__file__).parents[2]


def rate_notes(method: str, also: dict[str, Any] | None = None, **training: Any) -> list[str]:
    """The notes on learning rates of a config of this method."""
    mode = "pretraining" if method == "autoregressive" else "posttraining"
    data: dict[str, Any] = {"pretrained_weights": "smollm2-135m", "training_data": "rows.jsonl", "output_dir": "out"}
    data |= also or {}
    config: dict[str, Any] = {"computation": {"mode": mode, "method": method}, "training": training, "data": data}
    if method == "ppo":
        data["reward_model"] = "judge"
    if method == "autoregressive":
        del data["pretrained_weights"]
        config["model"] = {"d_model": 64, "num_heads": 4, "num_layers": 2, "d_ff": 128, "vocab_size": 1000}
    notes = load(config, [], config_classes(), check_files=False).notes
    return [note for note in notes if "usual range" in note]


# (method, what trains, its range)
RANGES = [
    ("fine_tuning", {}, (1e-6, 1e-3)),
    ("fine_tuning", {"trainable": "lora"}, (1e-5, 2e-3)),
    ("fine_tuning", {"trainable": "head"}, (1e-4, 1e-2)),
    ("fine_tuning", {"optimizer": "sgd"}, (1e-4, 1.0)),
    ("sft", {}, (1e-6, 1e-3)),
    ("sft", {"optimizer": "muon"}, (1e-4, 0.1)),
    ("chain_of_thought", {"trainable": "lora"}, (1e-5, 2e-3)),
    ("reward_model", {}, (1e-6, 1e-4)),
    ("reward_model", {"trainable": "lora"}, (1e-5, 2e-3)),
    ("ppo", {}, (1e-7, 1e-4)),
    ("ppo", {"trainable": "lora"}, (1e-6, 1e-3)),
    # 64 features: eight times the rate of 512.
    ("autoregressive", {}, (1e-5, 8e-2)),
]


@pytest.mark.parametrize(("method", "training", "usual"), RANGES, ids=str)
def test_the_ends_of_the_usual_range_give_no_note_and_beyond_them_one(
    method: str, training: dict[str, Any], usual: tuple[float, float]
) -> None:
    low, high = usual
    assert [rate_notes(method, **training, learning_rate=rate) for rate in usual] == [[], []]
    (below,) = rate_notes(method, **training, learning_rate=low * 0.9)
    assert below.startswith(f"training.learning_rate {low * 0.9:g} is below the usual range for ")
    assert f"({low:g} to {high:g})" in below
    (above,) = rate_notes(method, **training, learning_rate=high * 1.1)
    assert above.startswith(f"training.learning_rate {high * 1.1:g} is above the usual range for ")


def test_a_head_s_own_rate_has_the_range_of_a_head() -> None:
    assert rate_notes("fine_tuning", learning_rate=1e-5, head_learning_rate=1e-3) == []
    (note,) = rate_notes("fine_tuning", learning_rate=1e-5, head_learning_rate=1e-5)
    assert note.startswith(
        "training.head_learning_rate 1e-05 is below the usual range for a head with adamw (0.0001 to 0.01)"
    )
    # Only the head trains: the other rate is not used.
    assert rate_notes("fine_tuning", learning_rate=1e-9, head_learning_rate=1e-3, trainable="head") == []


def test_the_value_model_has_its_own_range() -> None:
    assert rate_notes("ppo", learning_rate=1e-6, value_learning_rate=5e-4) == []
    (note,) = rate_notes("ppo", learning_rate=1e-6, value_learning_rate=0.01)
    assert note.startswith("training.value_learning_rate 0.01 is above")


def test_a_narrow_model_takes_a_higher_rate(tmp_path: Path) -> None:
    def notes(width: int, rate: float) -> list[str]:
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": width}))
        return rate_notes("sft", {"pretrained_weights": str(tmp_path)}, learning_rate=rate)

    assert [len(notes(width, 0.002)) for width in (256, 257, 1024)] == [0, 1, 1]
    assert "(1e-06 to 0.001)" in notes(1024, 0.002)[0]
    assert "(1e-06 to 0.002)" in notes(256, 0.003)[0]
    assert notes(16, 1e-7)[0].startswith("training.learning_rate 1e-07 is below")


@pytest.mark.parametrize("optimizer", DESTRUCTIVE_RATES)
def test_a_rate_that_destroys_the_weights_is_told_so(optimizer: str) -> None:
    rate = 1.1 * DESTRUCTIVE_RATES[optimizer]
    (note,) = rate_notes("fine_tuning", learning_rate=rate, optimizer=optimizer)
    assert "is far above" in note
    assert "the weights will very likely be destroyed" in note


def test_every_range_is_one_and_ends_below_what_destroys() -> None:
    assert len(USUAL_RATES) >= 9
    for low, high in (*USUAL_RATES.values(), *OTHER_OPTIMIZERS.values()):
        assert 0 < low < high
    assert max(high for _, high in USUAL_RATES.values()) < DESTRUCTIVE_RATES["adamw"]
    assert all(high < DESTRUCTIVE_RATES[name] for name, (_, high) in OTHER_OPTIMIZERS.items())


CONFIGS = sorted([*(ROOT / "configs").rglob("*.json"), *(ROOT / "src" / "loopos" / "demo").glob("*.json")])


def test_there_are_configs_to_look_at() -> None:
    assert len(CONFIGS) >= 9


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_repository_s_own_configs_have_usual_rates(file: Path) -> None:
    if "computation" in json.loads(file.read_text(encoding="utf-8")):
        notes = load(str(file), [], config_classes(), check_files=False).notes
        assert [note for note in notes if "usual range" in note] == []
