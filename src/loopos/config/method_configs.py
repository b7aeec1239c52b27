"""The config class of each method, imported on demand, and the settings of a config that differ from its defaults.

This module is below `methods`, so that reports, which may not import methods, know the defaults too.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loopos.config.sections import MethodConfig

CONFIG_CLASSES: Mapping[tuple[str, str], str] = {
    ("posttraining", "fine_tuning"): "loopos.config.fine_tuning:FineTuningConfig",
    ("posttraining", "chain_of_thought"): "loopos.config.chain_of_thought:ChainOfThoughtConfig",
    ("posttraining", "reward_model"): "loopos.config.reward_model:RewardModelConfig",
    ("posttraining", "ppo"): "loopos.config.ppo:PpoConfig",
    ("posttraining", "rlhf"): "loopos.config.rlhf:RlhfConfig",
    ("pretraining", "autoregressive"): "loopos.config.pretraining:PretrainingConfig",
}


def config_class(mode: str, method: str) -> type[MethodConfig]:
    """The config class of a method. Raises KeyError for an unknown method."""
    module, _, name = CONFIG_CLASSES[mode, method].partition(":")
    found: type[MethodConfig] = getattr(import_module(module), name)
    return found


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of every setting in a run's config.json that differs from its default or has none.

    Keys and methods that this version does not know are included.
    """
    computation = config.get("computation", {})
    name = (str(computation.get("mode", "")), str(computation.get("method", "")))
    known = config_class(*name) if name in CONFIG_CLASSES else None
    return _changed(config, known)


def _changed(values: Mapping[str, Any], model: type[BaseModel] | None, above: str = "") -> dict[str, Any]:
    fields: Mapping[str, FieldInfo] = model.model_fields if model is not None else {}
    changed: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(key)
        inner = _section_class(field) if field is not None else None
        if isinstance(value, Mapping) and value and (inner is not None or field is None):
            changed |= _changed(value, inner, f"{above}{key}.")
        elif value is None if field is None or field.is_required() else value == _default(field):
            # At its default, or null without a default.
            continue
        else:
            changed[f"{above}{key}"] = value
    return changed


def _default(field: FieldInfo) -> Any:
    """The default as a JSON value."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The section class of a field, also if the field may be null."""
    for each in (field.annotation, *get_args(field.annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None
