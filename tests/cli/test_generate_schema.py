"""`loopos generate --json-schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke

TEXT = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 3}, "right": {"type": "boolean"}},
        "required": ["name", "right"],
        "additionalProperties": False,
    }
)


def test_the_command(pico_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    pytest.importorskip("llguidance")
    file = tmp_path / "schema.json"
    file.write_text(TEXT)
    options: tuple[Any, ...] = (
        "-p",
        "a",
        "-p",
        "b",
        "--device",
        "cpu",
        "--temperature",
        1,
        "--max-new-tokens",
        60,
        "--json",
    )
    result = invoke("generate", pico_folder, "--json-schema", file, *options)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [set(json.loads(line["text"])) for line in lines] == [{"name", "right"}] * 2
    file.write_text("[]")
    for more, piece in (((), "got list; expected an object"), (("--num-beams", 2), "--num-beams with --json-schema")):
        wrong = invoke("generate", pico_folder, "--json-schema", file, "-p", "a", *more)
        assert wrong.exit_code == 2
        assert piece in wrong.stderr
