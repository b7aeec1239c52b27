"""The settings of a run's config that differ from the defaults of its method, by dotted key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loopos.config.keys import section_class
from loopos.config.methods import METHODS


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of every setting of a run's config.json that is not at its default; those without a default
    too. Keys and methods that this version does not know are kept.
    """
    computation = config.get("computation", {})
    name = str(computation.get("method", ""))
    known = METHODS[name].config_class if name in METHODS else None
    return _changed(config, known)


def _changed(values: Mapping[str, Any], model: type[BaseModel] | None, above: str = "") -> dict[str, Any]:
    fields: Mapping[str, FieldInfo] = model.model_fields if model is not None else {}
    changed: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(key)
        inner = section_class(field) if field is not None else None
        if isinstance(value, Mapping) and value and (inner is not None or field is None):
            changed |= _changed(value, inner, f"{above}{key}.")
        elif value is None if field is None or field.is_required() else value == _default(field):
            # At its default; a null without one says nothing.
            continue
        else:
            changed[f"{above}{key}"] = value
    return changed


def _default(field: FieldInfo) -> Any:
    """The default as JSON has it."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value
