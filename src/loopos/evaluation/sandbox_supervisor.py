"""Starts one program in namespaces of its own, watches its limits and reports how it ended. Standard library only.

`evaluation.sandbox` runs this file as a script: one JSON object on stdin, one on stdout. Apart from it, because a fork
of the training process would inherit its threads, its memory and its open files. `sandbox_server` starts Python
functions by the same steps.

    supervisor (limits of time and memory) → process 1 of a PID namespace (mounts, then waits) → the program

The program sees a root of its own: the system's libraries and this Python read-only, an empty /tmp with a bound on its
size, four devices, and nothing else; no network device is up; when process 1 ends, the kernel kills what is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NETWORK = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE, _DETACH = 1, 2, 4, 32, 4096, 16384, 1 << 18, 2
_DEATH_SIGNAL, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 36, 38
_CAPABILITY_VERSION = 0x20080522
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_CWD = 442, 0x8000, -100
# Numbers of pivot_root and keyctl, which glibc does not wrap.
_CALLS = {"x86_64": (155, 250), "aarch64": (41, 219)}
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("null", "zero", "random", "urandom")
_DESCRIPTORS = ("stdin", "stdout", "stderr", "result")
# User ids above those that systems give out. RLIMIT_NPROC counts processes by user: each program has its own.
_FIRST_USER = 1_900_000_000
TICK = 0.02

_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """The kernel, or this process's rights, do not allow a step."""


