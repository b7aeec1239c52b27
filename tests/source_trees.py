"""Shared by the tests that read the package's source: syntax trees, read once."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def uncollected() -> Iterator[None]:
    """Trees have no cycles to look for, and so many objects that the collector takes most of the time."""
    gc.disable()
    yield
    gc.enable()


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
