"""Process settings: how glibc keeps freed memory, where OpenMP puts its threads, and how much libraries print.

A training step frees and allocates the same large buffers again and again; glibc returns each to the kernel, whose page
faults then halve the speed on a CPU. glibc reads the variables when a process starts, so the command restarts itself
once; `mallopt` inside the process was measured and did little. A variable that the user has set is never changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from loopos.config.machine import usable_cores

SCRIPTS = frozenset({"loopos", "loop_cli"})

RESTARTED = "LOOPOS_PROCESS_SETTINGS"
OPT_OUT = "LOOPOS_NO_REEXEC"
MEMORY_SETTINGS: Mapping[str, str] = {
    # Buffers below 4 GiB come from the heap, the heap shrinks only above 8 GiB of free memory and grows by 256 MiB.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
THREAD_SETTINGS: Mapping[str, str] = {"OMP_PROC_BIND": "close"}
SILENCE = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
"""What transformers, datasets and huggingface-hub read when they are imported: no progress bars, only errors."""
REPORTED = (*MEMORY_SETTINGS, *THREAD_SETTINGS, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD")


def process_settings(environment: Mapping[str, str], *, binds_threads: bool = True) -> dict[str, str]:
    """The variables to add to `environment`. Skips those already set. Skips thread binding next to other ranks, and
    with fewer threads than cores, where every such process would bind to the same first cores: two runs of one thread
    each had half a core each on a machine with two.
    """
    settings = dict(MEMORY_SETTINGS)
    threads = environment.get("OMP_NUM_THREADS", "")
    takes_every_core = not threads.isdecimal() or int(threads) >= usable_cores()
    if binds_threads and takes_every_core and "WORLD_SIZE" not in environment:
        settings |= THREAD_SETTINGS
    return {name: value for name, value in settings.items() if name not in environment}


def should_restart(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment benefits from a restart and has not restarted yet."""
    if RESTARTED in environment or environment.get(OPT_OUT, "") not in ("", "0"):
        return False
    return is_glibc() and bool(process_settings(environment))


def restart_with_settings(*, binds_threads: bool = True) -> None:
    """Restarts this process with the settings, if it is the `loopos` command line and benefits from them.
    binds_threads: each of the model's threads keeps its core.

    Commands that compute call this after the checks that need no torch and before printing anything; `train` calls it
    first, because training reuses what its checks read. Does not return if it restarts. `sys.orig_argv` includes the
    interpreter's own options.
    """
    if not is_own_process() or not should_restart(os.environ):
        return
    assert "torch" not in sys.modules, "the settings come too late: torch has been imported"
    added = process_settings(os.environ, binds_threads=binds_threads)
    environment = {**os.environ, **added, RESTARTED: ",".join(added)}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def prepare_to_compute(*, verbose: bool, binds_threads: bool = True) -> None:
    """Restarts the process with the settings if it must, and silences the libraries unless `verbose`: what a command
    calls after its checks, before it imports torch and before it prints anything.
    """
    restart_with_settings(binds_threads=binds_threads)
    hush_libraries(verbose=verbose)


def hush_libraries(*, verbose: bool) -> None:
    """Switches off the libraries' progress bars and log messages, unless `verbose`; the user's settings stay."""
    # Here, as `loopos train` imports this module before its process restarts.
    from loopos.models.quiet import silence_imported
    from loopos.storage.hub import VERBOSE

    if verbose:
        os.environ[VERBOSE] = "1"
        return
    for name, value in SILENCE.items():
        os.environ.setdefault(name, value)
    silence_imported()


def is_own_process() -> bool:
    """Whether this process was started as `loopos`, `loop_cli` or `python -m loopos`, not by a test or a program that
    embeds the command line.
    """
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return bool(spec.name == "loopos.__main__")
    name = os.path.basename(getattr(main, "__file__", None) or "")
    return name in SCRIPTS


def is_glibc() -> bool:
    """Whether the C library is glibc, which reads these variables."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):
        return False


def settings_in_force() -> dict[str, str]:
    """The variables that are set, and under "set_by_loopos" the names of those that the restart added."""
    found = {name: os.environ[name] for name in REPORTED if name in os.environ}
    return {**found, "set_by_loopos": os.environ.get(RESTARTED, "")}
