"""One run in several processes on this machine, started by PyTorch's own launcher.

Enters: the words after `loopos` that each process is started with, and how many processes. Leaves: their exit code.
Each process finds its rank in the environment, as under `torchrun`, which starts runs over several machines. Left out:
what the processes do together (`training.distributed`), how they notice that one is gone (`training.heartbeat`).
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loopos.cli.outcome import complain
from loopos.config.diagnostics import UserError
from loopos.config.machine import usable_cores
from loopos.training.stopping import EXIT_CODES

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# What a process has for its checkpoint after a signal: seconds.
_LAST_CHECKPOINT = 30


def launch(words: Sequence[str], num_processes: int) -> int:
    """Runs `python -m loopos WORDS` in this many processes. A signal that ends a run reaches each of them: they write a
    checkpoint and end. Raises `UserError` inside of another launcher's process.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--nproc {num_processes}: this process was started by a launcher already (WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}); leave --nproc out, or torchrun"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher's own account of a failure repeats, at length, what the failing process has said.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.update(threads_each(os.environ, num_processes))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=_LAST_CHECKPOINT,
        signals_to_handle=",".join((*EXIT_CODES, "SIGQUIT")),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "loopos", *words)
    except ChildFailedError as error:
        return _told(error)
    except SignalException as ended:
        return EXIT_CODES.get(ended.sigval.name, 1)
    return 0


def threads_each(environment: Mapping[str, str], num_processes: int) -> dict[str, str]:
    """The variables that share this machine's cores out, where the user has not said how."""
    if "OMP_NUM_THREADS" in environment:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // num_processes))}


def _told(error: ChildFailedError) -> int:
    """The exit code of the processes that failed. One that a signal ended could not say so itself; SIGTERM is what the
    launcher sends to those that are left.
    """
    failed = sorted(error.failures.items())
    for rank, failure in failed:
        if failure.exitcode < 0 and failure.signal_name() != "SIGTERM":
            complain(f"rank {rank} (process {failure.pid}) was ended by {failure.signal_name()}")
    return max(1, *(failure.exitcode for _, failure in failed))
