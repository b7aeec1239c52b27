"""The processes of a run, over `torch.distributed` and the environment of `torchrun`. A single process needs no process
group.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from loopos.config.diagnostics import UserError
from loopos.config.sections import DistributedSection

# Gradients are summed in flat buckets of this many elements: few calls, bounded extra memory.
_BUCKET = 1 << 24
_SESSIONS = itertools.count()
_BROKEN_SIGNS = ("gloo", "connection closed by peer", "connection reset by peer", "timed out waiting")


@dataclass(frozen=True)
class World:
    """This process among `size` processes; rank 0 writes files. `settings`: the section `distributed`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    settings: DistributedSection = field(default_factory=DistributedSection)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_parallel(self) -> tuple[int, int]:
        """(rank, size) of data parallelism: which part of the rows is this process's. Processes that split a model's
        layers (tensor parallelism) have the same rank.
        """
        return self.rank // self._together, self.size // self._together

    @property
    def _together(self) -> int:
        return self.settings.tensor_parallel if self.size > 1 else 1

    @property
    def _repeats(self) -> bool:
        """Whether a lower rank has the same data-parallel rank and already counts for both."""
        return self.rank % self._together > 0

    def sum_floats(self, values: Mapping[str, float]) -> dict[str, float]:
        """Adds each named value over all data-parallel ranks, in fp64. Every rank must pass the same names."""
        return self.sum_all(dict.fromkeys(values, 0.0) if self._repeats else values)

    def sum_all(self, values: Mapping[str, float]) -> dict[str, float]:
        """Adds each named value over all ranks, in fp64. Every rank must pass the same names."""
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        total = torch.tensor([values[name] for name in names], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            total = total.cuda(self.local_rank)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def all_reduce_max(self, value: int) -> int:
        """The largest value of all ranks."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        if dist.get_backend() == "nccl":
            largest = largest.cuda(self.local_rank)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Adds each tensor over all data-parallel ranks, in place, bucket by bucket. All ranks must pass the same
        shapes in the same order.
        """
        if self.size == 1:
            return
        if self._repeats:
            for tensor in tensors:
                tensor.zero_()
        bucket: list[Tensor] = []
        num_elements = 0
        for tensor in tensors:
            bucket.append(tensor)
            num_elements += tensor.numel()
            if num_elements >= _BUCKET:
                _sum_bucket(bucket, self.local_rank)
                bucket, num_elements = [], 0
        if bucket:
            _sum_bucket(bucket, self.local_rank)

    def gather(self, value: object) -> list[object]:
        """The value of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[object] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_data_parallel(self, value: object) -> list[object]:
        """The value of every data-parallel rank, in order, on every rank."""
        return self.gather(value)[:: self._together]

    def wait(self) -> None:
        """A barrier: returns when all ranks have reached it."""
        if self.size > 1:
            dist.barrier()


def _sum_bucket(bucket: Sequence[Tensor], local_rank: int) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    if dist.get_backend() == "nccl":
        flat = flat.cuda(local_rank)
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def init_distributed(device: str, settings: DistributedSection) -> World:
    """Joins the process group of `torchrun` (NCCL on CUDA, gloo otherwise); a single process without `torchrun` has
    none.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(settings=settings)
    if size % settings.tensor_parallel:
        raise UserError(
            f"distributed.tensor_parallel: got {settings.tensor_parallel} with {size} processes; expected a divisor of "
            "their number"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        store, rank = _met()
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            timeout=timedelta(seconds=settings.timeout),
            # A prefix per session, so that keys of an earlier process group are not reused.
            store=PrefixStore(f"session-{next(_SESSIONS)}", store),
            rank=rank,
            world_size=size,
        )
    return World(dist.get_rank(), size, local_rank, settings)


@cache
def _met() -> tuple[Store, int]:
    """The launcher's store and this process's rank. Cached, because the store closes when it is garbage-collected."""
    store, rank, _ = next(iter(rendezvous("env://")))
    return store, rank


def is_broken_collective(problem: BaseException) -> bool:
    """Whether an error is that of a collective call whose peer is lost or late. gloo's errors are recognized by their
    text.
    """
    if isinstance(problem, dist.DistError):
        return True
    return isinstance(problem, RuntimeError) and any(sign in str(problem).lower() for sign in _BROKEN_SIGNS)


def rendezvous_store() -> Store:
    """The store of the process group."""
    return _get_default_store()


def destroy_distributed(world: World) -> None:
    """Destroys the process group of a run with several processes."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
