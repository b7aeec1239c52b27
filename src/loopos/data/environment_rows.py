"""Rows that an environment makes for itself: "environment:calculator_search?number=2000&seed=1".

Behind the question mark stand the arguments of the class's method `rows`; `number` is 500 and `seed` 0 where they are
absent. The same arguments give the same rows.

Apart from `reasoning_gym`, because the rows are code of this package or of the user.
"""

from __future__ import annotations

import inspect
import json

from loopos.config.diagnostics import UserError
from loopos.config.own_function import OwnFunction
from loopos.config.paths import ENVIRONMENT_ROWS
from loopos.config.registry import did_you_mean
from loopos.config.variants import ENVIRONMENTS
from loopos.data.reasoning_gym import settings_in
from loopos.data.record import Record, Records, file_error, shown

_DEFAULTS: dict[str, object] = {"number": 500, "seed": 0}


def environment_records(source: str) -> Records:
    """The rows of an environment. Raises `DataError` for an unknown environment or argument, and for one without rows
    of its own; `UserError` for what its method raises.
    """
    name, _, settings = source.removeprefix(ENVIRONMENT_ROWS).partition("?")
    if name not in ENVIRONMENTS:
        hint = did_you_mean(name, list(ENVIRONMENTS)) or "`loopos list environments` has all of them"
        raise file_error(source, f"the environment {shown(name)}", "an environment", hint, field="task")
    make = getattr(ENVIRONMENTS[name].load(), "rows", None)
    if not callable(make):
        raise file_error(
            source,
            f"{name}, which makes no rows",
            "an environment with a class method rows(number, seed)",
            "write the rows into a file",
            field="task",
        )
    arguments = {**_DEFAULTS, **settings_in(settings)}
    known = [*inspect.signature(make).parameters]
    for key in arguments:
        if key not in known:
            expected = f"one of {', '.join(known)}"
            raise file_error(source, f"the setting {shown(key)}", expected, did_you_mean(key, known), field="task")
    made = OwnFunction(f"environment {name}, rows", make)(about=source, **arguments)
    try:
        for row in made:
            yield Record(None, json.loads(json.dumps(dict(row))))
    except (TypeError, ValueError) as problem:
        raise UserError(
            f"environment {name}, rows: expected dicts of JSON values ({problem})\n    for {source}"
        ) from problem
