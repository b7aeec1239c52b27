"""Redirect the output of a process whose terminal was closed."""

from __future__ import annotations

import os


def leave_the_terminal() -> None:
    """After SIGHUP, redirect standard output and error from the closed terminal to the null device.

    Otherwise a write error would interrupt the orderly shutdown.
    """
    for descriptor in (1, 2):
        if os.isatty(descriptor) or _is_gone(descriptor):
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, descriptor)
            os.close(null_device)


def _is_gone(descriptor: int) -> bool:
    """Whether a descriptor leads to a terminal that hung up: even an empty write fails."""
    try:
        os.write(descriptor, b"")
    except OSError:
        return True
    return False
