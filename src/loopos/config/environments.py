"""The section of an environment: which one, how its calls are read, and the limits of an episode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from loopos.config.diagnostics import Problem
from loopos.config.keys import Count, Section, VariantName
from loopos.config.rl import RolloutEngineSection, RolloutSection
from loopos.config.variants import ENVIRONMENTS


class EnvironmentSection(Section):
    """An environment that the model acts in by calls of tools, and the limits of an episode."""

    name: Annotated[str, VariantName(ENVIRONMENTS, imports=False)] = Field(
        description='an environment of `loopos list environments`, or "module:Class"'
    )
    tool_parser: str = Field(
        default="auto",
        description='a parser of `loopos list tool-parsers`, or "module:function"; auto reads what the template writes',
    )
    max_turns: Count = Field(default=8, description="turns of the model; calls of the last one are not made")
    max_tokens: Count = Field(default=2048, description="tokens after the prompt, of the model and of tools")
    max_seconds: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="seconds of an episode; null is no limit, which a resumed run needs to be exact"
    )
    tool_seconds: Annotated[float, Field(gt=0)] = Field(default=10.0, description="seconds of one call of a tool")
    isolation: Literal["thread", "process"] = Field(
        default="thread",
        description="where tools run: thread is this process, for tools that you trust; process is a process for each "
        "episode, contained, without network and your files",
    )
    tool_memory: Annotated[int, Field(ge=64)] = Field(
        default=512, description='MiB of memory of an episode\'s processes, with isolation "process"'
    )
    tool_processes: Count = Field(
        default=16, description='processes and threads of an episode at once, with isolation "process"'
    )
    reward_weight: float = Field(
        default=1.0, description="weight of the environment's own reward, beside those of reward.functions"
    )
    max_result_characters: Count = Field(default=4000, description="characters of a tool's result that the model sees")


def check_environment(
    environment: EnvironmentSection, rollout: RolloutEngineSection, generation: RolloutSection
) -> Iterator[Problem]:
    """Refuse engines that play no environments, and settings of single turns."""
    if rollout.engine == "vllm":
        fields = ("environment", "rollout.engine")
        yield Problem(fields, 'with rollout.engine "vllm"', '"local" or "ray", which play environments')
    if rollout.max_staleness > 0:
        fields = ("environment", "rollout.max_staleness")
        hint = "episodes are not stored ahead of training"
        yield Problem(fields, f"with max_staleness {rollout.max_staleness}", "max_staleness 0", hint)
    if generation.stop:
        fields = ("generation.stop", "environment")
        hint = "stop strings cut a turn before its end token"
        yield Problem(fields, f"{len(generation.stop)} stop strings with an environment", "none", hint)
    if generation.overlong_buffer is not None:
        fields = ("generation.overlong_buffer", "environment")
        hint = "max_new_tokens limits a turn, and environment.max_tokens an episode"
        yield Problem(fields, f"{generation.overlong_buffer:g} with an environment", "null", hint)
