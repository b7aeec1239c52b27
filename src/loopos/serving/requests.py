"""JSON bodies → checked requests: one pydantic class per kind of body.

An unsupported parameter is refused, unless its value has no effect; null is the same as absent, and as empty content in
an assistant message. `language.py` and `heads.py` check whether the model can take the request.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError

from loopos.config.diagnostics import UserError
from loopos.data.tool_schemas import Tool
from loopos.generation.grammars import ANY_OBJECT
from loopos.generation.settings import SamplingFields, SamplingParams
from loopos.serving.errors import ApiError, unknown_model
from loopos.serving.messages import Body, ChatMessage, ToolDefinition, short

# OpenAI's default when a completions request sets no number.
COMPLETION_TOKENS = 16

_DEFAULTS = SamplingFields()
# What is not here a request writes in another way: the number of tokens, one stop or several, no seed for a random one.
_SAME_FIELDS = tuple(
    each.name for each in fields(SamplingFields) if each.name not in ("max_new_tokens", "stop", "seed")
)


def _kind_of_inputs(value: object) -> str:
    """By the first item: so a list is validated once, and its first error ends it, however long it is."""
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


class NamedSchema(Body):
    """A schema that the answer follows. `name`, `description` and `strict` have no effect: it always follows it."""

    name: str
    # Named as in the API; `schema` is a method of pydantic's models.
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def schema_text(self) -> str | None:
        """The schema as JSON text; None for text. Raises `ApiError`."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return ANY_OBJECT
        if self.json_schema is None:
            param = "response_format.json_schema"
            raise ApiError(400, f"{param}: missing; expected a value", param=param, code="missing_required_parameter")
        return json.dumps(self.json_schema.schema_, ensure_ascii=False)


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False


class ModelRequest(Body):
    """The fields of every request."""

    model: str


class Generation(ModelRequest):
    """The fields that chat and completions share."""

    # OpenAI's default and ranges, where they differ from those of the settings.
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: float = _DEFAULTS.top_p
    top_k: int = _DEFAULTS.top_k
    min_p: float = _DEFAULTS.min_p
    typical_p: float = _DEFAULTS.typical_p
    repetition_penalty: float = _DEFAULTS.repetition_penalty
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = _DEFAULTS.presence_penalty
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = _DEFAULTS.frequency_penalty
    no_repeat_ngram: int = _DEFAULTS.no_repeat_ngram
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict
    )
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] = Field(default_factory=list)
    seed: int | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def settings(self) -> SamplingParams:
        """The sampling settings, without the number of new tokens; a random seed if none is set. Raises `ApiError`."""
        try:
            return SamplingParams(
                **{name: getattr(self, name) for name in _SAME_FIELDS},
                logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                seed=secrets.randbits(63) if self.seed is None else self.seed,
            )
        except UserError as error:
            first = str(error).splitlines()[0]
            raise ApiError(400, first, param=first.partition(":")[0], code="invalid_value") from error

    def new_tokens(self) -> tuple[int | None, str]:
        """The requested maximum of new tokens, and the parameter that sets it."""
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
    tools: Annotated[list[ToolDefinition], Field(fail_fast=True)] = Field(default_factory=list)
    # A call cannot be forced: nothing writes one but the model.
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: Literal[True] = True
    response_format: ResponseFormat | None = None

    def settings(self) -> SamplingParams:
        schema = None if self.response_format is None else self.response_format.schema_text()
        return replace(super().settings(), json_schema=schema)

    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model may call, as templates take them. Raises `ApiError`."""
        if self.tool_choice == "none":
            return ()
        if self.tools and self.response_format is not None and self.response_format.type != "text":
            raise ApiError(
                400,
                "response_format: with tools an answer may be a call; expected text, or tool_choice none",
                param="response_format",
                code="invalid_value",
            )
        return tuple(each.model_dump(exclude_none=True) for each in self.tools)

    def new_tokens(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


class CompletionRequest(Generation):
    """POST /v1/completions. `logprobs`: 0 returns those of the chosen tokens."""

    prompt: Inputs
    logprobs: int | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        return several(self.prompt, "prompt")

    def new_tokens(self) -> tuple[int | None, str]:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens, "max_tokens"


class EmbeddingRequest(ModelRequest):
    """POST /v1/embeddings."""

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"

    def inputs(self) -> Sequence[str | list[int]]:
        return several(self.input, "input")


class ClassifyRequest(ModelRequest):
    """POST /v1/classify: one text or several, each a text or a pair of texts."""

    input: str | list[str | Annotated[list[str], Field(min_length=2, max_length=2)]]

    def texts(self) -> list[str | tuple[str, str]]:
        actual = [self.input] if isinstance(self.input, str) else self.input
        return [each if isinstance(each, str) else (each[0], each[1]) for each in actual]


class ScoreRequest(ModelRequest):
    """POST /v1/score: a conversation whose last message is scored, or a prompt with one or more responses."""

    messages: Annotated[list[ChatMessage], Field(min_length=2)] | None = None
    prompt: str | Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    response: str | Annotated[list[str], Field(min_length=1)] | None = None


def several(actual: str | list[str] | list[int] | list[list[int]], param: str) -> Sequence[str | list[int]]:
    """One text or one list of tokens, or several of either. Raises `ApiError` for none."""
    if not actual and actual != "":
        raise ApiError(
            400, f"{param}: an empty list; expected at least one text or token", param=param, code="invalid_value"
        )
    if isinstance(actual, str):
        return [actual]
    tokens = [each for each in actual if isinstance(each, int)]
    return [tokens] if tokens else [each for each in actual if not isinstance(each, int)]


_MOST_BIASES = 4096
_TEXT = object()
_TRUTH = object()
# Values of unsupported parameters that have no effect; `_TEXT`, `_TRUTH`: any text, true and false.
_NO_EFFECT: Mapping[str, tuple[object, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    # Identifiers of the end user, which have no effect here.
    "user": (_TEXT,),
    "safety_identifier": (_TEXT,),
    "prompt_cache_key": (_TEXT,),
}
_NO_EFFECT_WITHOUT_TOOLS: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (_TRUTH,),
    "response_format": ({"type": "text"},),
}
_NO_EFFECT_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "annotations": ([],),
    "tool_calls": ([],),
    "reasoning_content": ("",),
    "refusal": ("",),
}
_NO_EFFECT_IN_STREAM_OPTIONS: Mapping[str, tuple[object, ...]] = {"include_obfuscation": (False,)}


Request = TypeVar("Request", bound=ModelRequest)


def read_for(kind: type[Request], raw: bytes, served: str, *, max_messages: int) -> Request:
    """The request in a body, for the model `served`. Raises `ApiError`: 400, or 404 for another model."""
    request = _read(kind, raw, max_messages)
    if request.model != served:
        raise unknown_model(request.model, served)
    return request


def _read(kind: type[Request], raw: bytes, max_messages: int) -> Request:
    body = _effective(_object(raw), _NO_EFFECT)
    if not body.get("tools"):
        # Without tools there is nothing to choose or call.
        body = _effective(body, _NO_EFFECT_WITHOUT_TOOLS)
    for name in ("messages", "prompt"):
        if isinstance(body.get(name), list):
            if any(isinstance(each, dict) for each in body[name]):
                _bounded(name, len(body[name]), max_messages, "messages")
            body[name] = [_effective_message(each) for each in body[name]]
    if isinstance(body.get("logit_bias"), dict):
        _bounded("logit_bias", len(body["logit_bias"]), _MOST_BIASES, "tokens")
    if isinstance(body.get("stream_options"), dict):
        body["stream_options"] = _effective(body["stream_options"], _NO_EFFECT_IN_STREAM_OPTIONS)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        _refuse(error, body, kind)


def _bounded(name: str, number: int, most: int, what: str) -> None:
    """Raises `ApiError` for more items than allowed, before anything is built from them."""
    if number > most:
        raise ApiError(
            400, f"{name}: {number:,} {what}; this server's limit is {most:,}", param=name, code="invalid_value"
        )


def _object(raw: bytes) -> dict[str, Any]:
    """A JSON object. Refuses lone surrogates too, which no text contains."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        if b"\\ud" in raw.lower():
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not valid JSON: {error.msg} at {position}", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error).splitlines()[0]}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object; expected {...}", code="invalid_json")
    return body


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _effective(values: Mapping[str, Any], no_effect: Mapping[str, tuple[object, ...]]) -> dict[str, Any]:
    """The values that have an effect: neither null nor one of `no_effect`."""

    def has_no_effect(name: str, value: object) -> bool:
        return any(
            isinstance(value, str)
            if nothing is _TEXT
            else isinstance(value, bool)
            if nothing is _TRUTH
            else type(value) is type(nothing) and value == nothing
            for nothing in no_effect.get(name, ())
        )

    return {name: value for name, value in values.items() if value is not None and not has_no_effect(name, value)}


