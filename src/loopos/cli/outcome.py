"""How a command ends: the one place where errors become messages and exit codes.

Enters: what a command raises. Leaves: a few lines on standard error and the exit code: the error's own for a
`UserError` (2 for a mistake in config or data, 1 for a machine that lacks something, 74 for a full disk), 74 for any
other error of the file system, 1 when memory ran out, 130 for Ctrl-C. A reader that went away (a closed pipe) ends
quietly. Any other exception is our bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from loopos.config.faults import UserError
from loopos.storage.durable import StorageFault, is_of_files, told_of

INTERRUPTED = 130
# 128 + 13: what a shell reports of a program that SIGPIPE ended.
CLOSED_PIPE = 141
OUT_OF_MEMORY_ADVICE = (
    "lower training.batch_size (and raise training.gradient_accumulation by the same factor: the result stays), lower "
    "training.max_length, set training.gradient_checkpointing=true or training.trainable=lora; "
    "loopos train CONFIG --dry-run estimates the memory"
)
_OUT_OF_MEMORY_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


class Commands(TyperGroup):
    """A group of commands."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help, false when absent: typer imports pydantic to read the None that it is otherwise."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; turns its errors into an exit code."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            # Without words where another process of the run has told the reason.
            if str(error):
                complain(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # What is still in the buffer has no reader: the interpreter must not try to write it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(CLOSED_PIPE) from None
        except OSError as error:
            if not is_of_files(error):
                raise
            complain(told_of(error))
            raise typer.Exit(StorageFault.exit_code) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            first = (str(error).splitlines() or [""])[0]
            complain(f"out of memory{f': {first}' if first else ''}\n{OUT_OF_MEMORY_ADVICE}")
            raise typer.Exit(1) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the CPU's or an accelerator's. torch's errors are told by name and words, so
    that torch need not be imported.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY_SIGNS)


def complain(text: str) -> None:
    """`text` on standard error, in red on a terminal."""
    typer.secho(text, err=True, fg=typer.colors.RED if sys.stderr.isatty() and "NO_COLOR" not in os.environ else None)


def note(text: str) -> None:
    """`text` on standard error: what a person should know, and a script that reads the answer should not meet."""
    typer.echo(text, err=True)
