"""The restart with process settings: when it happens, what it sets, and that it happens once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from loopos.cli import process
from loopos.cli.process import MEMORY_SETTINGS, OPT_OUT, RESTARTED, process_settings, settings_in_force, should_restart

on_glibc = pytest.mark.skipif(not process.is_glibc(), reason="the settings are glibc's")


def test_all_settings_are_expected_in_an_empty_environment() -> None:
    assert process_settings({}) == {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "8589934592",
        "MALLOC_TOP_PAD_": "268435456",
        "OMP_PROC_BIND": "close",
    }


def test_user_settings_are_unchanged() -> None:
    expected = process_settings({"MALLOC_TOP_PAD_": "0", "OMP_PROC_BIND": "false"})
    assert set(expected) == {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}


def test_threads_are_not_bound_beside_other_ranks() -> None:
    assert set(process_settings({"WORLD_SIZE": "2"})) == set(MEMORY_SETTINGS)
    assert set(process_settings({}, binds_threads=False)) == set(MEMORY_SETTINGS)


def test_threads_are_not_bound_where_others_may_use_the_first_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "usable_cores", lambda: 4)
    bound = {number: "OMP_PROC_BIND" in process_settings({"OMP_NUM_THREADS": number}) for number in ("1", "3", "4", "")}
    assert bound == {"1": False, "3": False, "4": True, "": True}


@on_glibc
def test_a_process_without_the_settings_restarts() -> None:
    assert should_restart({})
    assert should_restart({"OMP_PROC_BIND": "spread"})


@on_glibc
@pytest.mark.parametrize(
    "environment", [{RESTARTED: ""}, {OPT_OUT: "1"}, {**MEMORY_SETTINGS, "OMP_PROC_BIND": "spread"}]
)
def test_no_restart(environment: dict[str, str]) -> None:
    assert not should_restart(environment)


@on_glibc
def test_opting_out_with_0_is_no_opting_out() -> None:
    assert should_restart({OPT_OUT: "0"})


def test_a_test_runner_is_not_the_command_line() -> None:
    assert not process.is_own_process()


def test_settings_in_force_show_values_and_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process.REPORTED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "7")
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv(RESTARTED, "OMP_PROC_BIND")
    assert settings_in_force() == {"MALLOC_TOP_PAD_": "7", "OMP_PROC_BIND": "close", "set_by_loopos": "OMP_PROC_BIND"}


@on_glibc
def test_the_process_restarts_once_with_the_settings() -> None:
    program = (
        "import json, os, sys\n"
        "import loopos.cli.process as process\n"
        "process.is_own_process = lambda: True\n"
        "process.restart_with_settings()\n"
        "print(json.dumps([os.getpid(), process.settings_in_force(), sys.argv[1:]]))\n"
    )
    hidden = {*process.REPORTED, RESTARTED, OPT_OUT, "WORLD_SIZE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    started = subprocess.Popen(
        [sys.executable, "-c", program, "train", "run.json"], env=environment, stdout=subprocess.PIPE, text=True
    )
    output, _ = started.communicate(timeout=60)
    pid, settings, arguments = json.loads(output)
    assert pid == started.pid
    assert arguments == ["train", "run.json"]
    assert settings == {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "8589934592",
        "MALLOC_TOP_PAD_": "268435456",
        "OMP_PROC_BIND": "close",
        "set_by_loopos": "MALLOC_MMAP_THRESHOLD_,MALLOC_TRIM_THRESHOLD_,MALLOC_TOP_PAD_,OMP_PROC_BIND",
    }
