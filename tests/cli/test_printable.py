"""What files and models hold reaches the terminal as text: no escape moves the cursor, no half character is an error."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from loopos.cli import answers
from loopos.config.diagnostics import printable, printable_json
from loopos.data.decoding import split_lines
from loopos.storage.events import EventLog
from loopos.storage.json_files import json_text, read_object, save_json
from loopos.training.progress import RunProgress, write_samples
from tests.cli.conftest import Invoke

HALF, TITLE, CLEAR, TURNED = "\ud800", "\x1b]0;owned\x07", "\x9b2J", "\u202egpj.exe"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("good\tday\nnaïve 東京\u3000👩\u200d🔬 سلام", "good\tday\nnaïve 東京\u3000👩\u200d🔬 سلام"),
        (TITLE, "\\x1b]0;owned\\x07"),
        (CLEAR, "\\x9b2J"),
        (HALF, "\\ud800"),
        ("10%\r20%", "10%\\r20%"),
        (TURNED, "\\u202egpj.exe"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_what_a_terminal_obeys_is_escaped_and_what_people_write_is_not(text: str, expected: str) -> None:
    assert printable(text) == expected
    as_json = printable_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(as_json) == text
    assert not OBEYED.search(as_json)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "good", "label": f"{TITLE}{CLEAR}"}, {"text": "bad", "label": f"b{TURNED}"}],
        [{"text": "good", "label": 0, f"x{HALF}": 1, TITLE: 2}, {"text": "bad", "label": 1, f"x{HALF}": 1, TITLE: 2}],
        [{HALF: "good", TITLE: "pos"}],
        [{"text": f"{HALF} film", "label": f"pos{HALF}"}, {"text": f"{TITLE}", "label": "neg"}],
        [{"text": "a", "label": [f"x{HALF}", TITLE]}, {"text": "b", "label": [TITLE]}],
        [{"text": f"{TITLE}", "label": "a"}, {"text": f"{TITLE}", "label": f"{CLEAR}"}],
    ],
)
def test_data_check_of_hostile_names_and_labels(
    rows: list[dict[str, Any]], as_json: bool, invoke: Invoke, tmp_path: Path
) -> None:
    file = tmp_path / f"a{TITLE}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("data", "check", file, *(["--json"] if as_json else []))
    assert result.exit_code in (0, 2)
    assert not OBEYED.search(result.stdout + result.stderr)
    if as_json:
        assert json.loads(result.stdout)["source"] == str(file)


def test_errors_and_progress_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RunProgress()
    progress.console.file = written = io.StringIO()
    progress.say(f"task: classification, 2 classes ({TITLE}, {HALF})")
    progress.warn(CLEAR)
    assert written.getvalue() == "task: classification, 2 classes (\\x1b]0;owned\\x07, \\ud800)\n\\x9b2J\n"
    answers.say(TITLE)
    answers.say_json({HALF: CLEAR})
    out = capsys.readouterr().out
    assert not OBEYED.search(out)
    assert json.loads(out.partition("\n")[2]) == {HALF: CLEAR}


def test_files_of_a_run_hold_every_text_and_give_it_back(tmp_path: Path) -> None:
    content = {"path": f"caf{HALF}.csv", "line": "a\u2028b\x85c", TITLE: ["naïve"]}
    save_json(tmp_path / "config.json", content)
    assert read_object(tmp_path / "config.json") == content
    assert '"naïve"' in (tmp_path / "config.json").read_text(encoding="utf-8")
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("start", step=0, metrics={"said": HALF + TITLE}, timing={})
    assert json.loads((tmp_path / "events.jsonl").read_text(encoding="utf-8"))["metrics"] == {"said": HALF + TITLE}
    for step in (1, 2):
        write_samples(tmp_path / "samples.jsonl", step, [{"text": "a\u2028b\x85c"}])
    lines = split_lines((tmp_path / "samples.jsonl").read_text(encoding="utf-8"))
    assert [json.loads(line)["text"] for line in lines] == ["a\u2028b\x85c"] * 2
    assert json_text({"a": 1, "b": "ü"}) == '{"a": 1, "b": "ü"}'
