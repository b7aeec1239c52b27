"""Turns errors into messages and exit codes, for all commands. Messages name settings as the command does: by its own
options, if it has them, else by config keys.

A `UserError` has its own exit code (2 for a mistake in config or data, 1 for a machine that lacks something, 74 for a
full disk). Other file system errors: 74; out of memory: 1; Ctrl-C: 130; other signals: as in `Interrupted`. A closed
pipe ends quietly. Any other exception is a bug of LoopOS and keeps its traceback.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from loopos.config.diagnostics import IN_CONFIG, Interrupted, Remedy, UserError, Wording, printable
from loopos.storage.durable import StorageError, describe_os_error, is_of_files

INTERRUPTED = 130
# 128 + 13: the exit code that a shell reports for a program killed by SIGPIPE.
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
        """The option --help with default False: otherwise typer imports pydantic to read the default None."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def _wording(self, name: str | None) -> Wording:
        """How the command `name` names settings."""
        return wording_of(*self._names_of(name))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` start with. Raises `UserError` for a config key that is written as an option."""
        resolved = super().resolve_command(ctx, args)
        refuse_keys_as_options(args[1:], *self._names_of(args[0]))
        return resolved

    def _names_of(self, name: str | None) -> tuple[list[str], list[str]]:
        """The options of a command, as written, and the names of its arguments."""
        command = self.commands.get(name) if name is not None else None
        parameters = command.params if command is not None else []
        options = [option for each in parameters for option in (*each.opts, *each.secondary_opts)]
        return [*options, "--help"], [each.name for each in parameters if each.name is not None]

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; turns its errors into an exit code."""
        _take_any_text()
        try:
            return super().invoke(ctx)
        except UserError as error:
            message = error.message(self._wording(ctx.invoked_subcommand))
            # Empty if another process of the run has reported the reason.
            if message:
                complain(message)
            raise typer.Exit(error.exit_code) from None
        except Interrupted as ended:
            complain(str(ended))
            raise typer.Exit(ended.exit_code) from None
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The buffer has no reader any more: the interpreter must not try to flush it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(CLOSED_PIPE) from None
        except OSError as error:
            if not is_of_files(error):
                raise
            complain(describe_os_error(error))
            raise typer.Exit(StorageError.exit_code) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            first = (str(error).splitlines() or [""])[0]
            complain(f"out of memory{f': {first}' if first else ''}\n{OUT_OF_MEMORY_ADVICE}")
            raise typer.Exit(1) from None


def _take_any_text() -> None:
    """Escapes characters that the terminal's encoding lacks on standard output, as Python does on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the CPU's or an accelerator's. torch's errors are recognized by name and text,
    so that torch need not be imported.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY_SIGNS)


def complain(text: str) -> None:
    """Prints `text` to standard error, in red on a terminal."""
    typer.secho(
        printable(text), err=True, fg=typer.colors.RED if sys.stderr.isatty() and "NO_COLOR" not in os.environ else None
    )


def note(text: str) -> None:
    """Prints `text` to standard error: information for people, not for scripts that read standard output."""
    typer.echo(printable(text), err=True)


COLUMNS, ENCODING, SKIP_BAD_ROWS = "--columns", "--encoding", "--skip-bad-rows"
_ARGUMENTS = frozenset({"data.pretrained_weights", "data.training_data"})
"""Keys that are positional arguments of commands without a config: messages need not name them."""
_OPTIONS = {
    "data.columns": COLUMNS,
    "data.encoding": ENCODING,
    "data.on_bad_row": SKIP_BAD_ROWS,
    "training.device": "--device",
    "training.precision": "--precision",
    "data.output_dir": "--output",
}
_SWITCHES = frozenset({SKIP_BAD_ROWS})
_TAKES_KEYS = "overrides"


class OptionWording(Wording):
    """Names settings by the options of a command that reads no config. options: those the command has."""

    def __init__(self, options: Collection[str]) -> None:
        self.options = frozenset(options)

    def field(self, key: str) -> str:
        if key in _ARGUMENTS:
            return ""
        return self._option(key) or key

    def remedy(self, remedy: Remedy) -> str:
        parts = []
        for key, value in remedy.settings:
            option = self._option(key)
            if option is None:
                return ""
            if option == COLUMNS:
                value = f"{key.removeprefix('data.columns.')}={value}"
            parts.append(option if option in _SWITCHES else f"{option} {_quoted(value)}")
        return f"{remedy.lead}: {' '.join(parts)}"

    def _option(self, key: str) -> str | None:
        option = _OPTIONS.get("data.columns" if key.startswith("data.columns.") else key)
        return option if option in self.options else None


def wording_of(options: Collection[str], arguments: Collection[str]) -> Wording:
    """The wording of a command with these options and arguments: a command that takes config keys names keys."""
    return IN_CONFIG if _TAKES_KEYS in arguments else OptionWording(options)


def refuse_keys_as_options(tokens: Sequence[str], options: Collection[str], arguments: Collection[str]) -> None:
    """Raises `UserError` for an argument such as `--lr` that is no option of the command but means a config key."""
    if _TAKES_KEYS not in arguments:
        return
    meant = []
    for index, token in enumerate(tokens):
        if token == "--":
            break
        name, equals, value = token.partition("=")
        if not token.startswith("-") or name in options:
            continue
        key = _key_of(name)
        if key is not None:
            following = tokens[index + 1] if index + 1 < len(tokens) and not tokens[index + 1].startswith("-") else ""
            meant.append((name, f"{key}={value if equals else following or 'VALUE'}"))
    if meant:
        names = ", ".join(name for name, _ in meant)
        raise UserError(
            f"no option {names}: config settings are written as key=value\n    "
            f"write {' '.join(_quoted(setting) for _, setting in meant)}"
        )


def _key_of(option: str) -> str | None:
    """The dotted key that an option such as `--lr`, `--batch-size` or `--training.seed` means."""
    from loopos.config.methods import config_classes
    from loopos.config.other_tools import OTHER_KEYS

    name = option.lstrip("-").replace("-", "_")
    keys: dict[str, str] = {}
    for config_class in config_classes().values():
        for section, field in config_class.model_fields.items():
            for key in getattr(field.annotation, "model_fields", {}):
                keys.setdefault(f"{section}.{key}", f"{section}.{key}")
                keys.setdefault(key, f"{section}.{key}")
    section, dot, key = name.rpartition(".")
    return keys.get(name) or OTHER_KEYS.get(key if dot else name)


def _quoted(text: str) -> str:
    """`text` quoted for a shell; in double quotes if they suffice, because these work in every shell."""
    if shlex.quote(text) == text:
        return text
    return shlex.quote(text) if set(text) & set('"$`\\!') else json.dumps(text, ensure_ascii=False)
