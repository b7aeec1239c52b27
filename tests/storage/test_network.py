"""Whether a folder is writable and the hub reachable, each tested by one attempt."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopos.config.diagnostics import SettingError
from loopos.storage import hub
from loopos.storage.durable import require_writable


@pytest.fixture(autouse=True)
def _forget_the_answer() -> Iterator[None]:
    hub.why_unreachable.cache_clear()
    yield
    hub.why_unreachable.cache_clear()


def test_a_writable_folder_is_unchanged(tmp_path: Path) -> None:
    require_writable("data.output_dir", tmp_path / "a" / "b")
    require_writable("data.output_dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_is_not_writable_is_named() -> None:
    with pytest.raises(SettingError) as caught:
        require_writable("data.output_dir", Path("/proc/x/y"))
    assert str(caught.value).startswith("data.output_dir: /proc is not writable (")
    assert caught.value.key == "data.output_dir"


def test_without_a_network_no_request_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_problem", lambda endpoint: pytest.fail("the hub was asked"))
    with pytest.raises(SettingError, match=r"^data.tokenizer: org/name is neither .*: HF_HUB_OFFLINE is set"):
        hub.require_hub("data.tokenizer", "org/name")


def test_what_is_cached_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--name" / "snapshots" / "a1").mkdir(parents=True)
    hub.require_hub("data.pretrained_weights", "org/name")
    with pytest.raises(SettingError):
        hub.require_hub("data.training_data", "org/name", kind="dataset")


def test_a_hub_that_never_answers_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts the connection and sends nothing."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        problem = hub._problem(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert problem is not None
        assert "time" in problem.lower()
        # Five tries with pauses in between would be 30 s.
        assert time.monotonic() - began < 10


def test_a_name_lookup_that_never_ends_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "_DEADLINE_SECONDS", 0.05)
    monkeypatch.setattr(hub, "_problem", lambda endpoint: time.sleep(0.5))
    assert "no answer within 0.05 s" in str(hub.why_unreachable())
    # From now on the libraries look into their cache.
    assert constants.HF_HUB_OFFLINE is True
