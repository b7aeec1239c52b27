"""The section `distributed`: how the processes of a run share its model, and what they expect of each other.

Enters: nothing but values. Leaves: `DistributedSection`, and what contradicts it. Left out: how many processes there
are, which the launcher says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from loopos.config.faults import Finding
from loopos.config.keys import Count, Duration, Section

WHOLE_MATRICES = ("muon", "adafactor")
"""Optimizers whose rule for a matrix needs all of its rows."""


class DistributedSection(Section):
    """Without effect in a run of one process."""

    mode: Literal["auto", "replicate", "shard"] = Field(
        default="auto", description="whether each process holds the whole model, or a share of it (FSDP2)"
    )
    shard_size: Count | None = Field(
        default=None,
        description="processes, or groups that split layers, that share one copy of the model; all when absent",
    )
    tensor_parallel: Count = Field(
        default=1, description="processes that split every layer among them and see the same rows; a divisor of all"
    )
    cpu_offload: bool = Field(
        default=False, description="weights, gradients and optimizer rest in the host's memory (shard on CUDA)"
    )
    reshard_after_forward: bool = Field(
        default=True, description="let go of the others' shares of a layer between its forward and its backward pass"
    )
    timeout: Duration = Field(
        default=600.0, description='time after which a collective counts as hung (seconds, or "90s", "30m", "2h")'
    )
    silence: Duration = Field(
        default=20.0, description='time without a sign of life after which a process counts as lost (seconds, or "90s")'
    )


def check_distributed(distributed: DistributedSection, optimizer: str) -> Iterator[Finding]:
    """Keys of sharding against each other and against the optimizer."""
    if distributed.mode == "shard" and optimizer in WHOLE_MATRICES:
        fields = ("training.optimizer", "distributed.mode")
        hint = "its rule needs whole matrices, of which a process holds some rows"
        yield Finding(fields, f'{optimizer} with mode "shard"', 'sgd, adam or adamw, or mode "replicate"', hint)
    if distributed.tensor_parallel > 1 and optimizer in WHOLE_MATRICES:
        fields = ("training.optimizer", "distributed.tensor_parallel")
        given = f"{optimizer} with tensor_parallel {distributed.tensor_parallel}"
        hint = "its rule needs whole matrices, of which a process holds a part"
        yield Finding(fields, given, "sgd, adam or adamw, or tensor_parallel 1", hint)
    if distributed.mode == "replicate":
        for name in ("shard_size", "cpu_offload", "reshard_after_forward"):
            given = getattr(distributed, name)
            if given != DistributedSection.model_fields[name].default:
                fields = (f"distributed.{name}", "distributed.mode")
                yield Finding(fields, f'{str(given).lower()} with mode "replicate"', 'mode "shard" or "auto"')
