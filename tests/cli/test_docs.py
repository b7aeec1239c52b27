"""Help and docs/cli.md list every command and every option."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from loopos.cli import process
from loopos.cli.commands import DATA, LOOPOS, RUNS, STUDY, Command, app
from tests.cli.conftest import Invoke

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def commands(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*above, name))
        else:
            yield (*above, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def options(command: Any) -> list[str]:
    return [
        name
        for parameter in command.params
        for name in [*parameter.opts, *parameter.secondary_opts]
        if name.startswith("-")
    ]


def section(command: tuple[str, ...]) -> str:
    """The part of the docs under the command's heading."""
    heading = f"## loopos {' '.join(command)}\n"
    assert heading in DOCS, f"docs/cli.md has no section {heading.strip()!r}"
    return DOCS.split(heading, 1)[1].split("\n## ", 1)[0]


def test_the_commands_are_these() -> None:
    assert {" ".join(name) for name in COMMANDS} == {
        *(
            "train",
            "validate",
            "list",
            "schema",
            "predict",
            "evaluate",
            "score",
            "data check",
            "data preview",
            "rl check",
            "rl audit",
        ),
        *(
            "runs list",
            "runs show",
            "runs diff",
            "runs report",
            "study new",
            "study add",
            "study show",
            "study vote",
            "study export",
            "doctor",
            "demo",
            "generate",
            "chat",
            "serve",
            "ui",
            "merge",
            "prune",
        ),
        *("export", "ensemble", "winrate", "sample", "quantize", "plan"),
    }


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_lists_and_explains_every_option(command: tuple[str, ...], invoke: Invoke) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    for parameter in COMMANDS[command].params:
        assert parameter.help, parameter.name
    for name in options(COMMANDS[command]):
        assert name in result.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_docs_list_every_option(command: tuple[str, ...]) -> None:
    text = section(command)
    missing = [name for name in options(COMMANDS[command]) if f"`{name}" not in text and name != "--help"]
    assert missing == []


def test_docs_list_no_removed_option() -> None:
    import re

    known = {name for command in COMMANDS.values() for name in options(command)}
    known |= {"--help", "--version", "--config", "--validate", "--list-configs", "-c"}
    assert set(re.findall(r"`(--?[a-z][a-z-]*)", DOCS)) <= known


def test_docs_list_the_environment_variables() -> None:
    names = [*process.MEMORY_SETTINGS, *process.THREAD_SETTINGS, process.OPT_OUT, process.RESTARTED, "LOOPOS_CACHE"]
    assert [name for name in names if f"`{name}" not in DOCS] == []


HEAVY = {"torch", "transformers", "datasets", "numpy", "rich", "pydantic"}


def loaded_by(*calls: tuple[str, ...]) -> set[str]:
    """The modules that a process has loaded after these calls of `loopos`."""
    program = (
        "import sys\n"
        "from loopos.cli.commands import app\n"
        f"for words in {list(map(list, calls))}:\n"
        "    app(words, standalone_mode=False)\n"
        "print('loaded', *sys.modules)\n"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == 0, ended.stderr
    last = ended.stdout.splitlines()[-1].split()
    assert last[0] == "loaded"
    return set(last[1:])


def test_version_and_help_import_no_command() -> None:
    loaded = loaded_by(("--version",), ("--help",), ("data", "--help"), ("runs", "--help"), ("study", "--help"))
    assert not loaded & HEAVY
    listed = {f"loopos.cli.{each.module}" for group in (LOOPOS.listed, DATA, RUNS, STUDY) for each in group.values()
              if isinstance(each, Command)}  # fmt: skip
    assert len(listed) >= 19
    assert not loaded & listed


def test_the_help_of_every_command_imports_nothing_heavy() -> None:
    assert not loaded_by(*((*command, "--help") for command in COMMANDS)) & HEAVY


def test_the_help_of_a_command_imports_no_other() -> None:
    loaded = loaded_by(("prune", "--help"))
    others = {f"loopos.cli.{name}" for name in ("train", "generate", "evaluate", "quantize", "serve", "data", "runs")}
    assert "loopos.cli.prune" in loaded
    assert not loaded & others


def test_python_m_loopos_is_the_command_line() -> None:
    ended = subprocess.run([sys.executable, "-m", "loopos", "trian"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "Did you mean 'train'" in ended.stderr
