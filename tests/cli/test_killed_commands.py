"""`kill -9` at random moments of the commands that write models: the output is whole or not there, nothing lies about."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_runs import NUM_KILLS, digest, in_a_child

from tests.cli.conftest import Invoke

Words = tuple[object, ...]
COMMANDS: dict[str, Callable[[Path, Path], Words]] = {
    "merge": lambda model, text: (model, model, "--method", "linear", "--evaluate", text.with_suffix(".jsonl")),
    "prune": lambda model, text: (
        model, "--method", "wanda", "--sparsity", "0.5", "--calibration", text, "--calibration-tokens", 24,
    ),
    "quantize": lambda model, text: (
        model, "--method", "int4", "--calibration", "gptq", "--calibration-text", text, "--calibration-tokens", 24,
    ),
    "export": lambda model, text: (model, "--format", "gguf", "--type", "q8_0"),
}  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    """Names of all files, and the content of the weights (reports contain times)."""
    return {
        str(file.relative_to(folder)): digest(file) if file.suffix in (".safetensors", ".gguf") else ""
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("few_goes")
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments(command: str, invoke: Invoke, pico_folder: Path, tmp_path: Path) -> None:
    text, places = tmp_path / "given" / "text.txt", tmp_path / "places"
    text.parent.mkdir()
    places.mkdir()
    text.write_text("the parcel came late and the box was open, thank you. " * 40, encoding="utf-8")
    text.with_suffix(".jsonl").write_text('{"text": "the parcel came late"}\n' * 4, encoding="utf-8")
    out = places / "out"

    def run() -> None:
        result = invoke(command, *COMMANDS[command](pico_folder, text), "-o", out)
        assert result.exit_code == 0, result.stderr

    began = time.monotonic()
    assert in_a_child(run, None) == 0
    seconds, expected = time.monotonic() - began, content(out)
    assert any(expected.values())
    shutil.rmtree(out)
    draw, killed = random.Random(command), 0
    while killed < max(2, NUM_KILLS // 2):
        began = time.monotonic()
        if in_a_child(run, draw.uniform(0.0, 0.95) * seconds) is None:
            killed += 1
        else:
            # It came to its end before its kill: what it took is what the next moments are drawn from.
            seconds = min(seconds, time.monotonic() - began)
        if out.exists():
            assert content(out) == expected
            shutil.rmtree(out)
        assert all(place.name.startswith(".out.partial-") for place in places.iterdir())
    # A kill of a chosen moment: something half is there for certain, and the next run takes it away.
    shutil.copytree(pico_folder, places / f".out.partial-{2**22 + 1}")
    assert in_a_child(run, None) == 0
    assert content(out) == expected
    assert [place.name for place in places.iterdir()] == ["out"]
