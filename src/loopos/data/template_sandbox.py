"""Render chat templates in a sandbox with limits on time and size; a template may come from an untrusted model.

The environment equals that of transformers (immutable sandbox, trimmed blocks, `{% generation %}`, `tojson`,
`raise_exception`, `strftime_now`). In addition, loops and macros count steps, products, powers and joined texts have a
maximum size, and CPU time is limited. Errors are `TemplateFailure`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

LONGEST_TEMPLATE = 200_000
"""Characters of a template, which take up to 3 seconds to compile; those that models come with have some 30,000."""
MOST_STEPS = 1_000_000
"""Iterations of loops and calls of macros in one rendering; a conversation of 10,000 turns takes about 30,000."""
MOST_SECONDS = 3.0
"""Seconds of processor time of one rendering."""
LONGEST_TEXT = 50_000_000
"""Characters of a rendering, or items and characters of anything that a template multiplies or joins on its way."""
_LARGEST_POWER_BITS = 10_000
_LARGEST_ARGUMENT = 1_000_000
_SIZED_FILTERS = ("center", "indent", "batch", "slice", "round", "format", "truncate", "wordwrap")
_STEPS_BETWEEN_CLOCKS = 256
_STEP, _CONCAT = "(step)", "(joined)"
"""Names of filters that no template can write."""
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\d{7,}|\*)")


class TemplateFailure(ValueError):
    """A template that cannot be rendered; says why in one line."""


class _OutOfBounds(TemplateError):
    """A template that takes more than it may."""


class _State(threading.local):
    steps = 0
    ends = 0.0


_state = _State()


def rendered(source: str, variables: Mapping[str, object]) -> str:
    """The text that a template writes. Raises `TemplateFailure`."""
    _state.steps, _state.ends = 0, time.thread_time() + MOST_SECONDS
    chunks: list[str] = []
    length = 0
    try:
        for chunk in _compiled(source).generate(**variables):
            length += len(chunk)
            if length > LONGEST_TEXT:
                raise _OutOfBounds(f"it writes more than {LONGEST_TEXT:,} characters")
            chunks.append(chunk)
    except RecursionError as problem:
        raise TemplateFailure("it is nested too deeply, or calls itself without an end") from problem
    except MemoryError as problem:
        raise TemplateFailure("it takes more memory than there is") from problem
    except (
        TemplateError,
        ArithmeticError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise TemplateFailure(reason[:300]) from problem
    return "".join(chunks)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > LONGEST_TEMPLATE:
        raise _OutOfBounds(f"it has {len(source):,} characters; expected at most {LONGEST_TEMPLATE:,}")
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    tree = _CountsSteps(environment).visit(environment.parse(source))
    return environment.from_string(tree)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with bounds."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters |= {"tojson": _tojson, _STEP: _step, _CONCAT: _concat}
        for name in _SIZED_FILTERS:
            self.filters[name] = _within_bounds(self.filters[name])
        self.globals.pop("lipsum")
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Operators whose result may be much larger than what they are given."""
        if operator == "+":
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                _check_size(len(left) + len(right))
            return left + right
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0)
            if bits > _LARGEST_POWER_BITS:
                raise _OutOfBounds(f"it computes a number of {bits:,} bits")
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and isinstance(times, int):
                    _check_size(len(sized) * times)
            if isinstance(left, int) and isinstance(right, int):
                _check_number(left.bit_length() + right.bit_length())
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(self, *arguments: Any, **named: Any) -> Any:
        """Functions and methods, which take no large numbers. arguments: the context, what is called, its own."""
        _check_arguments(arguments[2:], named)
        return super().call(*arguments, **named)


class _CountsSteps(NodeTransformer):
    """Puts a step into each loop and macro, and bounds the operator ~."""

    def __init__(self, environment: _Environment) -> None:
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2 finds it by this name
        self.generic_visit(node)
        node.body.insert(0, self._step(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802 - jinja2 finds it by this name
        self.generic_visit(node)
        node.body.insert(0, self._step(node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - jinja2 finds it by this name
        self.generic_visit(node)
        return self._filtered(nodes.List(node.nodes), _CONCAT, node)

    def _step(self, near: nodes.Node) -> nodes.Node:
        statement: nodes.Node = nodes.ExprStmt(self._filtered(nodes.Const(""), _STEP, near))
        return statement.set_lineno(near.lineno).set_environment(self.environment)

    def _filtered(self, value: nodes.Expr, name: str, near: nodes.Node) -> nodes.Expr:
        """A filter is called directly, where a function would pass the checks of the sandbox each time."""
        found = nodes.Filter(value, name, [], [], None, None)
        found.set_lineno(near.lineno).set_environment(self.environment)
        return found


@pass_context  # so that no filter is computed when the template is compiled
def _step(_: Context, value: str) -> str:
    """Counts an iteration or a call. Raises `_OutOfBounds`."""
    _state.steps += 1
    if _state.steps > MOST_STEPS:
        raise _OutOfBounds(f"it takes more than {MOST_STEPS:,} steps of its loops")
    if _state.steps % _STEPS_BETWEEN_CLOCKS == 0 and time.thread_time() > _state.ends:
        raise _OutOfBounds(f"it takes more than {MOST_SECONDS:g} seconds")
    return value


@pass_context
def _concat(_: Context, values: Sequence[object]) -> str:
    """The operator ~."""
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _GenerationTag(Extension):
    """`{% generation %}`: templates mark with it what the assistant says; its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` as an object, which leads to no class."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """`namespace` without attributes that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *actual = arguments
        attributes = dict(*actual, **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute that begins with an underscore: {name!r}")


def _check_size(size: int) -> None:
    if size > LONGEST_TEXT:
        raise _OutOfBounds(f"it makes a text or list of {size:,} characters or items")


def _check_number(bits: int) -> None:
    if bits > 2 * _LARGEST_POWER_BITS:
        raise _OutOfBounds(f"it computes a number of {bits:,} bits")


def _check_arguments(arguments: Sequence[object], named: Mapping[str, object]) -> None:
    for value in (*arguments, *named.values()):
        if isinstance(value, int) and abs(value) > _LARGEST_ARGUMENT:
            raise _OutOfBounds(f"it calls a function with a number over {_LARGEST_ARGUMENT:,}")


def _check_widths(text: str) -> None:
    if _WIDE.search(text) is not None:
        raise _OutOfBounds(f"it formats text with a width over {_LARGEST_ARGUMENT:,}, or one that it computes")


def _within_bounds(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments say how large its result is."""

    def bounded(*arguments: Any, **named: Any) -> Any:
        _check_arguments(arguments, named)
        if function is do_format:
            _check_widths(str(arguments[0]))
        return function(*arguments, **named)

    # What a filter wants of its environment is marked on the function.
    bounded.__dict__.update(function.__dict__)
    return bounded


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
