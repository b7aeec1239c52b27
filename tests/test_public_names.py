"""The public names are these, and importing the package imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import loopos


def test_the_public_names_are_pinned() -> None:
    trained = ["ChainOfThought", "ChainOfThoughtConfig", "FineTuner", "FineTuningConfig", "PpoConfig", "PpoTrainer"]
    asked = ["Predictor", "Reasoner"]
    human = ["ReinforcementTrainer", "RewardModelConfig", "RewardModelTrainer", "RewardPredictor", "RlhfConfig"]
    classes = [*trained, *asked, *human]
    assert loopos.__all__ == [*classes, "__version__", "load", "read_config"]
    assert all(getattr(loopos, name) is not None for name in loopos.__all__)


def test_the_version_is_the_package_s() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert loopos.__version__ == pyproject["project"]["version"]


def test_import_is_light() -> None:
    program = (
        "import sys, loopos; dir(loopos); print([n for n in ('torch', 'pydantic', 'transformers') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        loopos.Trainer  # noqa: B018


def test_a_config_is_read_with_overrides(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": 0}\n')
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps(
            {
                "computation": {"mode": "posttraining", "method": "fine_tuning"},
                "training": {"learning_rate": 0.1},
                "data": {
                    "pretrained_weights": "smollm2-135m",
                    "training_data": str(rows),
                    "output_dir": str(tmp_path / "run"),
                },
            }
        )
    )
    config = loopos.read_config(path, ["training.learning_rate=0.5"])
    assert isinstance(config, loopos.FineTuningConfig)
    assert config.training.learning_rate == 0.5
