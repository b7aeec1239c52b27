"""Tasks of the package reasoning-gym as rows: "reasoning-gym:chain_sum?size=2000&seed=1".

Behind the question mark stand settings of the task, as reasoning-gym names them. Rows have the columns question, answer
and metadata; the reward and the checker `reasoning_gym` score answers with the task's own scorer. The same settings
give the same rows: size is 500 and seed 0 where they are absent.

Apart from `tables`, because nothing is read from a disk.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl

from loopos.config.diagnostics import MissingRequirement
from loopos.config.extras import install_command
from loopos.config.paths import TASKS
from loopos.config.registry import did_you_mean
from loopos.data.record import Record, Records, file_error, shown

_DEFAULTS: dict[str, object] = {"size": 500, "seed": 0}


def task_records(source: str) -> Records:
    """The rows of a task. Raises `DataError` for an unknown task or setting, `MissingRequirement` without the
    package.
    """
    try:
        factory = import_module("reasoning_gym.factory")
        import_module("reasoning_gym")
    except ModuleNotFoundError as problem:
        raise MissingRequirement(
            f"{source}: the package reasoning-gym is not installed ({problem}); run\n  {install_command('rewards')}"
        ) from problem
    name, _, settings = source.removeprefix(TASKS).partition("?")
    if name not in factory.DATASETS:
        hint = did_you_mean(name, list(factory.DATASETS)) or "`reasoning_gym.factory.DATASETS` has all tasks"
        raise file_error(source, f"the task {shown(name)}", "a task of reasoning-gym", hint, field="task")
    settings_of = {**_DEFAULTS, **settings_in(settings)}
    known = [field.name for field in dataclasses.fields(factory.DATASETS[name][1])]
    for key in settings_of:
        if key not in known:
            raise file_error(
                source,
                f"the setting {shown(key)}",
                f"one of {', '.join(known)}",
                did_you_mean(key, known),
                field="task",
            )
    try:
        entries: Any = factory.create_dataset(name, **settings_of)
        for entry in entries:
            yield Record(None, json.loads(json.dumps(entry, default=str)))
    # What reasoning-gym raises for values that a task does not allow.
    except (AssertionError, TypeError, ValueError) as problem:
        raise file_error(
            source, f"settings that the task refuses ({type(problem).__name__}: {problem})", "others", field="task"
        ) from problem


def settings_in(query: str) -> dict[str, object]:
    """Settings as they stand behind the question mark: "size=2000&seed=1"."""
    return {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}


def _value(text: str) -> object:
    """A setting as JSON, or else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
