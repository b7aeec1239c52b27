"""Diagnostics as text, and the exit codes of errors."""

from __future__ import annotations

from loopos.config.diagnostics import ConfigError, DataError, Diagnostic, MissingRequirement, UserError


def test_a_diagnostic_is_location_field_actual_expected_and_hint() -> None:
    diagnostic = Diagnostic("a.json", 3, 7, "training.batch_size", "0", "a whole number >= 1", "write 16")
    assert str(diagnostic) == "a.json:3:7: training.batch_size: got 0; expected a whole number >= 1\n    write 16"


def test_unknown_locations_and_fields_are_left_out() -> None:
    assert str(Diagnostic("command line", None, None, "a.b", "1", "2")) == "command line: a.b: got 1; expected 2"
    assert str(Diagnostic("rows.jsonl", 4, None, "", "nothing", "a row")) == "rows.jsonl:4: got nothing; expected a row"


def test_what_no_terminal_prints_is_escaped() -> None:
    text = str(Diagnostic("a", None, None, "b", "\x1b[31m\ud800\0é", "c"))
    assert text == "a: b: got \\x1b[31m\\ud800\\x00é; expected c"
    assert text.encode("utf-8")


def test_errors_keep_their_diagnostics_and_list_fifty() -> None:
    diagnostics = [Diagnostic("a", line, None, "f", "g", "w") for line in range(1, 61)]
    for error in (ConfigError(diagnostics), DataError(diagnostics)):
        assert error.diagnostics == tuple(diagnostics)
        lines = str(error).splitlines()
        assert (len(lines), lines[0], lines[-1]) == (51, "a:1: f: got g; expected w", "... and 10 more")
    assert str(ConfigError(diagnostics[:2])).count("\n") == 1


def test_exit_codes() -> None:
    assert (UserError("x").exit_code, MissingRequirement("x").exit_code) == (2, 1)
    assert str(MissingRequirement("install loopos[track]")) == "install loopos[track]"
    assert issubclass(ConfigError, UserError)
    assert issubclass(DataError, UserError)
    assert issubclass(MissingRequirement, UserError)
