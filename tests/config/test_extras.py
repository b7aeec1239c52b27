"""The install command is one that works where LoopOS was installed as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loopos.config import extras


class Kept:
    """What pip keeps of an installation."""

    def __init__(self, url: str | None) -> None:
        self.url = url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.url is None else json.dumps({"url": self.url})


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "clone" / "src" / "loopos").mkdir(parents=True)
    (tmp_path / "clone" / "pyproject.toml").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clone"


def test_a_clone_that_is_imported_in_place(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_PACKAGE", clone / "src" / "loopos")
    assert extras.install_command("eval") == f'pip install -e "{clone}[eval]"'
    monkeypatch.chdir(clone)
    assert extras.install_command("eval") == 'pip install -e ".[eval]"'
    assert extras.install_command() == 'pip install -e "."'


def test_a_clone_that_was_copied(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_PACKAGE", tmp_path / "lib" / "site-packages" / "loopos")
    monkeypatch.setattr(extras.metadata, "distribution", lambda name: Kept(clone.as_uri()))
    assert extras.install_command("serve") == f'pip install "{clone}[serve]"'


def test_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_PACKAGE", tmp_path / "lib" / "site-packages" / "loopos")
    monkeypatch.setattr(extras.metadata, "distribution", lambda name: Kept(None))
    assert extras.install_command("serve") == 'pip install "loopos[serve]"'
    assert extras.install_command() == "pip install --upgrade loopos"
