"""Folders of runs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder of runs."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder
