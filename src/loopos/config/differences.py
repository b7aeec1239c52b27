"""Compare two configs key by key, and restore old defaults when an older run is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from loopos.config.sections import MethodConfig


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key → both values, of every key whose values differ; None where one config lacks the key."""
    one, other = _flat(first), _flat(second)
    keys = [*one, *(key for key in other if key not in one)]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`differences` without the keys that only one of two LoopOS versions knows.

    A key counts as changed only if both configs have it, or have the section that it belongs to.
    """
    one, other = _flat(before), _flat(after)
    return {
        key: values
        for key, values in differences(before, after).items()
        if _is_known(key, one) and _is_known(key, other) and not (_is_section(key, one) or _is_section(key, other))
    }


def shown(value: Any) -> str:
    """A config value as text for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def _is_known(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a config has a key, or null or an empty section above it."""
    sections = key.split(".")
    return any(".".join(sections[:length]) in flat for length in range(1, len(sections) + 1)) or _is_section(key, flat)


def _is_section(key: str, flat: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{key}.") for name in flat)


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


BEFORE: Mapping[str, Mapping[str, str | int]] = {
    "data": {"split_by": "row"},
    "model": {"pooling": "mean", "target_scaling": "standardize"},
    "training": {"optimizer": "sgd", "schedule": "constant", "warmup": 0},
}
"""Section → key whose default was another one, or differs from the behavior before the key existed → the old value."""

Config = TypeVar("Config", bound=MethodConfig)


def resumed_config(config: Config, folder: Path) -> Config:
    """The config with which the run in `folder` resumes.

    A key of `BEFORE` that the user does not set comes from the run's config.json; if it is missing there, the run is
    older than the key and gets the old behavior.
    """
    try:
        recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return config
    if not isinstance(recorded, dict):
        return config
    sections = {}
    for name, keys in BEFORE.items():
        section, own = recorded.get(name), getattr(config, name, None)
        if isinstance(section, dict) and own is not None:
            not_set = (type(own).model_fields.keys() & keys.keys()) - own.model_fields_set
            sections[name] = own.model_copy(update={key: section.get(key, keys[key]) for key in not_set})
    return config.model_copy(update=sections)
