"""What every method's run begins and ends with: the device, the processes, the random numbers.

Enters: the sections `training` and `distributed`. Leaves: the device and the world, inside a `with`. Left out: folders,
data, models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from loopos.config.distributed import DistributedSection
from loopos.config.sections import TrainingSection
from loopos.training.distributed import World, is_broken_collective, join_world, leave_world, meeting_place
from loopos.training.liveness import EndedElsewhere, Liveness
from loopos.training.precision import pick_device
from loopos.training.random_states import seed_everything
from loopos.training.stopping import run_ends_at_once


@contextmanager
def session(settings: TrainingSection, distributed: DistributedSection) -> Iterator[tuple[torch.device, World]]:
    """This process's device and place among the processes of `torchrun`; generators begin at the config's seed, and
    the ranks part in `TrainedWeights`. The process group is left at the end, however it comes; where one process of
    several fails, or is lost, all end and one of them says why. Raises `UserError` for a device that is not there.
    """
    device = pick_device(settings.device)
    world = join_world(device.type, distributed)
    if device.type == "cuda":
        device = torch.device("cuda", world.local_rank)
    try:
        # The same on every rank until the model is there: new weights are drawn, and must be those of all.
        seed_everything(settings.seed)
        with run_ends_at_once(), nullcontext() if world.size == 1 else _watched(world, distributed):
            yield device, world
    finally:
        leave_world(world)


@contextmanager
def _watched(world: World, distributed: DistributedSection) -> Iterator[None]:
    """The other processes are watched, and learn how this one ends."""
    liveness = Liveness(meeting_place(), world.rank, world.size, silence=distributed.silence)
    liveness.begin()
    try:
        yield
    # Whatever ends this process, Ctrl-C too, the others wait for it until they are told.
    except BaseException as problem:
        if is_broken_collective(problem):
            liveness.blame(problem)
        if not liveness.failed(problem):
            raise EndedElsewhere(getattr(problem, "exit_code", 1)) from None
        raise
    liveness.leave()
