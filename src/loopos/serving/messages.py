"""Messages of a chat in a request: their JSON, and the messages that a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from loopos.data.conversations import Message
from loopos.serving.errors import ApiError


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _kind_of_content(value: object) -> str:
    return "text" if isinstance(value, str) else "parts"


Name = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
"""The name of a speaker or a tool. The prompt contains it, so it may hold no control token."""


class CalledFunction(Body):
    """A tool's name and its arguments as JSON text."""

    name: Name
    arguments: str


class CalledTool(Body):
    """A call in a message of the assistant."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolFunction(Body):
    """A tool's name, what it does, and the schema of its arguments. `strict` has no effect."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class ToolDefinition(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ToolFunction


class ChatMessage(Body):
    """One message. `tool_calls` in one of the assistant, `tool_call_id` in one of a tool."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("parts")],
        Discriminator(_kind_of_content),
    ] = ""
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] = []
    tool_call_id: Name | None = None

    def message(self, position: int) -> Message:
        """The message at a position, as the chat template takes it. Raises `ApiError`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        more: dict[str, object] = {} if self.name is None else {"name": self.name}
        for key, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, key) and self.role != role:
                raise _in_message(position, key, f"in a message of the {self.role}; expected one of the {role}")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise _in_message(position, "content", "missing; expected a value", "missing_required_parameter")
        if self.tool_call_id is not None:
            more["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            more["tool_calls"] = [_called_tool(call, position, index) for index, call in enumerate(self.tool_calls)]
        return Message(self.role, content, more=more)


def _called_tool(call: CalledTool, position: int, index: int) -> dict[str, Any]:
    """A call with its arguments as an object, as templates take it. Raises `ApiError`."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        where = f"tool_calls.{index}.function.arguments"
        raise _in_message(position, where, f"got {short(call.function.arguments)}; expected an object as JSON text")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _in_message(position: int, key: str, problem: str, code: str = "invalid_value") -> ApiError:
    param = f"messages.{position}.{key}"
    return ApiError(400, f"{param}: {problem}", param=param, code=code)


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages as the chat template takes them. Raises `ApiError`, also for a result of a tool without an earlier
    call that it answers.
    """
    calls: set[str] = set()
    for position, each in enumerate(messages):
        if each.role == "tool" and each.tool_call_id not in calls:
            actual = "missing" if each.tool_call_id is None else f"got {short(each.tool_call_id)}"
            expected = "expected the id of a call in an earlier message of the assistant"
            raise _in_message(position, "tool_call_id", f"{actual}; {expected}")
        calls |= {call.id for call in each.tool_calls}
    return [each.message(position) for position, each in enumerate(messages)]


def short(value: object) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
