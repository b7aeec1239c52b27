"""The options of a reward function: its parameters besides prompts, responses and rows, and their annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_type_hints

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from loopos.config.registry import did_you_mean
from loopos.config.wording import describe

GIVEN = ("num_tokens", "ended", "messages")
"""Parameters that a function may have and that no option sets: what a text does not show of a response."""


class OptionProblem(NamedTuple):
    """A mistake in an option."""

    name: str
    actual: str
    expected: str
    hint: str = ""


def takes_rows(function: Callable[..., Any]) -> bool:
    """Whether a function has a third parameter by position: one without a default that is not of `GIVEN`, or one called
    `rows`.
    """
    by_position = [each for each in _parameters(function) if each.kind in (each.POSITIONAL_ONLY, _EITHER)]
    if len(by_position) < 3 or by_position[2].name in GIVEN:
        return False
    return by_position[2].default is inspect.Parameter.empty or by_position[2].name == "rows"


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def option_parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function that options set; of a class, all those of its constructor."""
    found = _parameters(target)
    if not isinstance(target, type):
        by_position = [each for each in found if each.kind in (each.POSITIONAL_ONLY, _EITHER)]
        taken = {each.name for each in by_position[: 3 if takes_rows(target) else 2]} | set(GIVEN)
        found = [each for each in found if each.name not in taken]
    return {each.name: each for each in found if each.kind in (_EITHER, each.KEYWORD_ONLY)}


def check_options(target: Callable[..., Any], options: Mapping[str, Any]) -> Iterator[OptionProblem]:
    """The mistakes in the options of a function: unknown, missing, or of another type than annotated."""
    known, any_name = option_parameters(target), any(each.kind is each.VAR_KEYWORD for each in _parameters(target))
    listed = ", ".join(known) or "it has none"
    for name in options:
        if name not in known and not any_name:
            yield OptionProblem(
                name, "an unknown option", f"an option of it: {listed}", did_you_mean(name, list(known))
            )
    for name, parameter in known.items():
        if name in options:
            yield from _check_value(target, name, options[name])
        elif parameter.default is parameter.empty:
            yield OptionProblem(name, "nothing", "a value", f'add "{name}" to its options')


def _check_value(target: Callable[..., Any], name: str, value: Any) -> Iterator[OptionProblem]:
    try:
        of_call = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        adapter = TypeAdapter(get_type_hints(of_call, include_extras=True).get(name, Any))
    except (NameError, TypeError, PydanticSchemaGenerationError, PydanticUserError):
        # An annotation of the user's own that says nothing of JSON.
        return
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as problem:
        schema = adapter.json_schema()
        expected = describe(schema, schema)
        yield OptionProblem(name, repr(value), expected if expected != "a value" else problem.errors()[0]["msg"])


def parameter_names(target: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters."""
    return [each.name for each in _parameters(target)]


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(target).parameters.values())
    except ValueError:
        # A function of C without a signature.
        return []
