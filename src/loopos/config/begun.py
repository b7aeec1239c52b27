"""A config, and the folder of a run that it goes on with → the config by which that run chose its rows.

Enters: a config and the run's folder. Leaves: the config, with keys of `data` that the user does not name as the run
recorded them. Left out: whether the rest fits the run (`training.run_state`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from loopos.config.sections import MethodConfig

BEFORE = {"split_by": "row"}
"""Keys of `data` whose default chose other rows before the key was there → what was done then."""

Config = TypeVar("Config", bound=MethodConfig)


def as_begun(config: Config, folder: Path) -> Config:
    """The config by which the run in `folder` is resumed: a key that decides which rows train, and that the user does
    not name, is taken from the run's config.json; where that does not have it, the run is older than the key.
    """
    try:
        recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return config
    section = recorded.get("data") if isinstance(recorded, dict) else None
    own = getattr(config, "data", None)
    if not isinstance(section, dict) or own is None:
        return config
    kept = {key: section.get(key, before) for key, before in BEFORE.items() if key not in own.model_fields_set}
    return config.model_copy(update={"data": own.model_copy(update=kept)})
