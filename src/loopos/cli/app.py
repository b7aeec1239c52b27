"""The entry of `loopos` and `python -m loopos`.

Enters: the words of the command line. Leaves: the exit code. The commands themselves are in `commands`.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command that the process was started with, and exits with its code."""
    # The search for plugins reads the metadata of every installed package: a tenth of the time to a config's faults.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Several processes are bound to cores otherwise: `train` restarts each of them.
    if sys.argv[1:2] == ["train"] and not any(word.startswith("--nproc") for word in sys.argv):
        from loopos.cli.process import restart_with_settings

        # At once, and not after the checks: the rows that they read are those that training takes.
        restart_with_settings()
    from loopos.cli.commands import app

    app(prog_name="loopos")
