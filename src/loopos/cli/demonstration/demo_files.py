"""What the demo's acts take from the package: files under their true paths, configs that name them, and new folders.

Enters: names of packaged files. Leaves: paths, loaded configs. Left out: what an act does with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.resources import as_file, files
from itertools import count
from pathlib import Path
from typing import Any

from loopos.config.load import load
from loopos.evaluation.run_folder import holds_run
from loopos.methods.table import config_classes
from loopos.storage.folder_lock import FolderBusy, only_writer

_PACKAGE = "loopos.demo"


def packaged_file(stack: ExitStack, name: str) -> Path:
    """The true path of a packaged file, for as long as `stack` lasts."""
    return stack.enter_context(as_file(files(_PACKAGE) / name))


def packaged_lines(name: str) -> list[str]:
    return (files(_PACKAGE) / name).read_text(encoding="utf-8").splitlines()


def packaged_config(stack: ExitStack, name: str, changes: Mapping[str, object] | None = None) -> Any:
    """A packaged config with values changed, by key; packaged files that its `data` section names get their true paths.
    Raises `ConfigError`.
    """
    path = packaged_file(stack, name)
    given = {key: value if isinstance(value, int | float) else str(value) for key, value in (changes or {}).items()}
    for key, value in json.loads(path.read_text(encoding="utf-8"))["data"].items():
        if isinstance(value, str) and value.startswith("src/loopos/demo/"):
            given.setdefault(f"data.{key}", str(packaged_file(stack, Path(value).name)))
    return load(path, [f"{key}={json.dumps(value)}" for key, value in given.items()], config_classes()).config


@contextmanager
def fresh_folder(folder: Path, *, run: str = ".") -> Iterator[Path]:
    """`folder`, or with the first number from 2 under which no run lies in its part `run`, and which no other demo has:
    no run is overwritten. It is held until the block ends.
    """
    for number in count(1):
        fresh = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with ExitStack() as held:
            try:
                held.enter_context(only_writer(fresh))
            except FolderBusy:
                continue
            if not holds_run(fresh / run):
                yield fresh
                return
