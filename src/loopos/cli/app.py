"""The entry point of `loopos` and `python -m loopos`. Apart from `commands`: `loopos train` restarts its process before
it imports typer.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the requested command and exits with its code."""
    # Searching for plugins reads the metadata of every installed package: a tenth of the time to a config's first
    # error.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # `train --nproc` starts processes that are bound to cores; each of them restarts itself.
    if sys.argv[1:2] == ["train"] and not any(argument.startswith(("--nproc", "--help")) for argument in sys.argv):
        from loopos.cli.process import restart_with_settings

        # Restart before the checks, so that rows read by the checks are those that training uses.
        restart_with_settings()
    from loopos.cli.commands import app

    app(prog_name="loopos")
