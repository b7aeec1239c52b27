"""Forks contained processes that answer messages with a Python function.

`evaluation.forked_sandbox` starts one such server, which imports what the function needs once; a contained process is a
fork of it, so that it starts in milliseconds. Apart from the training process for the reasons of `sandbox_supervisor`.

    server → for each process: watch (passes messages on, limits of time and memory) → process 1 → the function

A request to the watch is a line "SECONDS JSON". It answers a line "+JSON" of the function, or "-JSON" at the end of the
process: an object with `stopped`, `status`, `stderr`, or with `unavailable`. A watch ends with its connection.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from loopos.config.diagnostics import UserError
from loopos.evaluation.sandbox_supervisor import TICK, Unavailable, Watch, end_with_parent, start

Answer = Callable[[Any], object]
# Between messages, when only a process that a message left behind can take memory.
_IDLE_TICK = 0.25
_READY = b"ready\n"
_LAST_WORDS = 2000


def main(number: int, spec: dict[str, Any]) -> None:
    """Serves the connection with this descriptor until it is closed. spec: of `sandbox`, and `factory`, "module:name"
    of a function that takes `argument` and returns what makes the function of a process.
    """
    connection = socket.socket(fileno=number)
    os.umask(0o022)
    # The kernel reaps watches.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        module, _, name = spec["factory"].partition(":")
        make = getattr(import_module(module), name)(spec["argument"])
        problem = ""
    except UserError as raised:
        problem = str(raised)
    connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    if not problem:
        gc.collect()
        # Forks share what is not touched.
        gc.freeze()
        _serve(connection, spec, make)
    os.rmdir(spec["folder"])


def _serve(connection: socket.socket, spec: dict[str, Any], make: Callable[[], Answer]) -> None:
    while True:
        message, ends, _, _ = socket.recv_fds(connection, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            connection.close()
            _attend(socket.socket(fileno=ends[0]), spec, make)
        os.close(ends[0])


def _attend(client: socket.socket, spec: dict[str, Any], make: Callable[[], Answer]) -> NoReturn:
    """Starts one process and passes messages between it and the client, until one of them ends or a limit is passed."""
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        size, shared = _own_memory()
        limits = {**spec["limits"], "AS": spec["limits"]["AS"] + size}
        watch = _MessageWatch(client, {**spec, "limits": limits}, make, shared)
        found = watch.run()
    except Unavailable as problem:
        found = {"unavailable": str(problem)}
    except ConnectionError:
        os._exit(0)
    try:
        client.sendall(b"-" + json.dumps(found).encode() + b"\n")
    finally:
        os._exit(0)


def _own_memory() -> tuple[int, int]:
    """Bytes of this process's addresses, and of its memory that a fork has too."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file.read().splitlines())
    return int(lines["VmSize"].split()[0]) * 1024, int(lines["RssAnon"].split()[0]) * 1024


class _MessageWatch:
    """Passes messages between a client and a contained process. The clock runs while a message is not answered."""

    def __init__(self, client: socket.socket, spec: dict[str, Any], make: Callable[[], Answer], shared: int) -> None:
        first, self._ends = start(spec, lambda: _answer_all(make))
        self._client, self._watch = client, Watch(spec, first, self._ends, shared)
        os.set_blocking(self._ends["stdin"], False)
        self._incoming, self._outgoing = b"", b""
        # A process that does not come to its first message.
        self._is_ready, self._deadline = False, time.monotonic() + spec["start_seconds"]

    def run(self) -> dict[str, Any]:
        """How the process ended. Raises `Unavailable`, and `ConnectionError` when the client closes the connection."""
        watch = self._watch
        try:
            while not watch.stopped:
                for ready in watch.step(TICK if self._deadline else _IDLE_TICK):
                    if ready == "client":
                        self._receive()
                    else:
                        self._send_on()
                self._answered()
                if self._deadline and time.monotonic() > self._deadline and not watch.stopped:
                    watch.stop("time")
        finally:
            found = watch.ended()
        return {"stopped": found["stopped"], "status": found["status"], "stderr": found["stderr"][-_LAST_WORDS:]}

    def _receive(self) -> None:
        """A part of a request; when it is whole, it goes to the process and the clock starts."""
        found = self._client.recv(1 << 16)
        if not found:
            raise ConnectionError
        self._incoming += found
        if not self._incoming.endswith(b"\n"):
            return
        seconds, _, self._outgoing = self._incoming.partition(b" ")
        self._incoming, self._deadline = b"", time.monotonic() + float(seconds)
        # What it wrote without a request answers none.
        self._watch.read["result"] = b""
        self._watch.selector.register(self._ends["stdin"], selectors.EVENT_WRITE, "stdin")

    def _send_on(self) -> None:
        try:
            self._outgoing = self._outgoing[os.write(self._ends["stdin"], self._outgoing[: 1 << 16]) :]
        except BrokenPipeError:
            self._outgoing = b""
        if not self._outgoing:
            self._watch.selector.unregister(self._ends["stdin"])

    def _answered(self) -> None:
        """Passes the answer on if it is whole."""
        answer, newline, _ = self._watch.read["result"].partition(b"\n")
        if not newline or not self._deadline:
            return
        self._watch.read["result"], self._deadline = b"", 0.0
        if self._is_ready:
            self._client.sendall(b"+" + answer + b"\n")
        else:
            self._is_ready = True
            self._watch.selector.register(self._client, selectors.EVENT_READ, "client")


def _answer_all(make: Callable[[], Answer]) -> None:
    """In the contained process: an answer to each message. Its pipes get other numbers, which programs that it starts
    do not inherit.
    """
    requests, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(3), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(3)
    own, answer = os.getpid(), make()
    results.write(_READY)
    for line in requests:
        request = json.loads(line)
        found = {"number": request["number"], "answer": answer(request["message"])}
        if os.getpid() != own:
            # A fork that returned from the call.
            os._exit(0)
        text = json.dumps(found).encode() + b"\n"
        while text:
            text = text[results.write(text) :]
