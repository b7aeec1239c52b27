"""The machine, as systems differ."""

from __future__ import annotations

import os

import pytest

from loopos.config.machine import usable_cores


def test_cores_where_the_system_does_not_say_which_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    # macOS and Windows have no such function.
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_cores_that_the_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert usable_cores() == 3
