"""How a run is laid over a cluster, and the settings that cost more time for less memory, in order.

Enters: what the config or the options ask for. Leaves: `Setting`s, and the words of a config that ask for one. Left
out: what a setting takes (`memory`, `traffic`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from loopos.cli.planning.cluster.hardware import Cluster
from loopos.config.distributed import WHOLE_MATRICES
from loopos.config.faults import UserError

Mode = Literal["replicate", "shard"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What config and options say of the layout. mode: "auto", "replicate" or "shard"; shard_size: None for all."""

    mode: str
    shard_size: int | None
    tensor_parallel: int
    cpu_offload: bool
    reshard_after_forward: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """`shard_size`: GPUs that share one copy of the weights, 1 where each has its own. `splits`: parts that a forward
    pass of the config is cut into, each with so many rows less and so many passes a step more.
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
        """GPUs, or groups of them under tensor parallelism, that see data of their own."""
        return cluster.gpus // self.tensor_parallel

    def check(self, cluster: Cluster) -> None:
        """Raises `UserError` where the cluster cannot be divided so."""
        if cluster.gpus % self.tensor_parallel or self.tensor_parallel > cluster.gpus_a_node:
            raise UserError(
                f"tensor_parallel {self.tensor_parallel}: {cluster.gpus} GPUs, {cluster.gpus_a_node} a node; wanted a "
                "divisor of the GPUs that is not more than a node has"
            )
        if self.copies(cluster) % self.shard_size:
            raise UserError(
                f"shard_size {self.shard_size}: {self.copies(cluster)} copies to share among; wanted a divisor"
            )
        if self.cpu_offload and self.mode == "replicate":
            raise UserError("cpu_offload: the mode is replicate; wanted mode shard, which alone moves weights out")

    def said(self, cluster: Cluster) -> str:
        """In words."""
        shared = f"weights shared by {self.shard_size}" if self.mode == "shard" else "a copy of the weights a GPU"
        if self.mode == "shard" and self.shard_size < self.copies(cluster):
            shared += f", {self.copies(cluster) // self.shard_size} times"
        parts = [self.mode, shared]
        parts += [f"tensor_parallel {self.tensor_parallel}"] if self.tensor_parallel > 1 else []
        parts += ["cpu_offload"] if self.cpu_offload else []
        if self.mode == "shard":
            parts.append("weights gathered twice a pass" if self.reshard_after_forward else "gathered once a pass")
        parts.append("activations computed twice" if self.checkpointing else "activations kept")
        return "; ".join(parts)

    def words(self, asked: Setting, cluster: Cluster, *, rows: int | None, accumulation: int) -> list[str]:
        """The words of a config, KEY=VALUE, that make this setting of the one that was asked for. rows: `batch_size`
        where it is the rows of a forward pass.
        """
        changed = []
        if self.splits != asked.splits:
            changed += [f"training.batch_size={rows // self.splits}"] if rows is not None else []
            changed.append(f"training.gradient_accumulation={accumulation * self.splits}")
        if self.checkpointing != asked.checkpointing:
            changed.append(f"training.gradient_checkpointing={str(self.checkpointing).lower()}")
        if self.mode != asked.mode or self.shard_size != asked.shard_size:
            changed.append(f"distributed.mode={self.mode}")
            if self.mode == "shard" and self.shard_size < self.copies(cluster):
                changed.append(f"distributed.shard_size={self.shard_size}")
        if self.cpu_offload != asked.cpu_offload:
            changed.append(f"distributed.cpu_offload={str(self.cpu_offload).lower()}")
        return changed


def cheaper_in_memory(asked: Setting, cluster: Cluster, *, rows: int, optimizer: str) -> Iterator[Setting]:
    """The setting asked for, then others by what they cost: fewer rows at a time, activations computed twice, weights
    shared inside a node, among all, and kept in the host's memory.
    """
    copies = asked.copies(cluster)
    node = cluster.gpus_a_node // asked.tensor_parallel
    sizes = [asked.shard_size, *(size for size in (node, copies) if size > asked.shard_size and copies % size == 0)]
    layouts = [(size, asked.cpu_offload) for size in dict.fromkeys(sizes)]
    if not asked.cpu_offload and copies > 1:
        layouts.append((copies, True))
    if optimizer in WHOLE_MATRICES:
        layouts = layouts[:1]
    for shard_size, offload in layouts:
        for checkpointing in dict.fromkeys((asked.checkpointing, True)):
            for splits in (number for number in range(1, rows + 1) if rows % number == 0):
                yield replace(
                    asked, shard_size=shard_size, cpu_offload=offload, checkpointing=checkpointing, splits=splits
                )
