"""What every method's run begins and ends with: the device, the processes, the random numbers.

Enters: the `training` section. Leaves: the device and the world, inside a `with`. Left out: folders, data, models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loopos.config.sections import TrainingSection
from loopos.training.distributed import World, join_world, leave_world
from loopos.training.precision import pick_device
from loopos.training.random_states import seed_everything


@contextmanager
def session(settings: TrainingSection) -> Iterator[tuple[torch.device, World]]:
    """This process's device and place among the processes of `torchrun`; generators begin at the config's seed. The
    process group is left at the end, however it comes. Raises `UserError` for a device that is not there.
    """
    device = pick_device(settings.device)
    world = join_world(device.type)
    if device.type == "cuda":
        device = torch.device("cuda", world.local_rank)
    try:
        seed_everything(settings.seed, world.rank)
        yield device, world
    finally:
        leave_world(world)