def main() -> None:
    """Runs the program that stdin describes."""
    spec = json.loads(sys.stdin.buffer.read())
    end_with_parent()
    # Files of process 1 are read by the program's user.
    os.umask(0o022)
    try:
        found = _run(spec)
    except Unavailable as problem:
        found = {"unavailable": str(problem)}
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    began, watch = time.monotonic(), Watch(spec, *start(spec))
    while not watch.stopped:
        watch.step(TICK)
        if time.monotonic() - began > spec["wall_seconds"]:
            watch.stop("time")
    return {**watch.ended(), "seconds": time.monotonic() - began}


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends."""
    _libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def start(spec: dict[str, Any], function: Callable[[], object] | None = None) -> tuple[int, dict[str, int]]:
    """Process 1 of new namespaces, and this process's ends of its pipes by name. function: what the contained process
    calls, with a pipe as its stdin; None for the program of `spec`. Raises `Unavailable`.
    """
    _libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    if spec["isolated"]:
        _enter_namespaces()
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "result", "status")}
    ours, theirs = ({name: ends[side] for name, ends in pipes.items()} for side in (0, 1))
    if function is not None:
        theirs["stdin"], ours["stdin"] = os.pipe()
    number, first = os.getpid(), os.fork()
    if first == 0:
        _first_process(spec, theirs, number, function)
    for end in theirs.values():
        os.close(end)
    return first, ours


def _enter_namespaces() -> None:
    """Namespaces of processes, network and IPC for the children; as a user other than root, also of users."""
    if platform.machine() not in _CALLS:
        raise Unavailable(f"the processor {platform.machine()} is not supported")
    user, group, spaces = os.getuid(), os.getgid(), _NEW_PID | _NEW_NETWORK | _NEW_IPC | _NEW_UTS
    if user == 0:
        _call("a namespace of processes and network", _libc.unshare(spaces))
        return
    _call("a user namespace (user.max_user_namespaces, AppArmor)", _libc.unshare(spaces | _NEW_USER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        try:
            _write(f"/proc/self/{name}", text)
        except OSError as problem:
            raise Unavailable(f"a user namespace: /proc/self/{name}: {problem.strerror}") from problem


def _first_process(
    spec: dict[str, Any], ends: dict[str, int], number: int, function: Callable[[], object] | None
) -> NoReturn:
    """Process 1: mounts, starts the program, waits for it and reports its status. Its end is the end of all."""
    end_with_parent()
    try:
        folder = _mounted(spec) if spec["isolated"] else spec["folder"]
        os.chdir(folder)
        for name, text in spec["files"].items():
            _write(name, text)
        user = None
        if spec["isolated"]:
            user = _FIRST_USER + number if os.getuid() == 0 else None
            # A session keyring would hold keys of the user who started the run.
            _libc.syscall(_CALLS[platform.machine()][1], 1, None)
        if function is None:
            # Unlinked, so that what was read cannot be read again.
            ends["stdin"] = os.open("stdin", os.O_RDONLY)
            os.unlink("stdin")
        os.setsid()
        program = os.fork()
        if program == 0:
            _become(spec, [ends[name] for name in _DESCRIPTORS], user, function)
        _libc.prctl(_DUMPABLE, 0, 0, 0, 0)
        for name in _DESCRIPTORS:
            os.close(ends[name])
        status = 0
        while True:
            ended, status = os.wait()
            if ended == program:
                break
        os.write(ends["status"], json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())
    except (Unavailable, OSError) as problem:
        os.write(ends["status"], json.dumps({"unavailable": str(problem)}).encode())
    os._exit(0)


def _mounted(spec: dict[str, Any]) -> str:
    """A new root with what the program may see; its writable folder."""
    root = spec["folder"]
    _call("a namespace of mounts", _libc.unshare(_NEW_MOUNTS))
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("none", root, "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    # Files in it are memory, with a bound of their own. Before the folders that it may read, which may lie in /tmp.
    _mount("none", f"{root}/tmp", "tmpfs", _NO_SUID | _NO_DEVICES, f"size={spec['folder_bytes']},mode=1777")
    seen: list[str] = []
    for path in [*_SYSTEM, *spec["readable"]]:
        if os.path.exists(path) and not any(path == other or path.startswith(other + "/") for other in seen):
            _show(path, root)
            seen.append(path)
    os.mkdir(f"{root}/dev", 0o755)
    for name in _DEVICES:
        _show(f"/dev/{name}", root, devices=True)
    os.symlink("/tmp", f"{root}/dev/shm")
    os.chdir(root)
    _call("pivot_root", _libc.syscall(_CALLS[platform.machine()][0], b".", b"."))
    _call("umount", _libc.umount2(b".", _DETACH))
    _mount(None, "/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    return "/tmp"


def _show(path: str, root: str, *, devices: bool = False) -> None:
    """`path` at the same place under `root`, read-only; a link as a link."""
    target = root + path
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(path) and not devices:
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        _write(target, "")
    _mount(path, target, None, _BIND | _RECURSIVE)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SUID | (0 if devices else _NO_DEVICES), 0, 0, 0)
    arguments = (ctypes.c_int(_AT_CWD), target.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    _call("mount_setattr (Linux 5.12)", _libc.syscall(_MOUNT_SETATTR, *arguments))


def _become(spec: dict[str, Any], ends: list[int], user: int | None, function: Callable[[], object] | None) -> NoReturn:
    """Limits and rights, then the function, or the program in place of this process. ends: its descriptors 0 to 3."""
    for number, end in enumerate(ends):
        # Above all that are open, so that no end is overwritten before it is copied.
        os.dup2(end, 100 + number)
    for number in range(len(ends)):
        os.dup2(100 + number, number)
    os.closerange(4, 256)
    try:
        for name, value in spec["limits"].items():
            # Above its soft limit of time a process gets SIGXCPU, which it may ignore; at the hard one it is killed.
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value + 1 if name == "CPU" else value))
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        # A program loses the rights of its user namespace when it is executed, a function only so.
        none = (ctypes.c_uint32 * 6)()
        _call("capset", _libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), none))
        if function is None:
            os.execve(spec["program"][0], spec["program"], spec["environment"])
        function()
        os._exit(0)
    except BaseException as problem:
        # As the last line of a program. Nothing above may run in this process, so that it is not printed there.
        os.write(2, f"{type(problem).__name__}: {problem}\n".encode("utf-8", "replace"))
        raise
    finally:
        os._exit(127)


class Watch:
    """Reads what a program writes, and looks at its limits. `read`: by pipe, what was read; `stopped`: the limit that
    it passed, "ended" if it ended itself, empty while it runs; `memory`: the most that was seen, in bytes.
    """

    def __init__(self, spec: dict[str, Any], first: int, ends: dict[str, int], shared: int = 0) -> None:
        """first: process 1; ends: of its pipes. shared: bytes that each process has from a fork, which do not count."""
        self._spec, self._first, self._ends, self._shared = spec, first, ends, shared
        self._most, self._memory = spec["output_bytes"], spec["memory_bytes"]
        self.read: dict[str, bytes] = {name: b"" for name in ends if name != "stdin"}
        self.stopped, self.memory = "", 0
        self.selector = selectors.DefaultSelector()
        for name in self.read:
            self.selector.register(ends[name], selectors.EVENT_READ, name)

    def stop(self, limit: str) -> None:
        """Notes the limit that was passed."""
        self.stopped = limit

    def step(self, seconds: float) -> list[str]:
        """Waits up to `seconds` for something to read; the names of what else is ready in the selector."""
        others = []
        for key, _ in self.selector.select(seconds):
            if key.data not in self.read:
                others.append(key.data)
                continue
            found = os.read(key.fd, 1 << 16)
            self.read[key.data] += found
            if not found:
                self.selector.unregister(key.fd)
                # The program has ended; a process that it left behind may hold the other ends.
                if key.data == "status":
                    self.stop("ended")
        self.memory = max(self.memory, _memory_of(self._first, self._shared))
        if max(len(self.read[name]) for name in ("stdout", "stderr", "result")) > self._most:
            self.stop("output")
        elif self.memory > self._memory:
            self.stop("memory")
        return others

    def ended(self) -> dict[str, Any]:
        """Kills all that runs; how it ended. Raises `Unavailable`."""
        _end(self._first, isolated=self._spec["isolated"])
        if self.stopped == "ended":
            _drain(self._ends, self.read, self._most)
        status = json.loads(self.read["status"] or b"{}")
        if "unavailable" in status:
            raise Unavailable(status["unavailable"])
        texts = {name: self.read[name][: self._most].decode("utf-8", "replace") for name in _DESCRIPTORS[1:]}
        stopped = "" if self.stopped == "ended" else self.stopped
        return {"stopped": stopped, "status": status.get("status"), "memory": self.memory, **texts}


def _end(first: int, *, isolated: bool) -> None:
    """Kills all processes: with process 1 of a PID namespace the kernel kills the rest."""
    if isolated:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        return
    # Children whose parent has ended became this process's.
    while len(below := [*_tree(os.getpid())][1:]):
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _drain(ends: dict[str, int], read: dict[str, bytes], most: int) -> None:
    """What was written before the end and not read yet."""
    for name in ("stdout", "stderr", "result"):
        os.set_blocking(ends[name], False)
        while len(read[name]) <= most:
            try:
                found = os.read(ends[name], 1 << 16)
            except BlockingIOError:
                break
            if not found:
                break
            read[name] += found


def _tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        for thread in threads:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                for child in file.read().split():
                    yield from _tree(int(child))
    except OSError:
        # It has ended meanwhile.
        return


def _memory_of(pid: int, shared: int) -> int:
    """Bytes of a process and all below it, without files that they only map and `shared` bytes of each."""
    total = 0
    for each in _tree(pid):
        try:
            with open(f"/proc/{each}/status") as file:
                lines = file.read().splitlines()
        except OSError:
            continue
        own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))
        total += max(own - shared, 0)
    return total


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if each is None else each.encode() for each in (source, target, kind, data)]
    what = f"mount {target}"
    _call(what, _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]))


def _call(what: str, returned: int) -> None:
    if returned != 0:
        raise Unavailable(f"{what}: {os.strerror(ctypes.get_errno())}")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)


if __name__ == "__main__":
    main()
