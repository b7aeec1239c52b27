"""A cluster as numbers: how many GPUs, what each holds, how fast they speak.

Enters: the words of options. Leaves: `Cluster`, and the time of a transfer in a group of its GPUs. Left out: what is
sent (`traffic`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loopos.config.faults import UserError

FREE_SHARE = 0.1
"""Share of a GPU's memory that is left to the driver, to the communication's own buffers and to the gaps between
tensors: reckoned, not measured."""
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
        """A cluster of options. Raises `UserError`."""
        if gpus < 1 or gpus_a_node < 1:
            raise UserError(f"--gpus {gpus}, --gpus-a-node {gpus_a_node}: wanted 1 or more of each")
        if gpus > gpus_a_node and gpus % gpus_a_node:
            raise UserError(
                f"--gpus {gpus}: not whole nodes of {gpus_a_node} GPUs; wanted a multiple, or another --gpus-a-node"
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
        """Bytes of a GPU that a run may fill."""
        return round((1 - FREE_SHARE) * self.memory)

    def ring_seconds(self, sent: float, *, size: int, stride: int) -> float:
        """Time in which each GPU of a group of `size`, every `stride`-th GPU, sends so many bytes to the next.

        Where the group spans nodes, the groups that have a GPU on a node share its network cards, and a ring leaves a
        node once: seconds = sent · groups on the node / between. Inside a node: sent / inside.
        """
        if size == 1:
            return 0.0
        if size * stride <= self.gpus_a_node:
            return sent / self.inside
        members = max(1, self.gpus_a_node // stride)
        return sent * max(1 / self.inside, (self.gpus_a_node // members) / self.between)


def _amount(option: str, given: str, units: tuple[str, ...], *, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)(b|bit)(?:/s)?\s*", given.lower())
    if found is None or found[3] not in units or float(found[1]) == 0:
        raise UserError(f"{option}: got {given!r}; give a unit, for example {example}")
    return float(found[1]) * _BYTES[found[2]] / (8 if found[3] == "bit" else 1)


def _rate(option: str, given: str) -> float:
    return _amount(option, given, ("b", "bit"), example="400Gbit or 50GB")
