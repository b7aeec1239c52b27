"""`loopos validate`, `loopos list` and `loopos schema`: checks and describes configs, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import say, say_json, table
from loopos.cli.options import Config, Json, Overrides
from loopos.cli.outcome import note
from loopos.config.algorithms import ALGORITHMS
from loopos.config.diagnostics import DiagnosticsError, UserError
from loopos.config.methods import METHODS, config_classes
from loopos.config.registry import Registry, choices, did_you_mean
from loopos.config.study_variants import STUDY_FORMATS, STUDY_STRATEGIES
from loopos.config.variants import (
    ENVIRONMENTS,
    EXPORTERS,
    FORMATS,
    LOSSES,
    MERGE_METHODS,
    REWARDS,
    TOOL_PARSERS,
    TRACKERS,
)

if TYPE_CHECKING:
    from loopos.config.load import LoadedConfig

KindName = Annotated[
    str | None, typer.Argument(metavar="[KIND]", help="Such as methods; the kinds when absent.", show_default=False)
]
MethodName = Annotated[str, typer.Option("--method", help="Method whose config schema to print.")]


def read(path: Path, overrides: Sequence[str]) -> LoadedConfig:
    """The config; prints its notes. Raises `ConfigError`."""
    from loopos.config.load import load
    from loopos.data.row_check import check_columns

    loaded = load(path, overrides, config_classes())
    check_columns(loaded.config)
    print_notes(loaded)
    return loaded


def print_notes(loaded: LoadedConfig) -> None:
    """Prints the notes on a valid config to standard error."""
    for sentence in loaded.notes:
        note(f"note: {sentence}")


def validate(path: Config, overrides: Overrides = (), json: Json = False) -> int:
    """Prints whether the config is valid; with `json` its diagnostics and notes as JSON."""
    if not json:
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
    from loopos.config.load import load, load_recipe
    from loopos.config.merge import MergeConfig, is_merge_recipe
    from loopos.config.source import read_source
    from loopos.data.row_check import check_columns, check_rows

    source = read_source(path)
    if is_merge_recipe(source.root):
        return load_recipe(source, overrides, MergeConfig)
    loaded = load(path, overrides, config_classes())
    check_columns(loaded.config)
    check_rows(loaded.config)
    return loaded


def list_kind(kind: KindName = None, json: Json = False) -> int:
    """Runs `loopos list`."""
    return list_variants(kind, as_json=json)


def list_variants(kind: str | None, *, as_json: bool) -> int:
    """Prints the variants of a kind, each with what it does and where it comes from; the kinds without one. Raises
    `UserError` for an unknown kind.
    """
    if kind is None:
        kinds = {name: summary for name, (summary, _) in KINDS.items()}
        if as_json:
            say_json(kinds)
        else:
            say(table(list(kinds.items()), head=("kind", "what it is")))
        return 0
    if kind not in KINDS:
        hint = did_you_mean(kind, list(KINDS))
        expected = choices(list(KINDS), own="")
        raise UserError(f'loopos list: got "{kind}"; expected {expected}' + (f"; {hint}" if hint else ""))
    found = KINDS[kind][1]()
    if as_json:
        say_json([{"name": name, "summary": summary, "source": source} for name, summary, source in found])
    else:
        say(table(found, head=("name", "what it does", "from")))
    return 0


Listing = Callable[[], list[tuple[str, str, str]]]


def _listing(registry: Registry[Any]) -> Listing:
    return lambda: [(name, registry[name].summary, registry.source(name)) for name in registry]


KINDS: Mapping[str, tuple[str, Listing]] = {
    "methods": ("what computation.method names", _listing(METHODS)),
    "losses": ("what model.loss and reward.loss name", _listing(LOSSES)),
    "algorithms": ("what training.algorithm names", _listing(ALGORITHMS)),
    "rewards": ("what reward.functions names", _listing(REWARDS)),
    "formats": ("what data.format names", _listing(FORMATS)),
    "merge-methods": ("what the method of a merge names", _listing(MERGE_METHODS)),
    "exporters": ("what --format of loopos export names", _listing(EXPORTERS)),
    "trackers": ("what training.trackers names", _listing(TRACKERS)),
    "tool-parsers": ("what --tool-parser names", _listing(TOOL_PARSERS)),
    "environments": ("what --environment names", _listing(ENVIRONMENTS)),
    "study-strategies": ("what strategy of a study names", _listing(STUDY_STRATEGIES)),
    "study-formats": ("what --format of loopos study export names", _listing(STUDY_FORMATS)),
}
"""Kind → what it is, and a function that lists its variants as (name, summary, source)."""


def schema(method: MethodName = "fine_tuning") -> int:
    """Prints the JSON Schema of a method's config. Raises `UserError` for an unknown method."""
    from loopos.config.load import schema as schema_of
    from loopos.config.merge import MergeConfig
    from loopos.config.study import StudyConfig

    rows = {name: config_class for (_, name), config_class in config_classes().items()}
    rows |= {"merge": MergeConfig, "study": StudyConfig}
    if method not in rows:
        known = choices(list(rows), own="")
        raise UserError(f'--method: got "{method}"; expected {known}')
    say_json(schema_of(rows[method]))
    return 0
