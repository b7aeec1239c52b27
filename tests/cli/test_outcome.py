"""Every way in which a command can end has its own exit code and message."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loopos.cli.outcome import Commands, is_out_of_memory
from loopos.config.diagnostics import ConfigError, Diagnostic, MissingRequirement, UserError


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def ending_in(error: BaseException) -> Any:
    """What a command that raises `error` leaves."""
    app = typer.Typer(cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def fails() -> None:
        raise error

    @app.command()
    def other() -> None: ...

    return CliRunner().invoke(app, ["fails"])


def test_a_diagnostic_is_shown_with_its_location_and_code_2() -> None:
    result = ending_in(ConfigError([Diagnostic("run.json", 3, 7, "training.seed", '"x"', "a whole number")]))
    assert result.exit_code == 2
    assert result.stderr == 'run.json:3:7: training.seed: got "x"; expected a whole number\n'
    assert result.stdout == ""


def test_an_error_gives_its_own_code() -> None:
    class DiskFull(UserError):
        exit_code = 74

    assert ending_in(DiskFull("full")).exit_code == 74
    assert ending_in(MissingRequirement("no gguf")).exit_code == 1


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EIO, "Input/output error"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
        (errno.ENOTDIR, "Not a directory"),
        (errno.EISDIR, "Is a directory"),
        (errno.ENAMETOOLONG, "File name too long"),
        (errno.ESTALE, "Stale file handle"),
        (errno.ENOSPC, "No space left on device"),
    ],
)
def test_an_error_of_the_file_system_is_one_line_with_its_file(number: int, reason: str) -> None:
    result = ending_in(OSError(number, os.strerror(number), "outputs/run/file"))
    assert (result.exit_code, result.stderr) == (74, f"outputs/run/file: {reason}\n")


def test_an_error_of_a_network_is_no_error_of_a_file() -> None:
    error = ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    assert ending_in(error).exception is error


def test_interrupted_ends_with_130() -> None:
    result = ending_in(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory_says_what_to_lower(error: BaseException) -> None:
    result = ending_in(error)
    assert result.exit_code == 1
    assert result.stderr.startswith("out of memory")
    assert "training.batch_size" in result.stderr
    assert len(result.stderr.splitlines()) <= 3


def test_another_error_of_torch_is_not_called_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_our_own_bug_keeps_its_traceback() -> None:
    result = ending_in(AssertionError("a bug"))
    assert isinstance(result.exception, AssertionError)


def test_a_reader_that_went_away_is_no_error() -> None:
    """The command prints without end; its reader takes one line and closes the pipe."""
    program = (
        "import typer\n"
        "from loopos.cli.outcome import Commands\n"
        "app = typer.Typer(cls=Commands, rich_markup_mode=None)\n"
        "@app.command()\n"
        "def talk():\n"
        "    while True: print('line ' * 100)\n"
        "@app.command()\n"
        "def other(): ...\n"
        "app(['talk'])\n"
    )
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None
    assert started.stderr is not None
    assert started.stdout.readline().startswith(b"line")
    started.stdout.close()
    complaint = started.stderr.read()
    started.stderr.close()
    assert started.wait(timeout=60) == 141
    assert complaint == b""
