"""`loopos validate` and `loopos schema`: checks and describes a config without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from loopos.cli.answers import say, say_json
from loopos.cli.outcome import note
from loopos.config.diagnostics import DiagnosticsError, UserError
from loopos.config.load import LoadedConfig, load, load_recipe
from loopos.config.merge import MergeConfig, is_merge_recipe
from loopos.config.other_tools import METHOD_ALIASES
from loopos.config.source import read_source
from loopos.data.row_check import check_columns, check_rows
from loopos.methods.table import METHODS, config_classes


def read(path: Path, overrides: Sequence[str]) -> LoadedConfig:
    """The config; prints its notes. Raises `ConfigError`."""
    loaded = load(path, overrides, config_classes())
    check_columns(loaded.config)
    print_notes(loaded)
    return loaded


def print_notes(loaded: LoadedConfig) -> None:
    """Prints the notes on a valid config to standard error."""
    for sentence in loaded.notes:
        note(f"note: {sentence}")


def validate(path: Path, overrides: Sequence[str], *, as_json: bool) -> int:
    """Prints whether the config is valid; with `as_json` its diagnostics and notes as JSON."""
    if not as_json:
        loaded = _loaded(path, overrides)
        print_notes(loaded)
        values = loaded.config.model_dump()
        names = values.get("computation") or {"mode": "merge", "method": values["method"]}
        say(f"{path}: valid ({names['mode']}, {names['method']})")
        return 0
    try:
        loaded = _loaded(path, overrides)
    except DiagnosticsError as error:
        diagnostics = [dataclasses.asdict(diagnostic) for diagnostic in error.diagnostics]
        say_json({"file": str(path), "valid": False, "faults": diagnostics, "notes": []})
        return error.exit_code
    say_json({"file": str(path), "valid": True, "faults": [], "notes": loaded.notes})
    return 0


def _loaded(path: Path, overrides: Sequence[str]) -> LoadedConfig:
    """The config of a training method or of a merge."""
    source = read_source(path)
    if is_merge_recipe(source.root):
        return load_recipe(source, overrides, MergeConfig)
    loaded = load(path, overrides, config_classes())
    check_columns(loaded.config)
    check_rows(loaded.config)
    return loaded


def schema(method: str) -> int:
    """Prints the JSON Schema of a method's config. Raises `UserError` for an unknown method."""
    from loopos.config.load import schema as schema_of

    rows = {name: config_class for (_, name), config_class in config_classes().items()} | {"merge": MergeConfig}
    method = METHOD_ALIASES.get(method, method)
    if method not in rows:
        known = ", ".join([*(name for _, name in METHODS), "merge"])
        raise UserError(f"--method: got {method}; expected one of {known}")
    say_json(schema_of(rows[method]))
    return 0
