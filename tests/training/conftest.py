"""Fixtures of the training tests: a short run with one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pico_runs import class_rows, config_of, train

from loopos.training.fit import FitResult


@pytest.fixture
def run(tmp_path: Path, pico_folder: Path) -> Callable[..., tuple[FitResult, Path]]:
    """Trains on 40 rows, 8 per step: 5 steps per epoch, 2 epochs; validates on 8 more rows."""

    def go(name: str = "run", *, resume: bool = False, model: Any = None, **training: Any) -> tuple[FitResult, Path]:
        settings = {"learning_rate": 0.003, **training}
        config = config_of(
            tmp_path / name,
            pico_folder,
            class_rows(48),
            training=settings,
            model=model,
            data={"validation_share": 1 / 6},
        )
        return train(config, resume=resume), tmp_path / name

    return go
