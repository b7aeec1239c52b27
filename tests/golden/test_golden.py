"""The numbers, texts and files of every method stay what they were when `values.json` was recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.golden.record import record

pytestmark = pytest.mark.slow
RELATIVE, ABSOLUTE = 2e-4, 1e-5


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of a value, by its path; JSON lines within a text are read too."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from leaves(each, f"{key}/{name}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from leaves(each, f"{key}/{index}")
    elif isinstance(value, str) and value.startswith("{"):
        yield from leaves([json.loads(line) for line in value.splitlines()], key)
    else:
        yield key, value


def test_every_method_gives_its_recorded_values(tmp_path: Path) -> None:
    recorded = json.loads((Path(__file__).parent / "values.json").read_text(encoding="utf-8"))
    found = record(tmp_path / "runs")
    # Bytes of weights depend on the processor's rounding: their names are compared here, the bytes by record.py.
    for each in (recorded, found):
        for key in [key for key in each if key.endswith(" files")]:
            each[key] = sorted(each[key])
    expected = dict(leaves(recorded))
    assert len(expected) > 1000
    got = dict(leaves(found))
    assert got.keys() == expected.keys()
    off = {
        key: (value, got[key])
        for key, value in expected.items()
        if (got[key] != pytest.approx(value, rel=RELATIVE, abs=ABSOLUTE) if _is_number(value) else got[key] != value)
    }
    assert off == {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
