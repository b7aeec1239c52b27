"""Contained processes that answer messages: a Python function with state, without network and files, with limits.

The namespaces and limits are those of `sandbox`. `ForkedSandbox` starts one server (`sandbox_server`), which imports
the function's module once; each process is a fork of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from loopos.config.diagnostics import UserError
from loopos.evaluation.sandbox import GRACE, SandboxLimits, spec_of

_CODE = "import json, sys; spec = json.loads(sys.argv[2]); sys.path[:] = spec['path']; \
from loopos.evaluation.sandbox_server import main; main(int(sys.argv[1]), spec)"

StopKind = Literal["time", "memory", "processes", "output", "died"]
"""What ended a process: a limit, or something else."""


class Stopped(Exception):
    """A process ended before it answered; the message says how."""

    def __init__(self, kind: StopKind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class ContainedProcess:
    """One process, by its connection."""

    def __init__(self, connection: socket.socket, advice: str, sandbox: ForkedSandbox) -> None:
        """sandbox: without it the process ends."""
        self._connection, self._advice, self._sandbox = connection, advice, sandbox
        self._number = 0
        self._stopped: Stopped | None = None

    def ask(self, message: object, seconds: float) -> Any:
        """The function's answer to a message; both are JSON. Raises `Stopped` if the process ends instead, at the
        latest after `seconds`, and from then on; `UserError` where processes cannot be contained.
        """
        if self._stopped is None:
            self._number += 1
            text = json.dumps({"number": self._number, "message": message})
            with contextlib.suppress(ConnectionError):
                # Its last message may still be there to read.
                self._connection.sendall(f"{seconds} {text}\n".encode())
            kind, found = self._received(seconds)
            if kind == "+" and isinstance(found, dict) and found.get("number") == self._number and "answer" in found:
                return found["answer"]
            self._stopped = self._ended(kind, found)
            self.close()
        raise self._stopped

    def close(self) -> None:
        """Ends the process, if it runs."""
        self._connection.close()

    def _received(self, seconds: float) -> tuple[str, Any]:
        """A line from the watch: its kind and content."""
        # The watch keeps the time; it may be starved, or still start the process.
        self._connection.settimeout(seconds + 2 * GRACE)
        line = b""
        try:
            while not line.endswith(b"\n"):
                found = self._connection.recv(1 << 16)
                if not found:
                    break
                line += found
            return line[:1].decode(), json.loads(line[1:])
        except TimeoutError:
            return "-", {"stopped": "time", "status": None, "stderr": ""}
        except (ConnectionError, ValueError):
            return "", None

    def _ended(self, kind: str, found: Any) -> Stopped:
        if kind == "-" and "unavailable" in found:
            raise UserError(f"programs cannot be contained on this system: {found['unavailable']}; {self._advice}")
        if kind == "-" and found["stopped"]:
            return Stopped(found["stopped"], f"passed its limit of {found['stopped']}")
        if kind != "-" or found["status"] is None:
            return Stopped("died", "answered with something else than an answer")
        status, last = found["status"], found["stderr"].rstrip().rpartition("\n")[2]
        text = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return Stopped("died", f"{text}: {last}" if last else text)


class ForkedSandbox:
    """Starts contained processes that answer messages."""

    def __init__(
        self,
        factory: str,
        argument: object,
        *,
        limits: SandboxLimits,
        readable: Sequence[Path],
        advice: str,
    ) -> None:
        """Starts the server, and one process that it ends again.

        Args:
            factory: "module:name" of a function that takes `argument` and returns a function without arguments, called
                in each process, which returns the function from a message to an answer.
            limits: of each process with all that it starts; `seconds` are those of each message instead.
            readable: folders that a process may read, beside Python and the system's libraries.
            advice: what to do where processes cannot be contained.
        Raises:
            UserError: what the factory raises, and where the system does not allow to contain processes.
        """
        self._advice, folder = advice, tempfile.mkdtemp(prefix="loopos-sandbox-")
        spec = spec_of(folder, {}, (), limits, "full", readable=readable)
        # Seconds belong to messages.
        del spec["limits"]["CPU"]
        path = [os.path.abspath(each) for each in sys.path]
        spec |= {"factory": factory, "argument": argument, "path": path, "start_seconds": GRACE}
        self._connection, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as errors:
            # Sets of texts have one order in all processes. A session of its own, so that Ctrl+C does not reach it.
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-s", "-c", _CODE, str(theirs.fileno()), json.dumps(spec)],
                env={**spec["environment"], "PYTHONHASHSEED": "0"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
            # Without its connection the server ends, and with it all that it started.
            self._closing = weakref.finalize(self, _close, self._connection, self._server, folder)
            theirs.close()
            try:
                self._check(errors)
            except UserError:
                self.close()
                raise

    def start(self) -> ContainedProcess:
        """A new process, which starts beside this call. Raises `UserError` if the server was killed."""
        ours = None
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._connection, [b"s"], [theirs.fileno()])
        except OSError as problem:
            if ours is not None:
                ours.close()
            hint = "; raise ulimit -n, or lower the number of episodes" if problem.errno == errno.EMFILE else ""
            raise UserError(f"a contained process cannot be started: {problem}{hint}") from problem
        return ContainedProcess(ours, self._advice, self)

    def close(self) -> None:
        """Ends the server and all processes."""
        self._closing()

    def _check(self, errors: Any) -> None:
        """Waits for the server, and lets a process answer. Raises `UserError`."""
        with self._connection.makefile("rb") as lines:
            line = lines.readline()
        if not line:
            self._server.wait()
            errors.seek(0)
            last = errors.read().decode("utf-8", "replace").rstrip()[-500:]
            raise UserError(f"the process that starts contained ones ended with {self._server.returncode}: {last}")
        problem = json.loads(line)["problem"]
        if problem:
            raise UserError(problem)
        trial = self.start()
        try:
            trial.ask(None, GRACE)
        except Stopped as stopped:
            raise UserError(f"a contained process {stopped}; {self._advice}") from stopped
        finally:
            trial.close()


def _close(connection: socket.socket, server: subprocess.Popen[bytes], folder: str) -> None:
    connection.close()
    server.wait()
    # The server removes it, also where this process is killed, unless it was killed itself.
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(folder)
