"""Starts one run in several processes on this machine with PyTorch's launcher. Apart from `train`: this knows nothing
of a run.

Each process finds its rank in the environment, as under `torchrun`, which starts runs on several machines. See also
`training.distributed` and `training.heartbeat`.
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

# Seconds that a process has for its checkpoint after a signal.
_LAST_CHECKPOINT = 30


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Runs `python -m loopos ARGUMENTS` in this many processes and returns their exit code. A signal that ends a run
    reaches all of them: they write a checkpoint and end. Raises `UserError` inside another launcher's process.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--nproc {num_processes}: a launcher already started this process (WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}); use either --nproc or torchrun"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher's own report of a failure repeats, at length, what the failing process has printed.
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
        elastic_launch(config, sys.executable)("-m", "loopos", *arguments)
    except ChildFailedError as error:
        return _reported_exit_code(error)
    except SignalException as ended:
        return EXIT_CODES.get(ended.sigval.name, 1)
    return 0


def threads_each(environment: Mapping[str, str], num_processes: int) -> dict[str, str]:
    """Variables that divide this machine's cores among the processes, unless the user has set them."""
    if "OMP_NUM_THREADS" in environment:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // num_processes))}


def _reported_exit_code(error: ChildFailedError) -> int:
    """The exit code of the processes that failed. A process killed by a signal could not report it, so this does;
    SIGTERM is what the launcher sends to the remaining ones.
    """
    failed = sorted(error.failures.items())
    for rank, failure in failed:
        if failure.exitcode < 0 and failure.signal_name() != "SIGTERM":
            complain(f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}")
    return max(1, *(failure.exitcode for _, failure in failed))
