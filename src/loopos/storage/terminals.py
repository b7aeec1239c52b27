"""The terminal that a process writes to, when it goes away.

Enters: nothing. Leaves: standard output and standard error that take what is written, wherever they lead. Left out:
signals (`training.stopping`, `deploy.serve`).
"""

from __future__ import annotations

import os


def leave_the_terminal() -> None:
    """Leads standard output and standard error of a process whose terminal was closed (SIGHUP) to nowhere, where they
    lead to a terminal: an error of writing must not cut off what is to end in order.
    """
    for descriptor in (1, 2):
        if os.isatty(descriptor) or _is_gone(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _is_gone(descriptor: int) -> bool:
    """Whether a terminal that hung up is behind a descriptor: it takes not even nothing."""
    try:
        os.write(descriptor, b"")
    except OSError:
        return True
    return False
