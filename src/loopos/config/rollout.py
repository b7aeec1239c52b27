"""The section `rollout`: which processes write the responses of PPO, and how far behind the policy they may be.

Enters: nothing but values. Leaves: `RolloutEngineSection`, and `Finding`s for what it cannot be together with. Left
out: how responses are sampled (`ppo_sections.RolloutSection`, the section `generation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from loopos.config.faults import Finding
from loopos.config.keys import Count, Duration, Section, Text
from loopos.config.ppo_sections import PpoTrainingSection, RolloutSection


class RolloutEngineSection(Section):
    """Which processes write the responses, and how far behind the policy they may be."""

    engine: Literal["local", "ray", "vllm"] = Field(
        default="local",
        description="what writes responses: the processes that train, or workers of Ray with the same engine or with "
        "vLLM (CUDA); the last two need the extra cluster",
    )
    workers: Count = Field(default=2, description="workers that write responses")
    address: Text | None = Field(
        default=None, description='address of a Ray cluster ("host:port"); null starts Ray on this machine alone'
    )
    cpus_per_worker: Count = Field(default=1, description="cores that Ray sets aside for a worker")
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="GPUs that Ray sets aside for a worker, or a part of one; 0, and 1 for vLLM, if absent",
    )
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="iterations that the policy which writes may be behind; 0: it is the newest, above 0 the next "
        "responses are written while training goes on",
    )
    importance_cap: Annotated[float, Field(ge=1)] | None = Field(
        default=None,
        description="bound of the weight π/μ of a token by the policy μ that wrote it, while the clipped ratio is to "
        "the policy π before the update; null: the clipped ratio is to μ itself",
    )
    timeout: Duration = Field(
        default=600.0,
        description="time without an answer after which a worker's prompts are given to another too; three times it, "
        'and the worker counts as lost (seconds, or "90s", "30m", "2h")',
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        default=8, description="lost workers that are started anew; then the run goes on with fewer"
    )

    @property
    def is_remote(self) -> bool:
        """Whether other processes than those that train write."""
        return self.engine != "local"

    @property
    def gpus(self) -> float:
        """GPUs of a worker."""
        if self.gpus_per_worker is not None:
            return self.gpus_per_worker
        return 1.0 if self.engine == "vllm" else 0.0


def check_rollout(
    rollout: RolloutEngineSection, training: PpoTrainingSection, generation: RolloutSection
) -> Iterator[Finding]:
    """What the engine cannot do."""
    if rollout.max_staleness > 0 and not rollout.is_remote:
        given = f'{rollout.max_staleness} with rollout.engine "local"'
        yield Finding(("rollout.max_staleness", "rollout.engine"), given, '0, or rollout.engine "ray" or "vllm"')
    if rollout.engine != "vllm":
        return
    if training.trainable == "lora":
        given = '"vllm" with training.trainable "lora"'
        yield Finding(("rollout.engine", "training.trainable"), given, '"ray", or training.trainable "all"')
    if rollout.gpus == 0:
        yield Finding(("rollout.gpus_per_worker", "rollout.engine"), '0 with rollout.engine "vllm"', "above 0")
    if generation.temperature != 1 and (generation.top_k is not None or generation.top_p < 1):
        fields = ("generation.temperature", "rollout.engine")
        given = f'{generation.temperature} with top_k or top_p and rollout.engine "vllm"'
        hint = "vLLM does not tell the log-probabilities of the full distribution at a temperature then"
        yield Finding(fields, given, '1, or neither top_k nor top_p, or rollout.engine "ray"', hint)


def rollout_effects(rollout: RolloutEngineSection) -> dict[str, tuple[bool, str]]:
    """Keys that may have no effect → whether they have one, and the reason why not."""
    remote = (rollout.is_remote, "rollout.engine is local")
    keys = ("workers", "address", "cpus_per_worker", "gpus_per_worker", "timeout", "restarts")
    capped = (rollout.importance_cap is None, "with rollout.importance_cap the old policy is that of a forward pass")
    return {**{f"rollout.{key}": remote for key in keys}, "training.old_logprobs": capped}
