"""The answers that a run stored, by prompt and step, for reading side by side.

Enters: `samples.jsonl` (answers to the validation prompts) or `rollouts.jsonl` (answers of training). Leaves: rows of
one prompt each with its answers by step. A file is read once and again when it has changed. Apart from `board`, which
knows requests: what answers have and how they are filtered does not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopos.evaluation.run_folder import read_samples

# Answers of different methods name their parts differently.
_PROMPT, _TEXT = ("prompt", "problem"), ("response", "text", "answer")
_REWARD, _REFERENCE = ("reward", "judge", "is_right"), ("reference", "expected")
_CACHED_FILES = 8


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which answers are shown. steps: none for the first, a middle and the last. low, high: of their reward."""

    steps: Sequence[int] = ()
    low: float | None = None
    high: float | None = None
    text: str = ""
    offset: int = 0
    limit: int = 50


@dataclass
class SampleFiles:
    """The records of the files that were read last."""

    _files: OrderedDict[Path, tuple[tuple[int, int], list[dict[str, Any]]]] = field(default_factory=OrderedDict)

    def read(self, file: Path) -> list[dict[str, Any]]:
        """All records of a file, none without it. Raises `UserError` for a broken line."""
        if not file.is_file():
            return []
        status = file.stat()
        known = self._files.get(file)
        if known is not None and known[0] == (status.st_size, status.st_mtime_ns):
            return known[1]
        records = read_samples(file)
        self._files[file] = (status.st_size, status.st_mtime_ns), records
        while len(self._files) > _CACHED_FILES:
            self._files.popitem(last=False)
        return records


def side_by_side(records: Sequence[Mapping[str, Any]], chosen: Filter) -> dict[str, Any]:
    """`all_steps` with answers, the `steps` shown, `num_rows` that pass the filter and some `rows` of these: a prompt,
    the expected answer if there is one, and for each step its answers with their reward (None if nothing judged them).
    """
    every = sorted({int(record["step"]) for record in records})
    steps = [step for step in chosen.steps if step in set(every)] or _ends_and_middle(every)
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["step"] not in steps:
            continue
        prompt = _text_of(_first(record, _PROMPT))
        row = rows.setdefault(prompt, {"prompt": prompt, "expected": "", "answers": {}})
        expected = _first(record, _REFERENCE)
        if expected is not None:
            row["expected"] = _text_of(expected)
        row["answers"].setdefault(str(record["step"]), []).append(_answer(record))
    found = [row for row in rows.values() if _passes(row, chosen)]
    page = found[chosen.offset : chosen.offset + chosen.limit]
    return {"all_steps": every, "steps": steps, "num_rows": len(found), "rows": page}


def _ends_and_middle(steps: Sequence[int]) -> list[int]:
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _text_of(value: object) -> str:
    """A text, or messages as `role: content` lines."""
    if isinstance(value, list):
        return "\n".join(
            f"{each.get('role', '')}: {each.get('content', '')}" if isinstance(each, Mapping) else str(each)
            for each in value
        )
    return "" if value is None else str(value)


def _answer(record: Mapping[str, Any]) -> dict[str, Any]:
    reward = _first(record, _REWARD)
    parts = {name: value for name, value in record.items() if name.startswith("score_") or name in ("kl", "advantage")}
    finish = record.get("finish_reason") or ("stop" if record.get("ended") else "length" if "ended" in record else "")
    return {
        "text": _text_of(_first(record, _TEXT)),
        "reward": float(reward) if isinstance(reward, int | float) else None,
        "parts": {name: value for name, value in parts.items() if isinstance(value, int | float)},
        "finish_reason": str(finish),
    }


def _passes(row: Mapping[str, Any], chosen: Filter) -> bool:
    answers = [answer for found in row["answers"].values() for answer in found]
    if chosen.text and not any(chosen.text in text for text in (row["prompt"], *(each["text"] for each in answers))):
        return False
    if chosen.low is None and chosen.high is None:
        return True
    low = float("-inf") if chosen.low is None else chosen.low
    high = float("inf") if chosen.high is None else chosen.high
    return any(each["reward"] is not None and low <= each["reward"] <= high for each in answers)
