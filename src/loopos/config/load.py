"""Load a config file and overrides into the frozen config of its method; `schema` is its JSON Schema.

`load` returns a `LoadedConfig` or raises `ConfigError`. Syntax errors are reported by themselves; otherwise one list
holds every diagnostic, ordered by line: of single keys, of key combinations and of files. No heavy import.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from loopos.config.aliases import moved_to_training, with_current_keys
from loopos.config.diagnostics import ConfigError, Diagnostic, Problem
from loopos.config.json_text import (
    MappingNode,
    Path,
    Plain,
    ScalarNode,
    find,
    plain,
    value_mark,
    without_entry,
)
from loopos.config.keys import ALSO_UNDER_DATA, OWN_METRICS
from loopos.config.other_tools import method_advice, tool_of, translated
from loopos.config.paths import expanded
from loopos.config.registry import OF_YOUR_OWN, choices, num_registered
from loopos.config.sections import MethodConfig
from loopos.config.source import (
    COMMAND_LINE,
    Source,
    apply_overrides,
    close_matches,
    read_source,
    source_of,
    source_on_command_line,
    with_values,
)
from loopos.config.wording import Schema, diagnostics_of, shown

Methods = Mapping[tuple[str, str], type[MethodConfig]]
RecipeT = TypeVar("RecipeT", bound=MethodConfig)

_MOST_REPAIRS = 6


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid config, the path and text it was read from (before overrides), and notes to show to the user."""

    config: MethodConfig
    path: str
    text: str
    notes: list[str]


def load(
    path: str | os.PathLike[str] | Mapping[str, object],
    overrides: Sequence[str],
    methods: Methods,
    *,
    check_files: bool = True,
    own_metrics: Collection[str] = (),
) -> LoadedConfig:
    """Read, override and check a config: a file, or its sections as a mapping.

    `methods` maps (mode, method) to a config class. With `check_files` false, the files that the config names may be
    missing (a finished run opens without its training data). `own_metrics` are metric names allowed besides the
    built-in ones. Raises `ConfigError` with every diagnostic by line, those of the command line last.
    """
    assert methods, "at least one method is required"
    source, root = _read(path, overrides)
    root, renamed, diagnostics = moved_to_training(root)
    row, method_diagnostics = _choose(root, methods)
    diagnostics.extend(method_diagnostics)
    if row is None:
        raise ConfigError(_by_line(diagnostics))
    root, old_names, alias_notes, found = with_current_keys(root, methods[row])
    renamed |= old_names
    diagnostics.extend(found)
    known = {diagnostic.field for diagnostic in diagnostics}
    context = {OWN_METRICS: own_metrics}
    config, found = _validated(methods[row], root, renamed, known, check_files, context, methods)
    diagnostics.extend(found)
    if diagnostics:
        raise ConfigError(_by_line(diagnostics))
    assert config is not None
    return LoadedConfig(config, source.path, source.text, [*alias_notes, *config.notes()])


def method_config_class(
    path: str | os.PathLike[str] | Mapping[str, object], overrides: Sequence[str], methods: Methods
) -> tuple[type[MethodConfig], MappingNode]:
    """The config class of the method that a config names, and the config tree with overrides; keys are not checked.

    Raises `ConfigError` where the file cannot be read or names no method.
    """
    _, root = _read(path, overrides)
    row, diagnostics = _choose(root, methods)
    if row is None:
        raise ConfigError(_by_line(diagnostics))
    return methods[row], root


def _read(path: str | os.PathLike[str] | Mapping[str, object], overrides: Sequence[str]) -> tuple[Source, MappingNode]:
    """The source of a config, and its tree with overrides."""
    source = source_of(path) if isinstance(path, Mapping) else read_source(expanded(os.fspath(path)))
    tool = tool_of(source.root)
    if tool is not None:
        message = f"a config of {tool}, which LoopOS does not read"
        raise ConfigError([Diagnostic(source.path, None, None, "", message, "", translated(source.root, tool).text)])
    return source, without_entry(apply_overrides(source.root, overrides), "$schema")


def load_recipe(
    source: Source | None,
    overrides: Sequence[str],
    recipe_class: type[MethodConfig],
    *,
    values: Mapping[str, object] | None = None,
) -> LoadedConfig:
    """Override and check a recipe: a config without a training method, with its keys at the top level.

    `source` None: the recipe is on the command line only. `values` are options of the command line: dotted key → value;
    None leaves the recipe's value. `overrides` are applied after them. Raises `ConfigError` with every diagnostic, as
    `load` does.
    """
    source = source or source_on_command_line({})
    actual = {key: value for key, value in (values or {}).items() if value is not None}
    root = without_entry(apply_overrides(with_values(source.root, actual), overrides), "$schema")
    config, diagnostics = _validated(recipe_class, root, {}, set(), check_files=True)
    if diagnostics:
        raise ConfigError(_by_line(diagnostics))
    assert config is not None
    return LoadedConfig(config, source.path, source.text, config.notes())


def read_recipe(
    recipe_class: type[RecipeT],
    source: str | os.PathLike[str] | Mapping[str, object] | None,
    values: Mapping[str, object] | None = None,
) -> RecipeT:
    """The recipe of a file, of a dict, or of the options alone (None). `values` are options, as of `load_recipe`.

    Raises `ConfigError` with every diagnostic.
    """
    if source is None:
        found = None
    elif isinstance(source, Mapping):
        found = source_of(source)
    else:
        found = read_source(expanded(os.fspath(source)))
    recipe = load_recipe(found, [], recipe_class, values=values).config
    assert isinstance(recipe, recipe_class), "load_recipe makes the class that it is given"
    return recipe


def _by_line(diagnostics: Sequence[Diagnostic]) -> list[Diagnostic]:
    def order(diagnostic: Diagnostic) -> tuple[bool, int, int, str]:
        return diagnostic.source == COMMAND_LINE, diagnostic.line or 0, diagnostic.column or 0, diagnostic.field

    return sorted(diagnostics, key=order)


def _diagnostic_at(root: MappingNode, path: Path, field: str, actual: str, expected: str, hint: str = "") -> Diagnostic:
    mark = value_mark(root, path)
    return Diagnostic(mark.source, mark.line, mark.column, field, actual, expected, hint)


def _choose(root: MappingNode, methods: Methods) -> tuple[tuple[str, str] | None, list[Diagnostic]]:
    """The (mode, method) that the config names, or one guessed from close names, and diagnostics of the names."""
    mode, method = (find(root, ("computation", key)) for key in ("mode", "method"))
    mode_name = mode.value if isinstance(mode, ScalarNode) else None
    method_name = method.value if isinstance(method, ScalarNode) else None
    if isinstance(mode_name, str) and isinstance(method_name, str) and (mode_name, method_name) in methods:
        return (mode_name, method_name), []
    # Only now: the names of all methods import the packages of users.
    modes = list(dict.fromkeys(mode for mode, _ in methods))
    diagnostics: list[Diagnostic] = []
    known_mode = mode_name in modes
    if isinstance(mode_name, str) and not known_mode:
        diagnostics.append(_name_diagnostic(root, "mode", mode_name, modes, ""))
    names = list(dict.fromkeys(name for row_mode, name in methods if row_mode == mode_name or not known_mode))
    guess: str | None = None
    if isinstance(method_name, str) and method_name not in names:
        advice = method_advice(method_name)
        if advice is not None:
            # Checking the keys of a guessed method would only add noise here.
            return None, [*diagnostics, _name_diagnostic(root, "method", method_name, names, advice[0])]
    if isinstance(method_name, str):
        close = [method_name] if method_name in names else close_matches(method_name, names)
        guess = close[0] if close else None
        if method_name not in names:
            owners = [row_mode for row_mode, name in methods if name == method_name]
            hint = f'"{method_name}" goes with mode "{owners[0]}"' if owners else ""
            diagnostics.append(_name_diagnostic(root, "method", method_name, names, hint))
    elif len(names) == 1:
        guess = names[0]
    return next(
        (row for row in methods if row[1] == guess and (row[0] == mode_name or not known_mode)), None
    ), diagnostics or ([] if guess is not None else _missing_method(root, names))


def _name_diagnostic(root: MappingNode, key: str, name: str, allowed: Sequence[str], hint: str) -> Diagnostic:
    close = close_matches(name, allowed)
    hint = hint or (f'did you mean "{close[0]}"?' if close else "")
    expected = choices(allowed, own=OF_YOUR_OWN if key == "method" else "")
    node = find(root, ("computation", key))
    assert node is not None
    return _diagnostic_at(
        root, ("computation", key), f"computation.{key}", shown(node, with_kind=False), expected, hint
    )


def _missing_method(root: MappingNode, names: Sequence[str]) -> list[Diagnostic]:
    """The diagnostic for a method that is missing, or not text, and cannot be guessed."""
    node = find(root, ("computation", "method"))
    actual = "nothing" if node is None else shown(node, with_kind=True)
    expected = choices(names)
    hint = 'a config names its method: "computation": {"mode": "posttraining", "method": "fine_tuning"}'
    return [_diagnostic_at(root, ("computation", "method"), "computation.method", actual, expected, hint)]


def _validated(
    config_class: type[MethodConfig],
    root: MappingNode,
    renamed: Mapping[str, str],
    reported: set[str],
    check_files: bool,
    context: Mapping[str, Any] | None = None,
    methods: Methods | None = None,
) -> tuple[MethodConfig | None, list[Diagnostic]]:
    """The config, if it is valid, and all diagnostics; `reported` are fields that already have one. `methods`: those
    that may know a key which this config does not.
    """
    values = plain(root)
    assert isinstance(values, dict)
    diagnostics: list[Diagnostic] = []
    faulty: set[str] = set(reported)
    config: MethodConfig | None = None
    try:
        config = config_class.model_validate(values, context=context)
        checkable: MethodConfig | None = config
    except ValidationError as error:
        schema = _schema_of(config_class, num_registered())
        described = diagnostics_of(error, root, schema, renamed, lambda: _schemas_of(methods or {}))
        diagnostics.extend(diagnostic for path, diagnostic in described if diagnostic.field not in reported)
        faulty.update(".".join(str(step) for step in path[:2]) for path, _ in described)
        # `_repaired` drops the whole of what is no section: a key of a recipe, such as a list with one invalid item.
        faulty.update(str(path[0]) for path, _ in described if path and not isinstance(values.get(str(path[0])), dict))
        checkable = _repaired(config_class, values, schema, context)
    if checkable is not None:
        problems = [*checkable.check(), *(checkable.check_files() if check_files else ())]
        diagnostics.extend(_located(problems, root, faulty, renamed))
    return config, diagnostics


def _schemas_of(methods: Methods) -> dict[str, Schema]:
    return {name: _schema_of(config_class, num_registered()) for (_, name), config_class in methods.items()}


@functools.cache
def _schema_of(config_class: type[MethodConfig], num_variants: int) -> Schema:
    """The schema lists the names of variants, so that one that is registered later makes another schema."""
    return config_class.model_json_schema()


def _repaired(
    config_class: type[MethodConfig], values: dict[str, Plain], schema: Schema, context: Mapping[str, Any] | None
) -> MethodConfig | None:
    """A valid config from only the valid values, so that the checks of key combinations can run too.

    Invalid keys take their defaults, missing ones a stand-in value; problems that involve either are not reported.
    """
    values = {key: dict(part) if isinstance(part, dict) else part for key, part in values.items()}
    for _ in range(_MOST_REPAIRS):
        try:
            return config_class.model_validate(values, context=context)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False, include_input=False)
        for detail in details:
            section, *keys = detail["loc"]
            part = values.get(str(section))
            if not keys or not isinstance(part, dict):
                values.pop(str(section), None)
                if detail["type"] == "missing":
                    values[str(section)] = {}
            elif detail["type"] == "missing" and len(keys) == 1:
                part[str(keys[0])] = _stand_in(schema, str(section), str(keys[0]))
            else:
                part.pop(str(keys[0]), None)
    return None


def _stand_in(schema: Schema, section: str, key: str) -> Plain:
    reference = str(schema["properties"][section].get("$ref", ""))
    field: Schema = schema["$defs"].get(reference.rsplit("/", 1)[-1], {}).get("properties", {}).get(key, {})
    if "enum" in field:
        value: Plain = field["enum"][0]
        return value
    return 1 if field.get("type") in ("integer", "number") else "stand-in"


def _located(
    problems: Sequence[Problem], root: MappingNode, faulty: set[str], renamed: Mapping[str, str]
) -> Iterator[Diagnostic]:
    """Problems as diagnostics with a location, without those that involve an invalid key."""
    for problem in problems:
        names = [(field, tuple(field.split("."))) for field in problem.fields]
        if any(".".join(path[:2]) in faulty or path[0] in faulty for _, path in names):
            continue
        written = next((path for _, path in names if find(root, path) is not None), names[0][1])
        field = renamed.get(problem.fields[0], problem.fields[0])
        yield _diagnostic_at(root, written, field, problem.actual, problem.expected, problem.hint)


DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(config_class: type[MethodConfig]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `config_class`, with titles, descriptions and defaults.

    Beyond the fields it allows what `load` allows: "$schema" at the top level, by which editors find the schema, and
    `ALSO_UNDER_DATA` under `data`. Constraints between keys are only checked by `load`.
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
