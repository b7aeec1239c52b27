"""Faults as text, and the exit codes of errors."""

from __future__ import annotations

from loopos.config.diagnostics import ConfigError, DataError, EnvironmentFault, Fault, UserError


def test_a_fault_is_place_field_given_wanted_and_hint() -> None:
    fault = Fault("a.json", 3, 7, "training.batch_size", "0", "a whole number >= 1", "write 16")
    assert str(fault) == "a.json:3:7: training.batch_size: given 0; wanted a whole number >= 1\n    write 16"


def test_unknown_places_and_fields_are_left_out() -> None:
    assert str(Fault("command line", None, None, "a.b", "1", "2")) == "command line: a.b: given 1; wanted 2"
    assert str(Fault("rows.jsonl", 4, None, "", "nothing", "a row")) == "rows.jsonl:4: given nothing; wanted a row"


def test_what_no_terminal_prints_is_escaped() -> None:
    text = str(Fault("a", None, None, "b", "\x1b[31m\ud800\0é", "c"))
    assert text == "a: b: given \\x1b[31m\\ud800\\x00é; wanted c"
    assert text.encode("utf-8")


def test_errors_keep_their_faults_and_list_fifty() -> None:
    faults = [Fault("a", line, None, "f", "g", "w") for line in range(1, 61)]
    for error in (ConfigError(faults), DataError(faults)):
        assert error.faults == tuple(faults)
        lines = str(error).splitlines()
        assert (len(lines), lines[0], lines[-1]) == (51, "a:1: f: given g; wanted w", "... and 10 more")
    assert str(ConfigError(faults[:2])).count("\n") == 1


def test_exit_codes() -> None:
    assert (UserError("x").exit_code, EnvironmentFault("x").exit_code) == (2, 1)
    assert str(EnvironmentFault("install loopos[track]")) == "install loopos[track]"
    assert issubclass(ConfigError, UserError)
    assert issubclass(DataError, UserError)
    assert issubclass(EnvironmentFault, UserError)
