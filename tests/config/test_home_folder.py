"""A "~" at the start of a path is the home folder: in every key of every config and recipe, and in every option."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

import loopos
from loopos.cli import options
from loopos.cli.commands import DATA, LOOPOS, RUNS, Command
from loopos.config.compression import PruningRecipe, QuantizationRecipe
from loopos.config.keys import Location
from loopos.config.load import LoadedConfig
from loopos.config.merge import MergeConfig
from loopos.config.methods import config_classes
from loopos.config.paths import expanded
from loopos.data.rows import read

ALL = [*config_classes().values(), MergeConfig, PruningRecipe, QuantizationRecipe]
# What the description of a key says where its value is, or may be, a place.
MENTIONS_PATH = (
    "folder",
    "file",
    "hub id",
    "another name of",
    "model that the others",
    "models of the recipe",
    "rows on",
)
NOT_PATHS = {"encoding", "max_expansion", "max_line_bytes",
    "training_split", "validation_split", "subset", "streaming", "shard_gigabytes", "checkpoints", "tensorboard",
    "keep_last", "result", "mode", "isolation",
}  # fmt: skip
Loads = Callable[..., LoadedConfig]
PATH_KEYS = {"INPUT", "MODEL", "FILE", "DATA", "A", "B", "PROMPTS", "JUDGE", "MODEL|RECIPE", "MODEL...", "FOLDER"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def sections(model: type[BaseModel]) -> Iterator[tuple[str, str, Any]]:
    """Every key of a config: its class, its name, its field."""
    for name, field in model.model_fields.items():
        inner = [each for each in (field.annotation, *typing.get_args(field.annotation)) if isinstance(each, type)]
        nested = [each for each in inner if issubclass(each, BaseModel)]
        if nested:
            yield from sections(nested[0])
        else:
            yield model.__name__, name, field


def takes_paths(annotation: Any, metadata: Any = ()) -> bool:
    """Whether the validators of a type expand "~"."""
    if any(getattr(each, "func", None) is expanded for each in metadata):
        return True
    parts = [*typing.get_args(annotation), *getattr(annotation, "__metadata__", ())]
    return any(getattr(each, "func", None) is expanded or takes_paths(each) for each in parts)


def test_every_key_that_names_a_path_expands_the_home_folder() -> None:
    assert takes_paths(Location)
    assert not takes_paths(str)
    keys = {key[:2]: key[2] for each in ALL for key in sections(each)}
    wrong = {
        (owner, name)
        for (owner, name), field in keys.items()
        if name not in NOT_PATHS
        and field.annotation is not bool
        and any(s in (field.description or "") for s in MENTIONS_PATH)
    }
    assert len(wrong) >= 25
    wrong = sorted(key for key in wrong if not takes_paths(keys[key].annotation, keys[key].metadata))
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("actual", "meant"), [("~/run", "{home}/run"), ("~", "{home}"), ("./~/run", "./~/run"), ("a/~", "a/~")]
)
def test_what_a_tilde_is(home: Path, load_text: Loads, good: str, actual: str, meant: str) -> None:
    loaded: Any = load_text(good, [f"data.output_dir={actual}"]).config
    assert loaded.data.output_dir == meant.format(home=home)
    in_file: Any = load_text(good.replace('"outputs/run"', f'"{actual}"')).config
    assert in_file.data.output_dir == meant.format(home=home)


def test_data_is_read_from_the_home_folder(home: Path) -> None:
    (home / "rows.csv").write_text("text,label\na,b\n", encoding="utf-8")
    assert [row.values["text"] for row in read("~/rows.csv")] == ["a"]


def test_a_config_is_read_from_the_home_folder(home: Path, good: str, folder: Path) -> None:
    (home / "run.json").write_text(good, encoding="utf-8")
    assert loopos.read_config("~/run.json") is not None


def parameters() -> Iterator[tuple[str, Any, Any]]:
    """Every parameter of every command: its name, its type, and typer's record of it."""
    listed = [LOOPOS.listed, DATA, RUNS]
    for command in (each for group in listed for each in group.values() if isinstance(each, Command)):
        module = importlib.import_module(f"loopos.cli.{command.module}")
        run = options.typer_function(getattr(module, command.function))
        hints = typing.get_type_hints(run, include_extras=True)
        for name, hint in hints.items():
            if hasattr(hint, "__metadata__"):
                kind, info = typing.get_args(hint)[:2]
                yield f"{command.module} {name}", kind, info


def test_every_option_that_takes_a_path_expands_the_home_folder(home: Path) -> None:
    found = [
        (name, kind, info)
        for name, kind, info in parameters()
        if "Path" in str(kind) or getattr(info, "metavar", None) in PATH_KEYS
    ]
    assert len(found) >= 30
    for name, kind, info in found:
        expected = Path(home / "x") if "Path" in str(kind) else str(home / "x")
        assert info.parser is not None, f"{name}: has no parser; give it `path` or `expanded`"
        assert info.parser("~/x") == expected, name
    assert isinstance(typer.Option(parser=options.path).parser("a"), Path)
