"""A text that models of the deployment rooms read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.conftest import SENTENCES


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Forty paragraphs of a few sentences each."""
    draw = random.Random(0)
    file = tmp_path / "text.md"
    file.write_text("\n\n".join(" ".join(draw.choices(SENTENCES, k=4)) for _ in range(40)), encoding="utf-8")
    return file
