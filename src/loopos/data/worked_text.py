"""Worked problems as people write them in a .txt file → rows.

    Problem: What is 17 + 26?
    7 + 6 = 13, carry 1
    1 + 2 + 1 = 4
    Answer: 43

Enters: numbered lines. Leaves: records with `problem`, `reasoning` (a list of steps) and `answer`, or faults. A problem
begins at a line `Problem:` or `Question:`; its steps follow, one a line; `Answer:` or `Final answer:` ends it. Problem
and answer may stand on the line below their word. A line `Reasoning:`, `Steps:` or `Solution:` may stand before the
steps; lines before it go on with the problem. `Q:` with `A:` are Question and Answer (`A:` elsewhere may be an option
to choose). Case does not matter, a number may stand before the colon (`Problem 3:`), and blank lines mean nothing.
Left out: what the step format cannot hold (`demonstrations`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from loopos.config.faults import Fault
from loopos.data.record import ReadReport, Record, Records, shown

Role: TypeAlias = Literal["problem", "reasoning", "answer"]
_ROLES: dict[str, Role] = {
    "problem": "problem",
    "question": "problem",
    "q": "problem",
    "reasoning": "reasoning",
    "steps": "reasoning",
    "solution": "reasoning",
    "answer": "answer",
    "final answer": "answer",
    "a": "answer",
}
_LABEL = re.compile(rf"\s*({'|'.join(_ROLES)})(?:\s*\d+)?\s*:(?=\s|$)", re.IGNORECASE)
_WANTED = "a line Problem: ..., its steps one a line, and a line Answer: ..."


class _Line(NamedTuple):
    """`label`: the word before its colon, if it is one of `_ROLES`; `said`: what follows it; `text`: all of it."""

    number: int
    label: str | None
    said: str
    text: str


def is_worked_text(lines: Sequence[str]) -> bool:
    """Whether a file that begins with these lines, none of them blank, holds worked problems."""
    first, *more = [_ROLES.get(_taken_apart(0, line).label or "") for line in lines]
    return first == "problem" and ("answer" in more or "reasoning" in more)


def worked_records(lines: Iterator[tuple[int, str]], path: str, report: ReadReport) -> Records:
    """The problems of a file in its order; blank lines are counted in `report`."""
    block: list[_Line] = []
    for number, text in lines:
        if not text.strip():
            report.blank_lines += 1
            continue
        line = _taken_apart(number, text)
        if block and line.label is not None and _ROLES[line.label] == "problem":
            yield _record(block, path)
            block = []
        block.append(line)
    if block:
        yield _record(block, path)


def _taken_apart(number: int, text: str) -> _Line:
    found = _LABEL.match(text)
    if found is None:
        return _Line(number, None, text.strip(), text.strip())
    return _Line(number, found[1].lower(), text[found.end() :].strip(), text.strip())


def _record(block: Sequence[_Line], path: str) -> Record | Fault:
    """One problem, or the fault of the first line that has no place in it."""
    is_headed = any(line.label is not None and _ROLES[line.label] == "reasoning" for line in block)
    parts: dict[Role, list[str]] = {}
    role: Role | None = None
    for line in block:
        is_option = line.label == "a" and block[0].label != "q"
        if line.label is not None and not is_option:
            role = _ROLES[line.label]
            if role in parts:
                hint = "begin each problem with a line Problem: ..."
                return Fault(path, line.number, None, role, f"a second {role}", f"one {role} a problem", hint)
            parts[role] = []
        elif role == "problem" and parts[role] and not is_headed:
            role = "reasoning"
            parts[role] = []
        elif role == "answer" and parts[role]:
            hint = "begin each problem with a line Problem: ..., and write its answer on one line"
            return Fault(path, line.number, None, role, f"{shown(line.said)} behind the answer", "nothing more", hint)
        assert role is not None, "a file of worked problems begins with a problem"
        said = line.text if is_option else line.said
        parts[role] += [said] if said else []
    for needed in ("problem", "answer"):
        if not parts.get(needed):
            return Fault(path, block[0].number, None, needed, f"a problem without {needed}", _WANTED)
    steps, answer = parts.get("reasoning", []), parts["answer"][0]
    return Record(block[0].number, {"problem": "\n".join(parts["problem"]), "reasoning": steps, "answer": answer})
