"""A cluster as numbers, the layout of a run on it, and the order of settings that trade time for memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from loopos.config.diagnostics import UserError
from loopos.config.sections import WHOLE_MATRICES

FREE_FRACTION = 0.1
"""Fraction of a GPU's memory left to the driver, to communication buffers and to gaps between tensors: an assumption,
not measured."""
_BYTES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}


@dataclass(frozen=True, slots=True)
class Cluster:
    """`memory` of a GPU (bytes); `inside`: what a GPU sends to the others of its node, `between`: what a node sends to
    the other nodes, by all its network cards together (bytes/s).
    """

    gpus: int
    memory: int
    gpus_a_node: int
    inside: float
    between: float

    @classmethod
    def of(cls, *, gpus: int, memory: str, gpus_a_node: int, inside: str, between: str) -> Cluster:
        """The cluster of command line options. Raises `UserError`."""
        if gpus < 1 or gpus_a_node < 1:
            raise UserError(f"--gpus {gpus}, --gpus-a-node {gpus_a_node}: expected 1 or more of each")
        if gpus > gpus_a_node and gpus % gpus_a_node:
            raise UserError(
                f"--gpus {gpus}: not whole nodes of {gpus_a_node} GPUs; expected a multiple, or another --gpus-a-node"
            )
        return cls(
            gpus,
            round(_amount("--memory", memory, ("b",), example="80GiB")),
            min(gpus, gpus_a_node),
            _rate("--node-link", inside),
            _rate("--interconnect", between),
        )

    @property
    def room(self) -> int:
        """Bytes of a GPU that a run may use."""
        return round((1 - FREE_FRACTION) * self.memory)

    def ring_seconds(self, sent: float, *, size: int, stride: int) -> float:
        """Time in which each GPU of a group of `size`, every `stride`-th GPU, sends this many bytes to the next.

        If the group spans nodes, the groups that have a GPU on a node share its network cards, and a ring leaves a node
        once: seconds = sent · groups on the node / between. Inside a node: sent / inside.
        """
        if size == 1:
            return 0.0
        if size * stride <= self.gpus_a_node:
            return sent / self.inside
        members = max(1, self.gpus_a_node // stride)
        return sent * max(1 / self.inside, (self.gpus_a_node // members) / self.between)


def _amount(option: str, actual: str, units: tuple[str, ...], *, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)(b|bit)(?:/s)?\s*", actual.lower())
    if found is None or found[3] not in units or float(found[1]) == 0:
        raise UserError(f"{option}: got {actual!r}; give a unit, for example {example}")
    return float(found[1]) * _BYTES[found[2]] / (8 if found[3] == "bit" else 1)


def _rate(option: str, actual: str) -> float:
    return _amount(option, actual, ("b", "bit"), example="400Gbit or 50GB")


Mode = Literal["replicate", "shard"]


@dataclass(frozen=True, slots=True)
class RequestedSharding:
    """The layout that config and options request. mode: "auto", "replicate" or "shard"; shard_size: None for all."""

    mode: str
    shard_size: int | None
    tensor_parallel: int
    cpu_offload: bool
    reshard_after_forward: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """`shard_size`: GPUs that shard one copy of the weights, 1 if each has its own. `splits`: parts into which a
    forward pass of the config is cut, each with fewer rows, for more passes per step.
    """

    shard_size: int
    tensor_parallel: int
    cpu_offload: bool
    reshard_after_forward: bool
    checkpointing: bool
    splits: int = 1

    @property
    def mode(self) -> Mode:
        return "replicate" if self.shard_size == 1 else "shard"

    def copies(self, cluster: Cluster) -> int:
        """GPUs, or tensor-parallel groups of them, with data of their own."""
        return cluster.gpus // self.tensor_parallel

    def check(self, cluster: Cluster) -> None:
        """Raises `UserError` if the cluster cannot be divided so."""
        if cluster.gpus % self.tensor_parallel or self.tensor_parallel > cluster.gpus_a_node:
            raise UserError(
                f"tensor_parallel {self.tensor_parallel}: {cluster.gpus} GPUs, {cluster.gpus_a_node} per node; "
                "expected a divisor of the GPUs, at most the GPUs per node"
            )
        if self.copies(cluster) % self.shard_size:
            raise UserError(
                f"shard_size {self.shard_size}: {self.copies(cluster)} copies to divide; expected a divisor"
            )
        if self.cpu_offload and self.mode == "replicate":
            raise UserError("cpu_offload: the mode is replicate; only mode shard offloads weights")

    def summary(self, cluster: Cluster) -> str:
        """A description of the setting."""
        shared = (
            f"weights sharded over {self.shard_size}" if self.mode == "shard" else "one copy of the weights per GPU"
        )
        if self.mode == "shard" and self.shard_size < self.copies(cluster):
            shared += f", {self.copies(cluster) // self.shard_size} times"
        parts = [self.mode, shared]
        parts += [f"tensor_parallel {self.tensor_parallel}"] if self.tensor_parallel > 1 else []
        parts += ["cpu_offload"] if self.cpu_offload else []
        if self.mode == "shard":
            parts.append("weights gathered twice per pass" if self.reshard_after_forward else "gathered once per pass")
        parts.append("activations computed twice" if self.checkpointing else "activations kept")
        return "; ".join(parts)

    def overrides(self, requested: Setting, cluster: Cluster, *, rows: int | None, accumulation: int) -> list[str]:
        """The config overrides, KEY=VALUE, that turn the requested setting into this one. rows: `batch_size` if it is
        the rows of a forward pass.
        """
        changed = []
        if self.splits != requested.splits:
            changed += [f"training.batch_size={rows // self.splits}"] if rows is not None else []
            changed.append(f"training.gradient_accumulation={accumulation * self.splits}")
        if self.checkpointing != requested.checkpointing:
            changed.append(f"training.gradient_checkpointing={str(self.checkpointing).lower()}")
        if self.mode != requested.mode or self.shard_size != requested.shard_size:
            changed.append(f"distributed.mode={self.mode}")
            if self.mode == "shard" and self.shard_size < self.copies(cluster):
                changed.append(f"distributed.shard_size={self.shard_size}")
        if self.cpu_offload != requested.cpu_offload:
            changed.append(f"distributed.cpu_offload={str(self.cpu_offload).lower()}")
        return changed


def cheaper_in_memory(requested: Setting, cluster: Cluster, *, rows: int, optimizer: str) -> Iterator[Setting]:
    """The requested setting, then others by cost: fewer rows at a time, activations recomputed, weights sharded inside
    a node, over all GPUs, and offloaded to the host's memory.
    """
    copies = requested.copies(cluster)
    node = cluster.gpus_a_node // requested.tensor_parallel
    sizes = [
        requested.shard_size,
        *(size for size in (node, copies) if size > requested.shard_size and copies % size == 0),
    ]
    layouts = [(size, requested.cpu_offload) for size in dict.fromkeys(sizes)]
    if not requested.cpu_offload and copies > 1:
        layouts.append((copies, True))
    if optimizer in WHOLE_MATRICES:
        layouts = layouts[:1]
    for shard_size, offload in layouts:
        for checkpointing in dict.fromkeys((requested.checkpointing, True)):
            for splits in (number for number in range(1, rows + 1) if rows % number == 0):
                yield replace(
                    requested, shard_size=shard_size, cpu_offload=offload, checkpointing=checkpointing, splits=splits
                )
