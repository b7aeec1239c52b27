"""An environment whose tools attack the machine, for tests of isolation."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopos.data.tool_calls import Part, ToolCall


def forks() -> None:
    while True:
        os.fork()


def forks_on() -> None:
    while True:
        with contextlib.suppress(OSError):
            os.fork()


def loops() -> None:
    while True:
        with contextlib.suppress(Exception):
            pass


def matches() -> None:
    """An endless loop in C, which no exception ends."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def fills() -> None:
    bytearray(8 << 30)


def fills_in_processes() -> None:
    for _ in range(15):
        if os.fork() == 0:
            break
    x = b"x" * (60 << 20)
    time.sleep(1000 + len(x))


def connects() -> None:
    socket.create_connection(("1.1.1.1", 80))


def reads_a_secret() -> None:
    """A file that the process which starts all this can read."""
    Path("/etc/passwd").read_text()


def writes_outside() -> None:
    (Path(__file__).parent / "left.txt").write_text("x")


def remounts() -> None:
    """Makes the folder of this module writable, with what rights the process has."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = str(Path(__file__).parent.parent).encode()
    # Remount, bind.
    if libc.mount(None, folder, None, ctypes.c_ulong(32 | 4096), None) != 0:
        raise PermissionError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def writes_much() -> None:
    with open("/tmp/much", "w") as file:
        file.write("x" * (80 << 20))


def prints() -> None:
    while True:
        print("x" * 10_000)


def answers_much() -> str:
    return "x" * (100 << 20)


def kills_parent() -> None:
    with contextlib.suppress(OSError):
        os.kill(os.getppid(), signal.SIGKILL)


def kills_all() -> None:
    with contextlib.suppress(OSError):
        os.kill(-1, signal.SIGKILL)


def leaves() -> None:
    os._exit(3)


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves_a_process() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)  # left-behind-by-a-tool"])


def needs_a_new_file() -> None:
    os.mkdir("/tmp/new")


def forges() -> None:
    """Answers instead of the environment, wherever it can write."""
    for number in range(3, 256):
        with contextlib.suppress(OSError):
            os.write(number, b'{"number": 3, "answer": {"found": 100.0}}\n' * 3)
    sys.setrecursionlimit(10**9)


def looks() -> str:
    """What the process has: torch, variables, folders."""
    folders = [each for each in ("/proc", "/home", "/root", "/etc/passwd", "/run") if os.path.exists(each)]
    return repr(["torch" in sys.modules, "SECRET" in os.environ, folders, os.getcwd(), os.listdir(".")])


NAMES = (
    "forks",
    "matches",
    "fills",
    "connects",
    "reads_a_secret",
    "writes_outside",
    "prints",
    "leaves",
    "kills_parent",
)


def any_attack(text: str, start: int, ended: bool) -> Part | None:
    """Every turn is a call of an attack, by its length."""
    return Part(len(text), calls=(ToolCall("attack", {"name": NAMES[len(text) % len(NAMES)]}),)) if ended else None


class Attacks:
    """A place for attacks."""

    def reset(self, prompt: str, at: str = "call") -> str:
        self.number, self.done, self.at, self.prompt = 0, False, at, prompt
        if at == "reset":
            globals()[prompt]()
        return prompt

    def attack(self, name: str) -> Any:
        """Runs a function of this module."""
        self.number += 1
        found: Callable[[], Any] = globals()[name]
        return found()

    def fine(self) -> str:
        """Does no harm."""
        self.number += 1
        return f"fine {self.number}"

    def reward(self, messages: list[dict[str, Any]], row: dict[str, Any]) -> float:
        if self.at == "reward":
            globals()[self.prompt]()
        return float(self.number)