def _effective_message(message: Any) -> Any:
    """A message without values that have no effect. The assistant's content may be null, as OpenAI's is after a tool
    call or refusal.
    """
    if not isinstance(message, dict):
        return message
    found = _effective(message, _NO_EFFECT_IN_MESSAGE)
    if "content" in message and message["content"] is None:
        found["content"] = "" if message.get("role") == "assistant" else None
    if isinstance(found.get("content"), list):
        found["content"] = [_effective(part, {}) if isinstance(part, dict) else part for part in found["content"]]
    return found


def _refuse(error: ValidationError, body: Mapping[str, Any], kind: type[BaseModel]) -> NoReturn:
    """The first error as an `ApiError`; unsupported parameters come before invalid values."""
    errors = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    first = errors[0]
    param = _dotted_path(first["loc"], body)
    where, code, message = f"{param}: " if param else "", "invalid_value", first["msg"]
    if first["type"] == "extra_forbidden":
        code = "unsupported_parameter"
        message = f"not supported by this server; supported are {', '.join(_fields_at(first['loc'], kind))}"
    elif first["type"] == "missing":
        code, message = "missing_required_parameter", "missing; expected a value"
    elif param.endswith("content"):
        message = "expected a text or a list of text parts; only the assistant's may be null"
    elif first["type"] in ("literal_error", "string_pattern_mismatch"):
        message = f"got {short(first['input'])}; {first['msg'][0].lower()}{first['msg'][1:]}"
    raise ApiError(400, f"{where}{message}", param=param or None, code=code) from error


def _fields_at(path: Sequence[str | int], kind: type[BaseModel]) -> list[str]:
    """The fields of the object at the end of a path."""
    fields = kind.model_fields
    for part in path[:-1]:
        if isinstance(part, str) and part in fields:
            inner = _model_in(fields[part].annotation)
            fields = fields if inner is None else inner.model_fields
    return list(fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The pydantic class inside a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_in(each)) is not None), None)


def _dotted_path(path: Sequence[str | int], body: Mapping[str, Any]) -> str:
    """The dotted path of an error in the body: pydantic's location without the names of its union's members."""
    parts: list[str] = []
    value: Any = body
    for part in path:
        if isinstance(value, dict) and isinstance(part, str) and (part in value or not parts):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif part != path[-1] or not isinstance(value, dict):
            continue
        parts.append(str(part))
    return ".".join(parts)
