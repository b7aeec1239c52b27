"""Processes forked from the test's own, which has imported what they need: a start costs nothing."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO

from tqdm.std import tqdm


class Child:
    """A forked process that does `work`, with these variables added to its environment. Its exit status: 0, what
    `work` gave to `sys.exit`, or 1 where it raised. As a context it is killed and waited for, unless it has ended.
    """

    def __init__(self, work: Callable[[], object], environment: Mapping[str, str] | None = None) -> None:
        self._output, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        self.returncode: int | None = None
        # What the parent holds must not be collected in the child: native objects, such as a session of onnxruntime,
        # wait there for threads that a fork does not copy.
        frozen = gc.get_freeze_count()
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            self._do(work, environment or {})
        if not frozen:
            gc.unfreeze()

    def _do(self, work: Callable[[], object], environment: Mapping[str, str]) -> None:
        status = 1
        try:
            os.dup2(self._output.fileno(), 1)
            os.dup2(self._errors.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            os.environ.update(environment)
            # The lock of progress bars is shared with this process's parent: killed with it, it would stop the parent.
            tqdm.set_lock(threading.RLock())
            work()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc(file=sys.stderr)
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it works."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, until: float | None = None) -> int | None:
        """The exit status, or None where it still works at the moment `until` of the monotonic clock."""
        while self.poll() is None and (until is None or time.monotonic() < until):
            time.sleep(0.002)
        return self.returncode

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return _text_of(self._errors)

    @property
    def output(self) -> str:
        """What it has written to stdout."""
        return _text_of(self._output)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.wait()
        self._output.close()
        self._errors.close()


def _text_of(file: IO[bytes]) -> str:
    # The place in the file is the child's too, which may write on.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
