"""What a language model wrote at validation, as a report shows it: the same prompts before training and last.

Enters: a run's samples.jsonl. Leaves: blocks. The records of policies, of chats and of problems with answers differ in
their keys, and read alike here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopos.config.faults import UserError
from loopos.config.figures import figure
from loopos.evaluation.blocks import Block, Grid, Heading, Quotation
from loopos.evaluation.markdown import number
from loopos.evaluation.run_folder import Run

SAMPLES = "samples.jsonl"
# Where the config has no evaluation.samples.
_SHOWN = 3
_MOST_CHARACTERS = 2000


def samples_blocks(run: Run) -> list[Block]:
    """The first prompts, with the answers before training and of the last validation; nothing without samples."""
    records = _records(run.path / SAMPLES)
    steps = sorted({each["step"] for each in records})
    if not steps:
        return []
    shown = run.config.get("evaluation", {}).get("samples")
    most = shown if isinstance(shown, int) and shown > 0 else _SHOWN
    first, last = ([each for each in records if each["step"] == step] for step in (steps[0], steps[-1]))
    title = "Answers before and after" if steps[0] == 0 and len(steps) > 1 else "Answers"
    parts: list[Block] = [Heading(title)]
    for place, record in enumerate(last[:most]):
        parts.append(Quotation(_short(_first_of(record, "prompt", "problem"))))
        rows = []
        if place < len(first) and len(steps) > 1:
            rows.append(_row("before training" if steps[0] == 0 else f"step {steps[0]}", first[place]))
        rows.append(_row(f"step {steps[-1]}", record))
        reference = _first_of(record, "reference", "wanted")
        if reference:
            rows.append(("in the data", "", _short(reference)))
        named = next((name for name in ("reward", "is_right") if name in record), "")
        parts.append(Grid(("", named, "answer"), rows))
    return parts


def _row(name: str, record: Mapping[str, Any]) -> tuple[str, str, str]:
    reward, right = number(record.get("reward")), record.get("is_right")
    scored = figure(reward) if reward is not None else {True: "right", False: "wrong"}.get(right, "")  # type: ignore[arg-type]
    return name, scored, _short(_first_of(record, "response", "text", "answer"))


def _first_of(record: Mapping[str, Any], *names: str) -> str:
    return next((str(record[name]) for name in names if record.get(name) not in (None, "")), "")


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _records(file: Path) -> list[dict[str, Any]]:
    """Every record; a last line that a killed process left torn is left out."""
    if not file.is_file():
        return []
    found = []
    for place, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{place}: not JSON ({error}); expected one object a line") from error
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found
