"""A package of the user's, as pip leaves it behind, for the time of a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopos.config.algorithms import ALGORITHMS
from loopos.config.methods import METHODS
from loopos.config.registry import load_plugins
from loopos.config.variants import EXPORTERS, FORMATS, LOSSES, MERGE_METHODS, REWARDS, TRACKERS

REGISTRIES = (METHODS, ALGORITHMS, EXPORTERS, FORMATS, LOSSES, MERGE_METHODS, REWARDS, TRACKERS)


@contextmanager
def installed(site: Path, code: Path, module: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """site: an empty folder for the package's metadata; code: the folder that holds `module`."""
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    name = module.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[loopos.plugins]\n{module} = {module}\n", encoding="utf-8")
    for folder in {site, code}:
        patch.syspath_prepend(str(folder))
    load_plugins.cache_clear()
    kept = [{key: dict(value) for key, value in vars(each).items() if isinstance(value, dict)} for each in REGISTRIES]
    try:
        yield
    finally:
        for registry, before in zip(REGISTRIES, kept, strict=True):
            vars(registry).update(before)
        for name in [each for each in sys.modules if each.partition(".")[0] == module]:
            del sys.modules[name]
        load_plugins.cache_clear()
