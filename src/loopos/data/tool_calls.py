"""Find the calls of tools in text that a model wrote: the text of a turn → its content, calls and malformed calls.

A parser is a function `scan(text, start, ended)`: the next part of the text from `start` on, or None while more text is
needed to tell. So one function reads whole turns and streams. `ended`: nothing follows. Parsers are listed by
`loopos list tool-parsers`; `tool_turns.py` chooses the one that reads what the chat template writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from loopos.data.record import shown


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of the tool `name`."""

    name: str
    arguments: dict[str, Any]

    def as_message(self, identity: str) -> dict[str, Any]:
        """The call as messages hold it, with `identity` as its id."""
        return {"id": identity, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a text up to `end`: content, calls, or a malformed call, which is content and says why in
    `malformed`.
    """

    end: int
    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    malformed: str = ""


Scan: TypeAlias = Callable[[str, int, bool], Part | None]


@dataclass(slots=True)
class ToolReader:
    """Reads one turn, as it grows or at once. `content`: the text outside of calls, malformed ones included;
    `malformed`: why each malformed call is none.
    """

    scan: Scan
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    _position: int = 0
    _after_call: bool = False

    def read(self, text: str, *, ended: bool) -> tuple[str, list[ToolCall]]:
        """The new content and calls. text: the whole turn so far; ended: it is complete."""
        content, calls = "", list[ToolCall]()
        while self._position < len(text):
            part = self.scan(text, self._position, ended)
            if part is None:
                break
            assert part.end > self._position, "a parser of tool calls that does not advance"
            self._position = part.end
            # White space between a call and what follows belongs to the format.
            new = part.content.lstrip() if self._after_call else part.content
            self._after_call = bool(part.calls) or (self._after_call and not new)
            content, calls = content + new, [*calls, *part.calls]
            self.malformed += [part.malformed] if part.malformed else []
        self.content += content
        self.calls += calls
        return content, calls


def parse_turn(scan: Scan, text: str) -> ToolReader:
    """A whole turn, read."""
    reader = ToolReader(scan)
    reader.read(text, ended=True)
    return reader


def hermes(text: str, start: int, ended: bool) -> Part | None:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes, Qwen and SmolLM3 write it."""
    opening, closing = "<tool_call>", "</tool_call>"
    before = _content_before(opening, text, start, ended)
    if before is not None:
        return before if before.end > start else None
    inner = text.find(opening, start) + len(opening)
    end = _json_end(text, inner)
    if end is None and not ended:
        return None
    # Without the end of an object, what is inside the marks is malformed.
    close = text.find(closing, inner if end is None else end)
    between = text[inner if end is None else end : close if close >= 0 else len(text)]
    if close < 0 and not ended:
        return None
    stop = close + len(closing) if close >= 0 else len(text)
    if end is None or between.strip():
        reason = "is not complete" if end is None and close < 0 else "is not one JSON object"
        return Part(stop, text[start:stop], malformed=f"a tool call {reason}: {shown(text[inner:stop])}")
    return _called(text, start, stop, text[inner:end])


def llama3(text: str, start: int, ended: bool) -> Part | None:
    """`{"name": ..., "parameters": {...}}` as the whole turn, or after `<|python_tag|>`; several with ";" between."""
    mark = "<|python_tag|>"
    follows = start > 0 and _follows_calls(mark, text, start)
    if start == 0 or follows:
        first = _past_space(text, start, ";" if follows else "")
        if first == len(text) and not ended:
            return None
        if text.startswith("{", first) and _may_be_call(text, first):
            return _bare(text, start, first, ended)
    before = _content_before(mark, text, start, ended)
    if before is not None:
        return before if before.end > start else None
    inner = _past_space(text, text.find(mark, start) + len(mark))
    if inner == len(text) and not ended:
        return None
    if text.startswith("{", inner):
        return _bare(text, start, inner, ended, marked=True)
    if not ended:
        return None
    return Part(len(text), text[start:], malformed=f"a tool call is not a JSON object: {shown(text[inner:])}")


def _follows_calls(mark: str, text: str, start: int) -> bool:
    """Whether the text before `start` is nothing but calls, from its beginning or from the last mark on."""
    marked = text.rfind(mark, 0, start)
    before, position = text[:start], _past_space(text, marked + len(mark) if marked >= 0 else 0)
    while position < len(before):
        end = _json_end(before, position) if _may_be_call(before, position) else None
        if end is None:
            return False
        position = _past_space(before, end, ";")
    return True


_NAMED_CALL = re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\])?\s*(?=\{)")


def mistral(text: str, start: int, ended: bool) -> Part | None:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, and `[TOOL_CALLS]name{...}` of the tokenizers since v11."""
    mark = "[TOOL_CALLS]"
    before = _content_before(mark, text, start, ended)
    if before is not None:
        return before if before.end > start else None
    inner = text.find(mark, start) + len(mark)
    named = _NAMED_CALL.match(text, inner)
    first = named.end() if named is not None else _past_space(text, inner)
    end = _json_end(text, first)
    if end is not None:
        return _called(text, start, end, text[first:end], named[1] if named is not None else None)
    if not ended:
        return None
    following = text.find(mark, inner)
    limit = following if following >= 0 else len(text)
    return Part(limit, text[start:limit], malformed=f"a tool call is not complete: {shown(text[inner:limit])}")


_FENCE = re.compile(r"```[a-z_]*[ \t]*\n?\s*")


def plain_json(text: str, start: int, ended: bool) -> Part | None:
    """`{"name": ..., "arguments": {...}}`, or a list of such, as the whole turn, also in a fenced block."""
    if start > 0:
        return Part(len(text), text[start:])
    first = _past_space(text, 0)
    if first == len(text):
        return Part(len(text), text) if ended else None
    fence = _FENCE.match(text, first)
    if fence is None and "```json\n".startswith(text[first:]) and not ended:
        return None
    inner = fence.end() if fence is not None else first
    if inner == len(text) and not ended:
        return None
    if text[inner : inner + 1] not in ("{", "[") or not _may_be_call(text, inner):
        return Part(len(text), text)
    end = _json_end(text, inner)
    if end is None:
        return _bare(text, 0, inner, ended)
    if fence is None:
        return _bare(text, 0, inner, ended)
    closing = text.find("```", end)
    if closing < 0 and not ended:
        return None
    found = _bare(text, 0, inner, ended)
    if found is None or not found.calls or closing < 0 or text[end:closing].strip():
        return found
    return Part(closing + 3, calls=found.calls)


def _content_before(mark: str, text: str, start: int, ended: bool) -> Part | None:
    """The content before the next `mark`, without white space before it; None if the mark is next. While the text
    grows, white space and the beginning of a mark at its end wait; then the part may be empty.
    """
    position = text.find(mark, start)
    if position < 0 and ended:
        return Part(len(text), text[start:])
    end = position if position >= 0 else len(text) - _started(mark, text)
    content = text[start : max(start, end)].rstrip()
    return Part(start + len(content), content) if content or position < 0 else None


def _started(mark: str, text: str) -> int:
    """How many characters at the end of the text begin the mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)


