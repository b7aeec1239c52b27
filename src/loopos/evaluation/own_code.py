"""A user's own function, by the name that a config or a command gives.

Enters: "module:function". Leaves: the function. It runs only where it is asked for by name. Left out: what it is called
with and what it may return (`checkers`, `rewards`, `pair_judges`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from loopos.config.faults import UserError


def own_function(name: str, kind: str) -> Callable[..., Any]:
    """The function of a name "module:function". kind: what it is for, in words. Raises `UserError`."""
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as problem:
        raise UserError(
            f"{kind} {name}: cannot import {module_name} ({problem}); wanted a module that Python finds from here: "
            "set PYTHONPATH to its folder"
        ) from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{kind} {name}: {module_name} has no function {function_name}")
    found: Callable[..., Any] = function
    return found
