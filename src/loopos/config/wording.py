"""pydantic's errors as faults in plain words.

Enters: a `ValidationError`, the tree it came from, the JSON Schema of its model. Leaves: one `Diagnostic` for each
faulty key, with what the schema allows there and, where it can be guessed, what was meant. Left out: checks of more
than one key (`fine_tuning`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import ValidationError

from loopos.config.diagnostics import Diagnostic
from loopos.config.json_text import ListNode, MappingNode, Node, Path, ScalarNode, dotted, find, key_mark, value_mark
from loopos.config.other_tools import OTHER_KEYS
from loopos.config.source import COMMAND_LINE, close_matches

Schema: TypeAlias = dict[str, Any]

_BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "literal_error", "value_error")
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


def diagnostics_of(
    error: ValidationError, root: MappingNode, schema: Schema, renamed: Mapping[str, str]
) -> list[tuple[Path, Diagnostic]]:
    """One fault for each faulty path of `error`, in its order.

    `renamed` gives the name under which the user wrote a key that was moved. Of a union's errors the deepest alone is
    kept.
    """
    found: dict[Path, Diagnostic] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        location = detail["loc"]
        if detail["type"] == "missing" and isinstance(location[-1], int):
            location = location[:-1]  # a list that is too short is the fault of the list
        path, allowed = _follow(location, root, schema)
        if path not in found:
            found[path] = _diagnostic(detail["type"], path, "[key]" in location, allowed, root, schema, renamed)
    inner = {path[:length] for path in found for length in range(len(path))}
    return [(path, diagnostic) for path, diagnostic in found.items() if path not in inner]


def _diagnostic(
    kind: str, path: Path, at_key: bool, allowed: Schema, root: MappingNode, schema: Schema, renamed: Mapping[str, str]
) -> Diagnostic:
    name = renamed.get(dotted(path), dotted(path))
    node = find(root, path)
    key = str(path[-1]) if path else ""
    section = dotted(path[:-1]) or "the top level"
    if kind == "extra_forbidden":
        mark = key_mark(root, path)
        hint = _hint_for_key(key, path, schema)
        actual = f"the unknown key {json.dumps(key, ensure_ascii=False)}"
        return Diagnostic(mark.source, mark.line, mark.column, name, actual, f"a key of {section}", hint)
    if at_key:
        mark = key_mark(root, path)
        allowed = _branch(_follow(path[:-1], root, schema)[1], "propertyNames", schema).get("propertyNames", {})
        actual = f"the key {json.dumps(key, ensure_ascii=False)}"
        return Diagnostic(
            mark.source, mark.line, mark.column, name, actual, words(allowed, schema), _close_value(key, allowed)
        )
    mark = value_mark(root, path)
    expected = words(allowed, schema)
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
    """A value as the user wrote it, cut to 60 characters, with its kind in words if asked."""
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


def words(schema: Schema, whole: Schema) -> str:
    """What a JSON Schema allows, in words: `a whole number >= 1, "epoch" or "never"`."""
    return _joined(_choices(schema, whole))


def _joined(choices: Sequence[str]) -> str:
    unique = list(dict.fromkeys(choices))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _choices(schema: Schema, whole: Schema) -> list[str]:
    schema = _resolved(schema, whole)
    if "anyOf" in schema:
        return [choice for branch in schema["anyOf"] for choice in _choices(branch, whole)]
    if "enum" in schema or "const" in schema:
        return [json.dumps(value) for value in schema.get("enum", [schema.get("const")])]
    bounds = " and ".join(f"{sign} {schema[name]:g}" for name, sign in _BOUNDS if name in schema)
    kind = schema.get("type")
    if kind in ("integer", "number"):
        noun = "a whole number" if kind == "integer" else "a number"
        return [f"{noun} {bounds}" if bounds else noun]
    if kind == "string":
        if "examples" in schema:
            return [f"text such as {_joined([json.dumps(example) for example in schema['examples']])}"]
        return ["text that is not empty" if schema.get("minLength") else "text"]
    if kind == "array":
        if "prefixItems" in schema:
            each = words(schema["prefixItems"][0], whole)
            return [f"a list of {len(schema['prefixItems'])}, each {each}"]
        return [
            f"a list{' of at least 1' if schema.get('minItems') else ''}, each {words(schema.get('items', {}), whole)}"
        ]
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


def _branch(schema: Schema, keyword: str, whole: Schema) -> Schema:
    """`schema`, or the first branch of its union that has `keyword`; empty if none has."""
    schema = _resolved(schema, whole)
    if keyword in schema:
        return schema
    branches = (_branch(branch, keyword, whole) for branch in schema.get("anyOf", ()))
    return next((branch for branch in branches if branch), {})


def _step(schema: Schema, step: str | int, whole: Schema) -> Schema | None:
    """The schema of one part, or None where the schema has no such part."""
    if isinstance(step, int):
        each = _branch(schema, "prefixItems", whole).get("prefixItems")
        if each:
            return dict(each[min(step, len(each) - 1)])
        items: Schema | None = _branch(schema, "items", whole).get("items")
        return items
    properties = _branch(schema, "properties", whole).get("properties", {})
    if step in properties:
        part: Schema = properties[step]
        return part
    rest = _branch(schema, "additionalProperties", whole).get("additionalProperties")
    return rest if isinstance(rest, dict) else None


def _follow(location: Sequence[str | int], root: MappingNode, schema: Schema) -> tuple[Path, Schema]:
    """The path in the user's tree that pydantic's `location` means, and the schema there; names of unions fall out."""
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


def _hint_for_key(key: str, path: Path, schema: Schema) -> str:
    """What an unknown key may have meant: a key of this section, or of another."""
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
    close = close_matches(key, own)
    if close:
        return f"did you mean {_joined([json.dumps(match) for match in close[:2]])}?"
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
    properties: Mapping[str, Schema] = _branch(here, "properties", schema).get("properties", {})
    return properties


def _close_value(value: str, allowed: Schema) -> str:
    names = [name for name in _enumerated(allowed) if isinstance(name, str)]
    close = close_matches(value, names)
    return f'did you mean "{close[0]}"?' if close else ""


def _enumerated(schema: Schema) -> list[object]:
    branches = [value for branch in schema.get("anyOf", ()) for value in _enumerated(branch)]
    return [*branches, *schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]


def _hint_for_value(node: Node, allowed: Schema, whole: Schema) -> str:
    if isinstance(node, ListNode) and "glob" in str(allowed.get("description", "")):
        return 'name one source: a folder, or a glob such as "data/*.jsonl"'
    if not isinstance(node, ScalarNode):
        return ""
    value, expected = node.value, words(allowed, whole)
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
        return "it holds a byte that is not UTF-8"
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
