"""Read tools and tool calls into the form that chat templates use.

    {"type": "function", "function": {"name": ..., "description": ..., "parameters": {JSON Schema}}}

A tool without the outer object gets it; arguments and lists in JSON text are parsed. Calls are not checked against
their schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from loopos.data.record import in_order, kind_name, shown, structure_of
from loopos.data.row_fields import RowFields

Tool: TypeAlias = Mapping[str, Any]
CALLS, OLD_CALL = "tool_calls", "function_call"
TOOL_NAMES = (frozenset({"tools"}), frozenset({"tool_defs", "tool_definitions"}), frozenset({"functions"}))
"""The names of a column of tools in tiers."""

_TOOL_EXPECTED = 'a tool such as {"type": "function", "function": {"name": ..., "parameters": {...}}}'
_TOOLS_EXPECTED = "a list of tools, also as JSON text"
_CALL_EXPECTED = 'a call such as {"type": "function", "function": {"name": ..., "arguments": {...}}}'
_CONTENT_EXPECTED = 'a call such as {"name": ..., "arguments": {...}}, or a list of calls, also as JSON text'
_ARGUMENTS_EXPECTED = "an object, also as JSON text"


def tools_of(fields: RowFields) -> tuple[Tool, ...]:
    """The tools of a row, none where it has none; what cannot be read is noted in `fields.problems`."""
    value, field = fields.structure("tools"), fields.field("tools")
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, list):
        fields.add("tools is not a list", field, f"{shown(value)} ({kind_name(value)})", _TOOLS_EXPECTED)
        return ()
    tools = [_tool(fields, f"{field}[{number}]", item) for number, item in enumerate(value)]
    return tuple(tool for tool in tools if tool is not None)


def check_no_tools(fields: RowFields, tools: tuple[Tool, ...]) -> None:
    """Notes tools beside a text that no template touches: nothing would write them."""
    if tools:
        actual, expected = f"{len(tools)} tools with raw text, which no template renders", "messages, or no tools"
        hint = 'write them into the prompt, or leave them out: data.columns: {"tools": null}'
        fields.add("tools beside text", fields.field("tools"), actual, expected, hint)


def with_calls(fields: RowFields, source: str, more: dict[str, object]) -> dict[str, object]:
    """A message's other keys with its calls of tools as templates take them: `function_call`, OpenAI's older name for a
    single call, becomes a list of one, and an empty list goes.
    """
    others = {name: value for name, value in more.items() if name not in (CALLS, OLD_CALL)}
    value = more.get(CALLS)
    if isinstance(value, str):
        value = structure_of(value) or value
    if value is None and OLD_CALL in more:
        value = [{"type": "function", "function": more[OLD_CALL]}]
    if value is None or value == []:
        return others
    if not isinstance(value, list):
        fields.add("tool_calls are no list", f"{source}.{CALLS}", shown(value), f"a list with {_CALL_EXPECTED}")
        return others
    calls = [_call(fields, f"{source}.{CALLS}[{number}]", call) for number, call in enumerate(value)]
    return {**others, CALLS: calls}


def calls_of_content(fields: RowFields, source: str, value: object) -> list[dict[str, object]] | None:
    """The calls that a message's content holds as an object or a list, also as JSON text, where its role says so; None,
    with `fields.problems` filled, if there are none.
    """
    parsed = structure_of(value) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if parsed is None or not calls:
        fields.add("tool call cannot be read", source, f"{shown(value)} ({kind_name(value)})", _CONTENT_EXPECTED)
        return None
    found = [
        _call(fields, f"{source}[{number}]" if len(calls) > 1 else source, each) for number, each in enumerate(calls)
    ]
    return [call if "function" in call else {"type": "function", "function": call} for call in found]


def call_id(number: int) -> str:
    """The id of a conversation's call by its number: nine letters and digits, which Mistral's templates require."""
    return f"call{number:05d}"


def with_ids(more: Mapping[str, object], first: int) -> dict[str, object]:
    """A message's other keys, its calls with ids. first: the number of its first call in the conversation."""
    calls = more.get(CALLS)
    assert isinstance(calls, list), "a message with calls"
    return {**more, CALLS: [{"id": call_id(first + number), **call} for number, call in enumerate(calls)]}


def call_names(more: Mapping[str, object]) -> list[str]:
    """The names of the functions that a message calls, in order."""
    calls = more.get(CALLS)
    found = [_function_of(call).get("name") for call in calls] if isinstance(calls, list) else []
    return [name for name in found if isinstance(name, str)]


def _tool(fields: RowFields, source: str, value: object) -> Tool | None:
    if isinstance(value, str):
        value = structure_of(value) or value
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        fields.add("tool has no name", source, f"{shown(value)} ({kind_name(value)})", _TOOL_EXPECTED)
        return None
    assert isinstance(value, dict)
    outer = {name: item for name, item in value.items() if name != "function"} if function is not value else {}
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        parsed = structure_of(parameters)
        if not isinstance(parsed, dict):
            fields.add("parameters are no object", f"{source}.parameters", shown(parameters), _ARGUMENTS_EXPECTED)
            return None
        function = {**function, "parameters": parsed}
    function = in_order(function, ("name", "description", "parameters"))
    return in_order({"type": "function", **outer, "function": function}, ("type", "function"))


def _call(fields: RowFields, source: str, value: object) -> dict[str, object]:
    function = _function_of(value)
    if not isinstance(value, dict) or not isinstance(function.get("name"), str):
        fields.add("tool call has no name", source, f"{shown(value)} ({kind_name(value)})", _CALL_EXPECTED)
        return {}
    arguments = function.get("arguments")
    is_nested = function is not value
    if isinstance(arguments, str):
        parsed = structure_of(arguments)
        arguments = parsed if parsed is not None else arguments
    if arguments is not None and not isinstance(arguments, dict):
        named = f"{source}.function.arguments" if is_nested else f"{source}.arguments"
        hint = "a call without arguments has {}" if arguments == "" else ""
        fields.add(
            "arguments are no object", named, f"{shown(arguments)} ({kind_name(arguments)})", _ARGUMENTS_EXPECTED, hint
        )
    if arguments is not None:
        function = {**function, "arguments": arguments}
    function = in_order(function, ("name", "arguments"))
    return in_order({**value, "function": function}, ("id", "type", "function")) if is_nested else function


def _function_of(call: object) -> dict[str, Any]:
    """What a call names: under `function`, or beside each other."""
    if not isinstance(call, dict):
        return {}
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}
