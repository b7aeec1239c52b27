"""Two configs side by side: which keys differ.

Enters: two resolved configs, as nested mappings. Leaves: dotted key → both values. Left out: what a difference means.

A config, and the folder of a run that it goes on with → the config by which that run chose its rows.

Enters: a config and the run's folder. Leaves: the config, with keys that decide what the run learns from, and that the
user does not name, as the run recorded them. Left out: whether the rest fits the run (`training.run_state`).
"""

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
    """`differences`, without the keys that only one of the two versions of LoopOS knows: a key counts as changed only
    where both configs hold it, or hold the section that it would be in.
    """
    one, other = _flat(before), _flat(after)
    return {
        key: values
        for key, values in differences(before, after).items()
        if _is_known(key, one) and _is_known(key, other) and not (_is_section(key, one) or _is_section(key, other))
    }


def shown(value: Any) -> str:
    """A value of a config in a sentence."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def _is_known(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a config holds a key, or has null, or nothing in it, for a section above it."""
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


BEFORE: Mapping[str, Mapping[str, str]] = {
    "data": {"split_by": "row"},
    "model": {"pooling": "mean", "target_scaling": "standardize"},
}
"""Section → keys whose default did something else before the key was there → what was done then."""

Config = TypeVar("Config", bound=MethodConfig)


def as_begun(config: Config, folder: Path) -> Config:
    """The config by which the run in `folder` is resumed: a key of `BEFORE` that the user does not name is taken from
    the run's config.json; where that does not have it, the run is older than the key.
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
            unnamed = (type(own).model_fields.keys() & keys.keys()) - own.model_fields_set
            sections[name] = own.model_copy(update={key: section.get(key, keys[key]) for key in unnamed})
    return config.model_copy(update=sections)
