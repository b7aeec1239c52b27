"""Environments: classes whose methods are tools. A class → its tools' schemas, and episodes' states.

An environment is a class that is constructed without arguments, once for each episode. `reset(**row)` gets the columns
of a row of data that it names, or all for `**`, and returns the messages of the episode, or a text as the user's only
message. Each public method with type hints and a docstring is a tool. `reward(messages, row)`, which it may lack,
returns the episode's score, None where it is not judged. `done`, which it may lack, ends the episode after a turn's
calls. `episodes.py` plays them.
"""

from __future__ import annotations

import inspect
import re
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic.errors import PydanticUserError
from typing_extensions import TypedDict

from loopos.config.diagnostics import UserError
from loopos.config.own_function import OwnFunction
from loopos.config.variants import ENVIRONMENTS
from loopos.data.conversations import Message, message_of
from loopos.data.record import shown
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row
from loopos.data.tool_calls import ToolCall
from loopos.data.tool_schemas import Tool
from loopos.evaluation.own_code import number_of

_OTHERS = frozenset({"reset", "reward", "done"})
_MOST_ERRORS = 3


class ArgumentError(ValueError):
    """Arguments that do not fit a tool; the message is for the model."""


@dataclass(frozen=True, slots=True)
class ToolMethod:
    """A method as a tool. `schema`: as chat templates take it."""

    name: str
    schema: Tool
    arguments: TypeAdapter[dict[str, Any]]

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by the types of the method. Raises `ArgumentError`."""
        try:
            return self.arguments.validate_python(dict(arguments))
        except ValidationError as problem:
            errors = problem.errors(include_url=False, include_context=False)
            found = [f"{'.'.join(map(str, each['loc'])) or self.name}: {each['msg']}" for each in errors]
            more = f"; and {len(found) - _MOST_ERRORS} more" if len(found) > _MOST_ERRORS else ""
            raise ArgumentError("; ".join(found[:_MOST_ERRORS]) + more) from problem


class EnvironmentClass:
    """A class of environments. `name`: as the config has it; `tools`: its tools by name."""

    def __init__(self, name: str) -> None:
        """name: of `loopos list environments`, or "module:Class". Raises `UserError` for a class that is none, and for
        methods without hints or docstring.
        """
        self.name = name
        found = ENVIRONMENTS[name].load()
        if not isinstance(found, type) or not callable(getattr(found, "reset", None)):
            raise UserError(f"environment {name}: got {shown(repr(found))}; expected a class with a method reset")
        self.type: type[Any] = found
        methods = [
            key
            for each in reversed(found.__mro__[:-1])
            for key, value in vars(each).items()
            if inspect.isfunction(value) and not key.startswith("_") and key not in _OTHERS
        ]
        self.tools = {key: _tool_of(name, key, getattr(found, key)) for key in dict.fromkeys(methods)}
        self.has_reward = callable(getattr(found, "reward", None))

    @property
    def schemas(self) -> tuple[Tool, ...]:
        """The tools as chat templates take them."""
        return tuple(tool.schema for tool in self.tools.values())

    def begin(self, row: Mapping[str, object], source: str) -> tuple[Any, list[Message]]:
        """A new state and the messages that it begins with. source: of the row, for messages. Raises `UserError`."""
        state = self._own(self.type, "constructor")(about=source)
        columns = self._columns_of_reset(row, source)
        returned = self._own(state.reset, "reset")(about=source, **columns)
        if isinstance(returned, str):
            return state, [Message("user", returned)]
        messages, problem = _messages(returned)
        if problem:
            raise UserError(f"environment {self.name}: reset returned {problem}\n    for {source}")
        return state, messages

    def reward(self, state: Any, messages: Sequence[Message], row: Mapping[str, object], source: str) -> float | None:
        """The score of an episode; None where the environment has none, or does not judge it. Raises `UserError`."""
        return self.score(state, [message.as_template() for message in messages], row, source)

    def score(
        self, state: Any, messages: list[dict[str, object]], row: Mapping[str, object], source: str
    ) -> float | None:
        """As `reward`, of messages as chat templates take them."""
        if not self.has_reward:
            return None
        function = self._own(state.reward, "reward")
        returned = function(messages, dict(row), about=source)
        number = None if returned is None else number_of(returned)
        if returned is not None and number is None:
            expected = "expected a finite number, or None if it is not judged"
            raise function.error(f"returned {shown(repr(returned))}; {expected}\n    for {source}")
        return number

    def call(self, state: Any, call: ToolCall) -> object:
        """What a tool returns, and whatever it raises. Raises `ArgumentError` for arguments that do not fit."""
        tool = self.tools[call.name]
        return getattr(state, call.name)(**tool.checked(call.arguments))

    def _own(self, function: Callable[..., Any], kind: str) -> OwnFunction:
        return OwnFunction(f"environment {self.name}, {kind}", function)

    def _columns_of_reset(self, row: Mapping[str, object], source: str) -> dict[str, object]:
        """The columns that `reset` has parameters for."""
        parameters = list(inspect.signature(self.type.reset).parameters.values())[1:]
        if any(each.kind is each.VAR_KEYWORD for each in parameters):
            return dict(row)
        names = [each.name for each in parameters]
        missing = [each.name for each in parameters if each.default is each.empty and each.name not in row]
        if missing:
            known = ", ".join(row) or "none"
            raise UserError(
                f"environment {self.name}: reset needs the column {missing[0]}; the row has {known}\n    for {source}"
            )
        return {name: row[name] for name in names if name in row}


def _messages(returned: object) -> tuple[list[Message], str]:
    """The messages that `reset` returned, or what is wrong with them."""
    expected = 'expected a text, or messages such as [{"role": "user", "content": "..."}]'
    if not isinstance(returned, list | tuple) or not returned:
        return [], f"{shown(repr(returned))}; {expected}"
    fields = RowFields(Row({}, "reset", None, 0), {})
    found = [message_of(fields, f"message {number}", value) for number, value in enumerate(returned)]
    if fields.problems:
        return [], f"{fields.problems[0][1]}"
    return [message for message in found if message is not None], ""


def _tool_of(environment: str, name: str, method: Callable[..., Any]) -> ToolMethod:
    """A method's schema, from its hints and its docstring in Google's style. Raises `UserError`."""

    def refused(problem: str, expected: str) -> UserError:
        return UserError(f"environment {environment}: the tool {name}{problem}; expected {expected}")

    description, about = _described(inspect.getdoc(method) or "")
    if not description:
        raise refused(" has no docstring", "one that says what it does, which the model reads")
    parameters = list(inspect.signature(method).parameters.values())[1:]
    try:
        hints = typing.get_type_hints(method, include_extras=True)
    except NameError as problem:
        raise refused(f" has a type hint that cannot be read ({problem})", "types that its module knows") from problem
    for each in parameters:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD, each.POSITIONAL_ONLY):
            raise refused(f" has the parameter {each}", "parameters that are passed by name")
        if each.name not in hints:
            raise refused(f" has no type hint for {each.name}", f"a hint such as {each.name}: str")
    unknown = [key for key in about if key not in {each.name for each in parameters}]
    if unknown:
        raise refused(f" documents {unknown[0]}, which is no parameter", "the parameters' names under Args")
    fields = {
        each.name: (
            Annotated[hints[each.name], Field(description=about[each.name])] if each.name in about else hints[each.name]
        )
        for each in parameters
    }
    required = {each.name for each in parameters if each.default is each.empty}
    # A typed dictionary, so that parameters may have the names of pydantic's own methods.
    keys = {key: hint if key in required else typing.NotRequired[hint] for key, hint in fields.items()}
    make: Any = TypedDict
    kind = make(name, keys)
    try:
        with warnings.catch_warnings(action="ignore"):
            adapter = TypeAdapter(with_config(ConfigDict(extra="forbid", coerce_numbers_to_str=True))(kind))
            schema = _plain_schema(adapter.json_schema())
    except (PydanticUserError, TypeError) as problem:
        raise refused(f" has a type hint without a JSON Schema ({_first_line(problem)})", "types of JSON") from problem
    function = {"name": name, "description": description, "parameters": schema}
    return ToolMethod(name, {"type": "function", "function": function}, adapter)


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [""])[0]


_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\*{0,2}\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def _described(docstring: str) -> tuple[str, dict[str, str]]:
    """The text before the sections of a docstring, and what its section Args says of each argument."""
    found = list(_SECTION.finditer(docstring))
    description = docstring[: found[0].start()] if found else docstring
    about: dict[str, str] = {}
    for number, section in enumerate(found):
        if section[1] not in ("Args", "Arguments", "Parameters"):
            continue
        end = found[number + 1].start() if number + 1 < len(found) else len(docstring)
        lines = [line for line in docstring[section.end() : end].splitlines() if line.strip()]
        margin = min((len(line) - len(line.lstrip()) for line in lines), default=0)
        name = ""
        for line in lines:
            argument = _ARGUMENT.match(line[margin:])
            if argument is not None:
                name, about[argument[1]] = argument[1], argument[2].strip()
            elif name:
                about[name] = f"{about[name]} {line.strip()}".strip()
    return " ".join(description.split()), about


def _plain_schema(schema: Any) -> Any:
    """A schema without the titles that pydantic makes of names, and without what every object has."""
    if isinstance(schema, list):
        return [_plain_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        key: value if key in ("enum", "default", "const") else _plain_schema(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str)) and key != "additionalProperties"
    }
    # A property may be called title.
    if isinstance(schema.get("properties"), dict):
        plain["properties"] = {key: _plain_schema(value) for key, value in schema["properties"].items()}
    return plain
