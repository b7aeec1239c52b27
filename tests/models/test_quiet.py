"""Programs that open and save models through LoopOS do not see transformers' bars and reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from loopos.models.folders import save_pretrained
from loopos.models.load import load_pretrained
from loopos.models.quiet import quiet_libraries
from loopos.storage.hub import VERBOSE


@pytest.fixture(autouse=True)
def _talkative(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program that has set nothing: warnings and bars are shown."""
    monkeypatch.delenv(VERBOSE, raising=False)
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()  # type: ignore[no-untyped-call]
    logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    yield
    logging.set_verbosity(level)
    if not bars:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def test_opening_and_saving_a_model_prints_nothing(
    pico_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    opened = load_pretrained(str(pico_folder), causal=True)
    save_pretrained(tmp_path / "again", opened.model, opened.tokenizer)
    # Without its head the same folder has a tensor too many, of which transformers makes a report.
    load_pretrained(str(pico_folder))
    assert capfd.readouterr() == ("", "")


def test_what_a_program_has_set_is_as_before() -> None:
    logging.set_verbosity_info()  # type: ignore[no-untyped-call]
    with quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()


def test_verbose_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VERBOSE, "1")
    with quiet_libraries():
        assert logging.get_verbosity() == logging.WARNING
        assert logging.is_progress_bar_enabled()
