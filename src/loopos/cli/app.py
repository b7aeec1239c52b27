"""The entry of `loopos` and `python -m loopos`.

Enters: the words of the command line. Leaves: the exit code. The commands themselves are in `commands`.
"""

from __future__ import annotations

import os


def main() -> None:
    """Runs the command that the process was started with, and exits with its code."""
    # The search for plugins reads the metadata of every installed package: a tenth of the time to a config's faults.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from loopos.cli.commands import app

    app(prog_name="loopos")
