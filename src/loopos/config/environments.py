"""The section of an environment: which one, how its calls are read, and the limits of an episode."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loopos.config.keys import Count, Section, VariantName
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
    max_result_characters: Count = Field(default=4000, description="characters of a tool's result that the model sees")