def _past_space(text: str, start: int, more: str = "") -> int:
    while start < len(text) and (text[start].isspace() or text[start] in more):
        start += 1
    return start


_FIRST_KEY = re.compile(r'[\[{\s]*(?:"([^"\\]*)(")?)?')
_CALL_KEYS = ("name", "type", "function", "id", "arguments", "parameters")


def _may_be_call(text: str, start: int) -> bool:
    """Whether a text that begins with an object may be a call, by its first key as far as it is written."""
    found = _FIRST_KEY.match(text, start)
    assert found is not None
    if found[1] is None:
        return found.end() == len(text)
    return found[1] in _CALL_KEYS if found[2] else any(key.startswith(found[1]) for key in _CALL_KEYS)


def _bare(text: str, start: int, first: int, ended: bool, *, marked: bool = False) -> Part | None:
    """The call that begins at `first` without a mark, where an object that is no call is content."""
    end = _json_end(text, first)
    if end is None:
        if not ended:
            return None
        looks_so = marked or re.match(r'[\[{\s]*"name"\s*:', text[first:]) is not None
        reason = f"a tool call is not complete: {shown(text[first:])}" if looks_so else ""
        return Part(len(text), text[start:], malformed=reason)
    if not marked and re.search(r'"(arguments|parameters)"\s*:', text[first:end]) is None:
        return Part(end, text[start:end])
    return _called(text, start, end, text[first:end])


def _json_end(text: str, start: int) -> int | None:
    """Where the object or list that begins at `start`, after white space, ends by its brackets; None if it does not."""
    depth, in_string, escaped = 0, False, False
    start = _past_space(text, start)
    if text[start : start + 1] not in ("{", "["):
        return None
    for position in range(start, len(text)):
        character = text[position]
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if not depth:
                return position + 1
    return None


def _called(text: str, start: int, end: int, source: str, name: str | None = None) -> Part:
    """The part whose calls are written in JSON. name: of the tool, if `source` has its arguments only."""
    try:
        # Small models write line ends within strings.
        value = json.loads(source, strict=False, parse_constant=_no_constant)
        calls = [{"name": name, "arguments": value}] if name is not None else value
        found = tuple(_call_of(each) for each in (calls if isinstance(calls, list) else [calls]))
        if not found:
            raise ValueError("an empty list")
    except (ValueError, RecursionError) as problem:
        return Part(end, text[start:end], malformed=f"a tool call cannot be read ({problem}): {shown(source)}")
    return Part(end, calls=found)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _call_of(value: object) -> ToolCall:
    """Raises `ValueError` that says what is missing."""
    function = value.get("function", value) if isinstance(value, dict) else value
    if isinstance(function, str) and isinstance(value, dict):
        function = {**value, "name": function}
    if not isinstance(function, dict):
        raise ValueError('expected an object with "name" and "arguments"')
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError('no "name"')
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, strict=False) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" is not an object')
    return ToolCall(name, arguments)
