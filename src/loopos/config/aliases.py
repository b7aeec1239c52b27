"""Old names of config keys, keys that no longer do anything, and keys that may stand in another section.

`with_current_keys` brings a user's config up to date before it is checked; `current_settings` does the same for the
settings that an older run recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from loopos.config.diagnostics import Diagnostic
from loopos.config.json_text import MappingNode, find, plain, with_entry, without_entry
from loopos.config.keys import ALSO_UNDER_DATA, section_class
from loopos.config.source import COMMAND_LINE, as_mapping
from loopos.config.wording import shown

RENAMED_KEYS: Mapping[str, str] = {
    "reward.centring": "reward.center_rewards",
    "reward.normalise": "reward.normalize",
    "reward.normalise_over": "reward.normalize_over",
    "guards.end_share_drop": "guards.eos_rate_drop",
    "self_improvement.rationalise": "self_improvement.rationalize",
}
"""Old key → new key, within one section."""

_READ_HERE = "rows are read by the training process itself"
IGNORED_KEYS: Mapping[str, str] = {
    f"{section}.{key}": _READ_HERE
    for section in ("training", "data", "reward_training")
    for key in ("num_workers", "prefetch_batches")
}
"""Key that is accepted without effect → why it has none."""


def current_key(key: str) -> str:
    """The name of a dotted key today."""
    return RENAMED_KEYS.get(key, key)


def current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, as sections of keys, under the names of today, without keys that no longer do anything. A
    section that has both names of a key keeps the new one.
    """
    found = dict(settings)
    for ignored in IGNORED_KEYS:
        section, name = ignored.split(".")
        if isinstance(found.get(section), Mapping) and name in found[section]:
            found[section] = {key: value for key, value in found[section].items() if key != name}
    for old, new in RENAMED_KEYS.items():
        section, key = old.split(".")
        if isinstance(found.get(section), Mapping) and key in found[section]:
            values = {**found[section]}
            values.setdefault(new.split(".")[1], values.pop(key))
            found[section] = values
    return found


def moved_to_training(root: MappingNode) -> tuple[MappingNode, dict[str, str], list[Diagnostic]]:
    """Move the keys that `data` may hold too to `training`. Returns as `_moved`, for all of them."""
    renamed: dict[str, str] = {}
    diagnostics: list[Diagnostic] = []
    if as_mapping(root, "data") is None or ("training" in root.entries and as_mapping(root, "training") is None):
        return root, {}, []
    for key in ALSO_UNDER_DATA:
        root, moved, found = _moved(root, f"data.{key}", f"training.{key}")
        renamed |= moved
        diagnostics += found
    return root, renamed, diagnostics


def with_current_keys(
    root: MappingNode, config_class: type[BaseModel]
) -> tuple[MappingNode, dict[str, str], list[str], list[Diagnostic]]:
    """The tree with old keys renamed and those without effect left out, where the config's class does not know them.

    Returns the tree, new key → key that the user wrote, a note for each, and a diagnostic where both names have values.
    """
    renamed: dict[str, str] = {}
    notes: list[str] = []
    diagnostics: list[Diagnostic] = []
    for old, new in RENAMED_KEYS.items():
        if find(root, old.split(".")) is None or _knows(config_class, old) or not _knows(config_class, new):
            continue
        root, moved, found = _moved(root, old, new)
        renamed |= moved
        diagnostics += found
        notes.append(f"{old} is now {new}; the old name still works")
    for key, reason in IGNORED_KEYS.items():
        section, name = key.split(".")
        part = as_mapping(root, section)
        if part is not None and name in part.entries and not _knows(config_class, key):
            root = with_entry(root, section, without_entry(part, name), root.keys[section])
            notes.append(f"{key} has no effect: {reason}")
    return root, renamed, notes, diagnostics


def _knows(config_class: type[BaseModel], key: str) -> bool:
    section, name = key.split(".")
    field = config_class.model_fields.get(section)
    found = section_class(field) if field is not None else None
    return found is not None and name in found.model_fields


def _moved(root: MappingNode, old: str, new: str) -> tuple[MappingNode, dict[str, str], list[Diagnostic]]:
    """Move a value to another key; also returns new key → old key if it moved.

    If both keys have a value, the command line wins over the file; two different values from one source are an error.
    """
    (old_section, old_name), (new_section, new_name) = old.split("."), new.split(".")
    source = as_mapping(root, old_section)
    if source is None or old_name not in source.entries:
        return root, {}, []
    value, key_mark = source.entries[old_name], source.keys[old_name]
    root = with_entry(root, old_section, without_entry(source, old_name), root.keys[old_section])
    target = as_mapping(root, new_section) or MappingNode({}, {}, root.mark)
    current = target.entries.get(new_name)
    if current is None or (value.mark.source == COMMAND_LINE != current.mark.source):
        target = with_entry(target, new_name, value, key_mark)
        return with_entry(root, new_section, target, root.keys.get(new_section, root.mark)), {new: old}, []
    if value.mark.source != current.mark.source or json.dumps(plain(value)) == json.dumps(plain(current)):
        return root, {}, []
    mark = value.mark
    actual = f"{shown(value, with_kind=False)}, but {new} is {shown(current, with_kind=False)}"
    return (
        root,
        {},
        [Diagnostic(mark.source, mark.line, mark.column, old, actual, "one value", "remove one of the two")],
    )
