"""The table of methods names classes that exist, and imports no torch for a config."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from own_packages import REGISTRIES

from loopos.config.keys import section_class
from loopos.config.methods import METHODS, config_classes
from loopos.config.registry import Reference, Registry


def test_every_row_names_a_config_and_a_trainer() -> None:
    assert "fine_tuning" in METHODS
    classes = config_classes()
    assert list(classes) == [(METHODS[name].mode, name) for name in METHODS]
    for mode, name in classes:
        assert classes[mode, name].model_fields["computation"]
        assert callable(METHODS[name].trainer_class)
        # By these its rows are checked and shown, and its run is planned.
        assert METHODS[name].reads
        assert METHODS[name].trains in ("head", "scores", "language", "roles")


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_built_in_variant_is_there_and_says_what_it_is(registry: Registry[Any]) -> None:
    """The reference of each row names something that can be called, and its docstring gives a line of the list."""
    assert len(registry) >= 1
    for name in registry:
        row = registry[name]
        assert 10 < len(row.summary) < 150, (name, row.summary)
        assert "\n" not in row.summary
        assert not row.summary.endswith((".", "et al"))
        references = [
            value for value in (getattr(row, each.name) for each in fields(row)) if isinstance(value, Reference)
        ]
        assert all(callable(reference.load()) for reference in references)
        assert registry.source(name) == "loopos"


def test_config_classes_need_no_torch() -> None:
    program = "import sys; from loopos.config.methods import config_classes; list(config_classes().values()); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_every_method_trains_with_adamw_by_default() -> None:
    sections = [section_class(config.model_fields["training"]) for config in config_classes().values()]
    assert len(sections) >= 7
    assert [section.model_fields["optimizer"].default for section in sections if section] == ["adamw"] * len(sections)
