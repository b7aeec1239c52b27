"""What requests may say: a class for each kind of body.

Enters: JSON without what asks for nothing. Leaves: frozen requests, checked by pydantic, and the settings of generation
that they ask for. Left out: reading the bytes and refusing them (`requests.py`), whether the model can take it
(`language.py`, `heads.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from loopos.config.faults import UserError
from loopos.data.conversations import Message
from loopos.deploy.serving.errors import ApiError
from loopos.generation.settings import SamplingSettings

# What OpenAI's own default is when completions name no number.
COMPLETION_TOKENS = 16


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _kind_of_content(value: object) -> str:
    return "text" if isinstance(value, str) else "parts"


def _kind_of_inputs(value: object) -> str:
    """By the first of them: a list is then read once, and its first fault ends it, however long it is."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    return "tokens" if isinstance(first, int) else "lists of tokens" if isinstance(first, list) else "texts"


Tokens = Annotated[list[int], Field(fail_fast=True)]
Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Field(fail_fast=True), Tag("lists of tokens")],
    Discriminator(_kind_of_inputs),
]
"""One text or list of tokens, or several of either."""


class ChatMessage(Body):
    """One message. `name` stands in the prompt, so that it may hold no control token."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("parts")],
        Discriminator(_kind_of_content),
    ]
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = None

    def message(self) -> Message:
        """As the chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, content, more={} if self.name is None else {"name": self.name})


class StreamOptions(Body):
    """What a stream holds besides."""

    include_usage: bool = False


class Asked(Body):
    """What every request says."""

    model: str


class Generation(Asked):
    """What chat and completions share."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    no_repeat_ngram: int = 0
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = {}
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    seed: int | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def settings(self) -> SamplingSettings:
        """How tokens are chosen, with the number of new ones left open; without a seed any. Raises `ApiError`."""
        try:
            return SamplingSettings(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                typical_p=self.typical_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                no_repeat_ngram=self.no_repeat_ngram,
                logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                seed=secrets.randbits(63) if self.seed is None else self.seed,
            )
        except UserError as error:
            first = str(error).splitlines()[0]
            raise ApiError(400, first, param=first.partition(":")[0], code="invalid_value") from error

    def new_tokens(self) -> tuple[int | None, str]:
        """The most new tokens that were asked for, and the parameter that did."""
        return self.max_tokens, "max_tokens"

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    def new_tokens(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


class CompletionRequest(Generation):
    """POST /v1/completions. `logprobs`: 0 gives those of the tokens themselves."""

    prompt: Inputs
    logprobs: int | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        return several(self.prompt, "prompt")

    def new_tokens(self) -> tuple[int | None, str]:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens, "max_tokens"


class EmbeddingRequest(Asked):
    """POST /v1/embeddings."""

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"

    def inputs(self) -> Sequence[str | list[int]]:
        return several(self.input, "input")


class ClassifyRequest(Asked):
    """POST /v1/classify: a text, or several, each a text or a pair of texts."""

    input: str | list[str | Annotated[list[str], Field(min_length=2, max_length=2)]]

    def texts(self) -> list[str | tuple[str, str]]:
        given = [self.input] if isinstance(self.input, str) else self.input
        return [each if isinstance(each, str) else (each[0], each[1]) for each in given]


class ScoreRequest(Asked):
    """POST /v1/score: a conversation whose last message is judged, or a prompt with one response or several."""

    messages: Annotated[list[ChatMessage], Field(min_length=2)] | None = None
    prompt: str | Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    response: str | Annotated[list[str], Field(min_length=1)] | None = None


def several(given: str | list[str] | list[int] | list[list[int]], param: str) -> Sequence[str | list[int]]:
    """One text or one list of tokens, or several of either. Raises `ApiError` for none."""
    if not given and given != "":
        raise ApiError(
            400, f"{param}: an empty list; expected at least one text or token", param=param, code="invalid_value"
        )
    if isinstance(given, str):
        return [given]
    tokens = [each for each in given if isinstance(each, int)]
    return [tokens] if tokens else [each for each in given if not isinstance(each, int)]
