"""The JSON Schema of a config, for people, scripts and editors.

Enters: the config class of a method. Leaves: a schema (draft 2020-12) with titles, descriptions and defaults. Left out:
what only several keys together can tell; `load` checks that.
"""

from __future__ import annotations

from typing import Any

from loopos.config.keys import ALSO_UNDER_DATA
from loopos.config.sections import MethodConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(config_class: type[MethodConfig]) -> dict[str, Any]:
    """The schema of `config_class`.

    It allows what `load` allows beyond the fields: "$schema" at the top, by which editors find this schema, and under
    `data` those keys of `training` that the guide's configs have there.
    """
    described: dict[str, Any] = config_class.model_json_schema()
    properties = described["properties"]
    properties["$schema"] = {
        "type": "string",
        "title": "Schema",
        "description": "where editors find this schema; ignored",
    }
    sections = described["$defs"]
    if "DataSection" in sections and "TrainingSection" in sections:
        for key in ALSO_UNDER_DATA:
            sections["DataSection"]["properties"][key] = sections["TrainingSection"]["properties"][key]
    return {"$schema": DIALECT, **described}
