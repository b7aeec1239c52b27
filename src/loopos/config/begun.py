"""A config, and the folder of a run that it goes on with → the config by which that run chose its rows.

Enters: a config and the run's folder. Leaves: the config, with keys that decide what the run learns from, and that the
user does not name, as the run recorded them. Left out: whether the rest fits the run (`training.run_state`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from loopos.config.sections import MethodConfig

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
