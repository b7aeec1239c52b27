"""What a rollout worker needs to open the policy's model; it travels to the worker with its start.

Apart from the engines that open it, so that neither imports the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

# A worker with vLLM imports none of them.
if TYPE_CHECKING:
    from loopos.config.environments import EnvironmentSection
    from loopos.config.sections import TrainingSection
    from loopos.models.load import Sizes


@dataclass(frozen=True, kw_only=True)
class EngineRecipe:
    """What a worker needs to open the policy's model in LoopOS's engine. `training`: how the policy's adapters are
    made, if it trains as some; their base must have this `fingerprint`, because only the adapters are sent. `adapter`:
    the folder of those that train on. `environment`: what the policy plays, under `chat_template`. `gpus`: of a worker.
    """

    pretrained_weights: str
    sizes: Sizes
    tokenizer: str | None
    trust_remote_code: bool
    fingerprint: str
    training: TrainingSection | None
    adapter: str | None
    number_format: Literal["bf16", "fp32"]
    gpus: float
    environment: EnvironmentSection | None = None
    chat_template: str = "auto"


@dataclass(frozen=True, kw_only=True)
class VllmRecipe:
    """What a worker needs to open the policy's model in vLLM, which reads no weights: they are sent. `files`: name →
    bytes of config and tokenizer. `end_tokens`: those that end a response beside the request's own. `max_length`:
    maximum tokens of prompt and response, None for the model's own limit. `logprobs_mode`: vLLM's name of the returned
    log-probabilities. `gpus`: of a worker, 0 for vLLM's CPU build.
    """

    files: Mapping[str, bytes]
    trust_remote_code: bool
    end_tokens: tuple[int, ...]
    number_format: Literal["bf16", "fp32"]
    gpus: float
    max_length: int | None
    logprobs_mode: str


WorkerRecipe: TypeAlias = EngineRecipe | VllmRecipe
