"""A model with one flipped bit gives no answer: every command that opens it ends in one line that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke


def flipped(run: Path, to: Path) -> Path:
    """A copy of a run with one bit of its weights flipped, which leaves them readable."""
    shutil.copytree(run, to)
    file = to / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1 << 6
    file.write_bytes(bytes(content))
    return file


def check_refused(result: Any, file: Path, out: Path) -> None:
    assert result.exit_code == 2, result.stderr
    assert "damaged or changed" in result.stderr, result.stderr
    [line] = [line for line in result.stderr.splitlines() if "damaged or changed" in line]
    assert f"{file}: damaged or changed: its SHA-256 differs from the saved one" in line
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "RUN", "-p", "a parcel"),
        ("export", "RUN", "--format", "huggingface", "-o", "OUT"),
        ("export", "RUN", "--format", "gguf", "-o", "OUT"),
        ("merge", "RUN", "OTHER", "--method", "linear", "-o", "OUT"),
        ("quantize", "RUN", "--method", "int8", "-o", "OUT"),
        ("prune", "RUN", "--method", "magnitude", "--sparsity", "0.5", "-o", "OUT"),
        ("ensemble", "OTHER", "RUN", "--copy", "-o", "OUT"),
        ("evaluate", "RUN", "DATA"),
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_a_language_model(command: tuple[str, ...], language_run: Path, invoke: Invoke, tmp_path: Path) -> None:
    file, out, data = flipped(language_run, tmp_path / "run"), tmp_path / "out", tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    names = {"RUN": file.parent.parent, "OUT": out, "DATA": data, "OTHER": language_run}
    check_refused(invoke(*(names.get(word, word) for word in command)), file, out)


@pytest.mark.parametrize("command", [("predict", "RUN", "DATA"), ("evaluate", "RUN", "DATA")])
def test_a_classifier(command: tuple[str, ...], trained: Any, project: Path, invoke: Invoke, tmp_path: Path) -> None:
    file = flipped(project / "outputs" / "first", tmp_path / "run")
    names = {"RUN": file.parent.parent, "DATA": project / "test.jsonl"}
    check_refused(invoke(*(names.get(word, word) for word in command)), file, tmp_path / "out")
