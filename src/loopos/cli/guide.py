"""`loop_cli -c CONFIG`: a second command line for `loopos train` and `loopos validate`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path("configs")


def main() -> None:
    """Entry point of `loop_cli`: exits with the command's code."""
    command = command_of(sys.argv[1:])
    if command == ["list"]:
        list_configs(CONFIGS)
        return
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from loopos.cli.commands import app

    app(command, prog_name="loopos")


def command_of(arguments: Sequence[str]) -> list[str]:
    """The arguments of the equivalent `loopos` command, or ["list"]. Exits with 2 and the usage for other options."""
    parser = argparse.ArgumentParser(
        prog="loop_cli", description="Run, check or list configs. The same as loopos train and loopos validate."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-c", "--config", metavar="CONFIG", help="train from this config")
    what.add_argument("--validate", metavar="CONFIG", help="check this config and report all problems")
    what.add_argument("--list-configs", action="store_true", help="list the configs in the folder configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY.PATH=VALUE",
        help="overrides of config keys, e.g. training.learning_rate=1e-4",
    )
    options = parser.parse_args(arguments)
    if options.list_configs:
        return ["list"]
    if options.validate is not None:
        return ["validate", options.validate, *options.overrides]
    return ["train", options.config, *options.overrides]


def list_configs(folder: Path) -> None:
    """Prints each config of `folder` with its mode, method and description; a broken one with its first error."""
    from loopos.cli.answers import say, table
    from loopos.config.diagnostics import ConfigError
    from loopos.config.source import read_source

    rows: list[tuple[object, ...]] = []
    for path in sorted([*folder.glob("**/*.json"), *folder.glob("**/*.yaml"), *folder.glob("**/*.yml")]):
        try:
            values = _values(read_source(path).root)
        except ConfigError as error:
            rows.append((path, "broken", str(error).splitlines()[0], ""))
            continue
        computation = values.get("computation") if isinstance(values.get("computation"), dict) else {}
        assert isinstance(computation, dict)
        description = values.get("description") or computation.get("description") or ""
        rows.append((path, computation.get("mode", ""), computation.get("method", ""), description))
    say(table(rows, indent="") if rows else f"{folder}/: no configs here")


def _values(root: object) -> dict[str, object]:
    from loopos.config.json_text import MappingNode, plain

    assert isinstance(root, MappingNode)
    values = plain(root)
    assert isinstance(values, dict)
    return dict(values)
