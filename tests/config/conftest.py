"""A valid config in a folder of its own, and `diagnostics_in`, which loads a text there and returns its diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from loopos.config.diagnostics import ConfigError, Diagnostic
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.load import LoadedConfig, load

GOOD = """{
  "model": {
    "type": "transformer",
    "d_model": 384,
    "num_heads": 8,
    "num_layers": 4,
    "d_ff": 1536,
    "vocab_size": 16000,
    "num_classes": 10
  },
  "computation": {
    "mode": "posttraining",
    "method": "fine_tuning"
  },
  "training": {
    "learning_rate": 0.00001,
    "batch_size": 16,
    "num_epochs": 5
  },
  "data": {
    "pretrained_weights": "smollm2-135m",
    "training_data": "rows.jsonl",
    "output_dir": "outputs/run"
  }
}
"""


@pytest.fixture(scope="session")
def good() -> str:
    """The text of a valid config; its `training_data` is in every `folder`."""
    return GOOD


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own current directory that holds the rows of `good`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "where is my parcel", "label": "order_status"}\n')
    return tmp_path


@pytest.fixture
def load_text(folder: Path) -> Callable[..., LoadedConfig]:
    """`load_text(text, overrides, name)`: what `load` makes of a file with that text."""

    def loaded(text: str, overrides: Sequence[str] = (), name: str = "run.json") -> LoadedConfig:
        (folder / name).write_bytes(text.encode())
        return load(name, overrides, {("posttraining", "fine_tuning"): FineTuningConfig})

    return loaded


@pytest.fixture
def diagnostics_in(load_text: Callable[..., LoadedConfig]) -> Callable[..., tuple[Diagnostic, ...]]:
    """`diagnostics_in(text, overrides, name)`: the diagnostics of a file with that text, none if it is valid."""

    def diagnostics(text: str, overrides: Sequence[str] = (), name: str = "run.json") -> tuple[Diagnostic, ...]:
        try:
            load_text(text, overrides, name)
        except ConfigError as error:
            return error.diagnostics
        return ()

    return diagnostics
