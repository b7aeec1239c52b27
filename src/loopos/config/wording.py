"""Turn pydantic's errors into diagnostics in plain language.

Each invalid key gets one `Diagnostic`: its value, what the JSON Schema allows, and a suggestion if one is close. Checks
of key combinations live in the config classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from pydantic import ValidationError

from loopos.config.diagnostics import Diagnostic
from loopos.config.json_text import ListNode, MappingNode, Node, Path, ScalarNode, dotted, find, key_mark, value_mark
from loopos.config.keys import MISSING_VARIANT
from loopos.config.other_tools import OTHER_KEYS
from loopos.config.registry import OF_YOUR_OWN
from loopos.config.source import COMMAND_LINE, close_matches

Schema: TypeAlias = dict[str, Any]

_BOUND_ERRORS = (
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
    *("literal_error", "value_error", MISSING_VARIANT),
)
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


def diagnostics_of(
    error: ValidationError,
    root: MappingNode,
    schema: Schema,
    renamed: Mapping[str, str],
    others: Callable[[], Mapping[str, Schema]] = dict,
) -> list[tuple[Path, Diagnostic]]:
    """One diagnostic for each invalid path of `error`, in its order.

    `renamed` maps a moved key to the name that the user wrote. `others` gives the schemas of all methods, which may
    know a key: called only for an unknown key, because it takes most of a second. Of a union's errors only the deepest
    is reported.
    """
    found: dict[Path, Diagnostic] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        location = detail["loc"]
        if detail["type"] == "missing" and isinstance(location[-1], int):
            location = location[:-1]  # a list that is too short is an error of the list
        path, allowed = _follow(location, root, schema)
        if path not in found:
            kind, at_key = detail["type"], "[key]" in location
            found[path] = (
                _unknown_key(path, root, schema, renamed, others)
                if kind == "extra_forbidden"
                else _diagnostic(kind, path, at_key, allowed, root, schema, renamed)
            )
            if kind == MISSING_VARIANT:
                found[path] = replace(found[path], actual=f"{found[path].actual} ({detail['msg']})")
    inner = {path[:length] for path in found for length in range(len(path))}
    return [(path, diagnostic) for path, diagnostic in found.items() if path not in inner]


def _unknown_key(
    path: Path,
    root: MappingNode,
    schema: Schema,
    renamed: Mapping[str, str],
    others: Callable[[], Mapping[str, Schema]],
) -> Diagnostic:
    key, mark = str(path[-1]), key_mark(root, path)
    name, section = renamed.get(dotted(path), dotted(path)), dotted(path[:-1]) or "the top level"
    owners = [f'"{method}"' for method, other in others().items() if key in _properties_at(path[:-1], other)]
    hint = _hint_for_key(key, path, schema, owners)
    actual = f"the unknown key {json.dumps(key, ensure_ascii=False)}"
    return Diagnostic(mark.source, mark.line, mark.column, name, actual, f"a key of {section}", hint)


def _diagnostic(
    kind: str, path: Path, at_key: bool, allowed: Schema, root: MappingNode, schema: Schema, renamed: Mapping[str, str]
) -> Diagnostic:
    name = renamed.get(dotted(path), dotted(path))
    node = find(root, path)
    key = str(path[-1]) if path else ""
    section = dotted(path[:-1]) or "the top level"
    if at_key:
        mark = key_mark(root, path)
        allowed = _variant(_follow(path[:-1], root, schema)[1], "propertyNames", schema).get("propertyNames", {})
        actual = f"the key {json.dumps(key, ensure_ascii=False)}"
        return Diagnostic(
            mark.source, mark.line, mark.column, name, actual, describe(allowed, schema), _close_value(key, allowed)
        )
    mark = value_mark(root, path)
    expected = describe(allowed, schema)
    if node is None:
        about = f" ({allowed['description']})" if "description" in allowed else ""
        return Diagnostic(
            mark.source, mark.line, mark.column, name, "nothing", expected, f'add "{key}" to {section}{about}'
        )
    actual = shown(node, with_kind=kind not in _BOUND_ERRORS)
    return Diagnostic(
        mark.source, mark.line, mark.column, name, actual, expected, _hint_for_value(node, allowed, schema)
    )


def shown(node: Node, *, with_kind: bool) -> str:
    """A value as the user wrote it, cut to 60 characters; `with_kind` adds its type."""
    if isinstance(node, ListNode):
        return f"a list of {len(node.items)}"
    if isinstance(node, MappingNode):
        return f"a section with {', '.join(list(node.entries)[:3]) or 'no keys'}"
    value = node.value
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else node.text or "null"
    text = text if len(text) <= 60 else f"{text[:57]}..."
    if not with_kind or value is None:
        return text
    kind = {bool: "true or false", int: "a whole number", float: "a decimal number", str: "text"}[type(value)]
    return f"{text} ({kind})"


def describe(schema: Schema, whole: Schema) -> str:
    """What a JSON Schema allows, as text: `a whole number >= 1, "epoch" or "never"`."""
    return _join_choices(_choices(schema, whole))


def _join_choices(choices: Sequence[str]) -> str:
    # Names that users make themselves come last, after null too.
    unique = sorted(dict.fromkeys(choices), key=lambda choice: choice == OF_YOUR_OWN)
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _choices(schema: Schema, whole: Schema) -> list[str]:
    schema = _resolved(schema, whole)
    if "anyOf" in schema:
        return [choice for variant in schema["anyOf"] for choice in _choices(variant, whole)]
    if "enum" in schema or "const" in schema:
        return [json.dumps(value) for value in schema.get("enum", [schema.get("const")])]
    bounds = " and ".join(f"{sign} {schema[name]:g}" for name, sign in _BOUNDS if name in schema)
    kind = schema.get("type")
    if kind in ("integer", "number"):
        noun = "a whole number" if kind == "integer" else "a number"
        return [f"{noun} {bounds}" if bounds else noun]
    if kind == "string":
        if "$comment" in schema:
            return [str(schema["$comment"])]
        if "examples" in schema:
            return [f"text such as {_join_choices([json.dumps(example) for example in schema['examples']])}"]
        return ["text that is not empty" if schema.get("minLength") else "text"]
    if kind == "array":
        if "prefixItems" in schema:
            each = describe(schema["prefixItems"][0], whole)
            return [f"a list of {len(schema['prefixItems'])}, each {each}"]
        least = " of at least 1" if schema.get("minItems") else ""
        return [f"a list{least}, each {describe(schema.get('items', {}), whole)}"]
    if kind == "object":
        required = schema.get("required", [])
        return [f"a section with {', '.join(required)}" if required else "a section of keys and values"]
    return [{"boolean": "true or false", "null": "null"}.get(str(kind), "a value")]


def _resolved(schema: Schema, whole: Schema) -> Schema:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    target: Schema = whole["$defs"][str(reference).rsplit("/", 1)[-1]]
    return target


def _variant(schema: Schema, keyword: str, whole: Schema) -> Schema:
    """`schema`, or the first variant of its union that has `keyword`; empty if none has."""
    schema = _resolved(schema, whole)
    if keyword in schema:
        return schema
    variants = (_variant(variant, keyword, whole) for variant in schema.get("anyOf", ()))
    return next((variant for variant in variants if variant), {})


def _step(schema: Schema, step: str | int, whole: Schema) -> Schema | None:
    """The schema of one key or item, or None if the schema has no such part."""
    if isinstance(step, int):
        each = _variant(schema, "prefixItems", whole).get("prefixItems")
        if each:
            return dict(each[min(step, len(each) - 1)])
        items: Schema | None = _variant(schema, "items", whole).get("items")
        return items
    properties = _variant(schema, "properties", whole).get("properties", {})
    if step in properties:
        part: Schema = properties[step]
        return part
    rest = _variant(schema, "additionalProperties", whole).get("additionalProperties")
    return rest if isinstance(rest, dict) else None


def _follow(location: Sequence[str | int], root: MappingNode, schema: Schema) -> tuple[Path, Schema]:
    """Convert pydantic's `location` to a path in the user's tree, without names of union variants, and its schema."""
    path: Path = ()
    here = schema
    for step in location:
        part = _step(here, step, schema)
        if step == "[key]":
            continue
        if part is not None:
            path, here = (*path, step), part
        elif isinstance(parent := find(root, path), MappingNode) and step in parent.entries:
            path, here = (*path, step), {}
    return path, here


def _hint_for_key(key: str, path: Path, schema: Schema, methods: Sequence[str]) -> str:
    """A suggestion for an unknown key: a close key of this section or of another. `methods`: those that have it."""
    own = list(_properties_at(path[:-1], schema))
    owners: dict[str, str] = {}
    for section in schema.get("properties", {}):
        for name in _properties_at((section,), schema):
            owners.setdefault(name, section)
    meant = key if key in owners else OTHER_KEYS.get(key.lower(), "").rpartition(".")[2]
    if meant in own:
        return f'did you mean "{meant}"?'
    if meant in owners:
        owner = owners[meant]
        return f'it belongs under "{owner}"' if meant == key else f'did you mean "{meant}" under "{owner}"?'
    if methods:
        return f"it belongs to the method{'s' if len(methods) > 1 else ''} {' and '.join(methods)}"
    close = close_matches(key, own)
    if close:
        return f"did you mean {_join_choices([json.dumps(match) for match in close[:2]])}?"
    elsewhere = close_matches(key, list(owners), cutoff=0.75)
    if elsewhere:
        return f'did you mean "{elsewhere[0]}" under "{owners[elsewhere[0]]}"?'
    return f"its keys: {', '.join(own)}" if len(own) <= 14 else "remove it; `loopos schema` lists the keys"


def _properties_at(path: Sequence[str | int], schema: Schema) -> Mapping[str, Schema]:
    here = schema
    for step in path:
        part = _step(here, step, schema)
        if part is None:
            return {}
        here = part
    properties: Mapping[str, Schema] = _variant(here, "properties", schema).get("properties", {})
    return properties


def _close_value(value: str, allowed: Schema) -> str:
    names = [name for name in _enumerated(allowed) if isinstance(name, str)]
    close = close_matches(value, names)
    return f'did you mean "{close[0]}"?' if close else ""


def _enumerated(schema: Schema) -> list[object]:
    variants = [value for variant in schema.get("anyOf", ()) for value in _enumerated(variant)]
    return [*variants, *schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]


def _hint_for_value(node: Node, allowed: Schema, whole: Schema) -> str:
    if isinstance(node, ListNode) and "glob" in str(allowed.get("description", "")):
        return 'name one source: a folder, or a glob such as "data/*.jsonl"'
    if not isinstance(node, ScalarNode):
        return ""
    value, expected = node.value, describe(allowed, whole)
    if isinstance(value, str):
        return _hint_for_text(node, value, allowed, expected)
    if value is None and "default" in allowed:
        return f"leave the key out for its default, {json.dumps(allowed['default'])}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "the number must be finite"
        if "a whole number" in expected and value.is_integer() and abs(value) < 2**53:
            return f"write {int(value)}, without point or exponent"
    if expected == "true or false" and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    if expected.startswith("text") and isinstance(value, (int, float)):
        form = "'key=\"...\"'" if node.mark.source == COMMAND_LINE else f'"{node.text}"'
        return f"put it in quotes: {form}"
    return ""


def _hint_for_text(node: ScalarNode, value: str, allowed: Schema, expected: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "it contains a byte that is not UTF-8"
    folded = value.strip().lower()
    if "number" in expected and _is_number(folded):
        return f"write {folded}, without quotes"
    if "true or false" in expected and folded in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return f"write {'true' if folded in ('true', 'yes', 'on', '1') else 'false'}, without quotes"
    if folded in ("null", "none") and "null" in expected:
        return "write null, without quotes"
    if expected.startswith("a list") and "each text" in expected:
        return f"write a list: [{json.dumps(value[:40], ensure_ascii=False)}]"
    return _close_value(value, allowed)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False
