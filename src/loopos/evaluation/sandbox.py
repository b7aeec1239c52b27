"""Runs a Python program that a model wrote, contained: without network, without your files, with limits.

What contains it are namespaces of the Linux kernel (`sandbox_supervisor`), which ordinary users may create on most
systems; `missing` says why not on this one. Limits of each program:

    CPU time per process, wall time, memory per process and of all together, processes, size of its files, output
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from loopos.config.diagnostics import UserError

_SUPERVISOR = Path(__file__).with_name("sandbox_supervisor.py")
_MIB = 1 << 20
GRACE = 30.0
"""Seconds that a start of Python and the end of a program may take beside its own time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """`seconds`: CPU time of a process; the wall time is `wall_factor` times that. `memory`: MiB of a process's
    addresses, and of the memory of all processes together. `processes`: at once, threads included. `file_size`: MiB of
    all files. `output`: MiB of each of stdout and stderr.
    """

    seconds: int = 5
    wall_factor: float = 3.0
    memory: int = 512
    processes: int = 16
    file_size: int = 16
    output: int = 1

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "processes", "file_size", "output"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}; expected 1 or more")


Isolation = Literal["full", "limits"]
"""full: namespaces and limits. limits: only limits, where a system allows no namespaces: the program can then read and
write all that you can, and use the network.
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended. `stopped`: the limit that ended it, "time", "memory" or "output"; empty if it ended itself.
    `status`: its exit code, −n by signal n; None if it was stopped. `result`: what it wrote to descriptor 3. `seconds`
    of wall time; `memory`: the most that was seen, in bytes.
    """

    stopped: str
    status: int | None
    stdout: str
    stderr: str
    result: str
    seconds: float
    memory: int


def run_contained(
    files: Mapping[str, str],
    arguments: Sequence[str],
    *,
    stdin: str = "",
    limits: SandboxLimits | None = None,
    isolation: Isolation = "full",
) -> Ended:
    """Runs this Python with `arguments` in an empty folder with `files`, and kills all that it started. The environment
    has none of this process's variables. Raises `UserError` where the system does not allow `isolation`.
    """
    limits = limits or SandboxLimits()
    with tempfile.TemporaryDirectory(prefix="loopos-sandbox-") as folder:
        spec = spec_of(folder, {**files, "stdin": stdin}, arguments, limits, isolation)
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", str(_SUPERVISOR)],
                input=json.dumps(spec).encode(),
                capture_output=True,
                timeout=limits.seconds * limits.wall_factor + GRACE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            # The supervisor itself was starved; its processes die with it.
            return Ended("time", None, "", "", "", limits.seconds * limits.wall_factor + GRACE, 0)
    if done.returncode != 0:
        raise UserError(f"the sandbox ended with {done.returncode}: {done.stderr.decode('utf-8', 'replace')[-500:]}")
    found = json.loads(done.stdout)
    if "unavailable" in found:
        raise UserError(
            f"programs cannot be contained on this system: {found['unavailable']}; allow namespaces for this user (in "
            'a container: seccomp and the capability SYS_ADMIN), or set isolation to "limits", with which a program '
            "can read and write what you can, and use the network"
        )
    return Ended(**found)


def spec_of(
    folder: str,
    files: Mapping[str, str],
    arguments: Sequence[str],
    limits: SandboxLimits,
    isolation: Isolation,
    *,
    readable: Sequence[Path] = (),
) -> dict[str, Any]:
    """What the supervisor reads. folder: an empty one; readable: folders beside those of Python and the system."""
    one_file = limits.file_size * _MIB
    return {
        "isolated": isolation == "full",
        "folder": folder,
        "files": dict(files),
        "readable": sorted({sys.prefix, sys.base_prefix, *map(str, readable)}, key=len),
        # Isolated from variables and from the folder of the program; nothing is written beside modules.
        "program": [sys.executable, "-I", "-B", *arguments],
        "environment": {
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            # Threads count as processes.
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        },
        "limits": {
            "CPU": limits.seconds,
            "AS": limits.memory * _MIB,
            "NPROC": limits.processes,
            "FSIZE": one_file,
            "NOFILE": 64,
            "CORE": 0,
        },
        "wall_seconds": limits.seconds * limits.wall_factor,
        "memory_bytes": limits.memory * _MIB,
        # The program's own files come on top.
        "folder_bytes": one_file + sum(len(text.encode("utf-8", "surrogatepass")) + 8192 for text in files.values()),
        "output_bytes": limits.output * _MIB,
    }


@cache
def missing() -> str:
    """Why programs cannot be contained on this system; empty where they can be."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no namespaces of Linux"
    try:
        ended = run_contained({}, ["-c", "pass"])
    except UserError as problem:
        return str(problem)
    return "" if ended.status == 0 else f"a program that does nothing ended with {ended.status}: {ended.stderr}"
