"""Read worked problems and comparisons that people write in a .txt file.

    Problem: What is 17 + 26?                 Prompt: Where is my parcel?
    7 + 6 = 13, carry 1                       Chosen: It left our house today.
    1 + 2 + 1 = 4                             Rejected: Wait and see.
    Answer: 43

A worked problem starts at `Problem:` or `Question:` and ends at `Answer:` or `Final answer:`; steps are one per line,
after an optional line `Reasoning:`, `Steps:` or `Solution:` (lines before it continue the problem). `Q:` and `A:` work
too; an `A:` elsewhere may be an option. A comparison starts at `Prompt:`, `Question:` or `User:`; `Chosen:` and
`Rejected:` (or `Better:` and `Worse:`) follow in either order. Text continues up to the next label. Case does not
matter, and a number may precede the colon (`Problem 3:`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from loopos.config.diagnostics import Diagnostic
from loopos.data.record import ReadReport, Record, Records, shown

Role: TypeAlias = Literal["problem", "reasoning", "answer"]
_WORKED_ROLES: dict[str, Role] = {
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
_WORKED_LABEL = re.compile(rf"\s*({'|'.join(_WORKED_ROLES)})(?:\s*\d+)?\s*:(?=\s|$)", re.IGNORECASE)
_WORKED_EXPECTED = "a line Problem: ..., one step per line, and a line Answer: ..."


class _Line(NamedTuple):
    """`label`: the word before its colon, if it is one of `_ROLES`; `summary`: what follows it; `text`: all of it."""

    number: int
    label: str | None
    summary: str
    text: str


def is_worked_text(lines: Sequence[str]) -> bool:
    """Whether a file that begins with these lines, none of them blank, holds worked problems."""
    first, *more = [_WORKED_ROLES.get(_taken_apart(0, line).label or "") for line in lines]
    return first == "problem" and ("answer" in more or "reasoning" in more)


def worked_records(lines: Iterator[tuple[int, str]], path: str, report: ReadReport) -> Records:
    """The problems of a file in its order; blank lines are counted in `report`."""
    block: list[_Line] = []
    for number, text in lines:
        if not text.strip():
            report.blank_lines += 1
            continue
        line = _taken_apart(number, text)
        if block and line.label is not None and _WORKED_ROLES[line.label] == "problem":
            yield _worked_record(block, path)
            block = []
        block.append(line)
    if block:
        yield _worked_record(block, path)


def _taken_apart(number: int, text: str) -> _Line:
    found = _WORKED_LABEL.match(text)
    if found is None:
        return _Line(number, None, text.strip(), text.strip())
    return _Line(number, found[1].lower(), text[found.end() :].strip(), text.strip())


def _worked_record(block: Sequence[_Line], path: str) -> Record | Diagnostic:
    """One problem, or the diagnostic for its first misplaced line."""
    is_headed = any(line.label is not None and _WORKED_ROLES[line.label] == "reasoning" for line in block)
    parts: dict[Role, list[str]] = {}
    role: Role | None = None
    for line in block:
        is_option = line.label == "a" and block[0].label != "q"
        if line.label is not None and not is_option:
            role = _WORKED_ROLES[line.label]
            if role in parts:
                hint = "begin each problem with a line Problem: ..."
                return Diagnostic(path, line.number, None, role, f"a second {role}", f"one {role} a problem", hint)
            parts[role] = []
        elif role == "problem" and parts[role] and not is_headed:
            role = "reasoning"
            parts[role] = []
        elif role == "answer" and parts[role]:
            hint = "begin each problem with a line Problem: ..., and write its answer on one line"
            return Diagnostic(
                path, line.number, None, role, f"{shown(line.summary)} after the answer", "nothing more", hint
            )
        assert role is not None, "a file of worked problems begins with a problem"
        summary = line.text if is_option else line.summary
        parts[role] += [summary] if summary else []
    for needed in ("problem", "answer"):
        if not parts.get(needed):
            return Diagnostic(path, block[0].number, None, needed, f"a problem without {needed}", _WORKED_EXPECTED)
    steps, answer = parts.get("reasoning", []), parts["answer"][0]
    return Record(block[0].number, {"problem": "\n".join(parts["problem"]), "reasoning": steps, "answer": answer})


_PREFERENCE_ROLES = {
    "prompt": "prompt",
    "question": "prompt",
    "user": "prompt",
    "chosen": "chosen",
    "better": "chosen",
    "rejected": "rejected",
    "worse": "rejected",
}
_PREFERENCE_LABEL = re.compile(rf"\s*({'|'.join(_PREFERENCE_ROLES)})(?:\s*\d+)?\s*:(?=\s|$)", re.IGNORECASE)
_PREFERENCE_EXPECTED = "a line Prompt: ..., a line Chosen: ... and a line Rejected: ..."


def _role(text: str) -> str | None:
    found = _PREFERENCE_LABEL.match(text)
    return None if found is None else _PREFERENCE_ROLES[found[1].lower()]


def is_preference_text(lines: Sequence[str]) -> bool:
    """Whether a file that begins with these lines, none of them blank, holds comparisons."""
    first, *more = map(_role, lines)
    return first == "prompt" and ("chosen" in more or "rejected" in more)


def preference_records(lines: Iterator[tuple[int, str]], path: str, report: ReadReport) -> Records:
    """The comparisons of a file in its order; blank lines between them are counted in `report`."""
    block: list[tuple[int, str]] = []
    for number, text in lines:
        if not text.strip() and not block:
            report.blank_lines += 1
            continue
        if block and _role(text) == "prompt":
            yield _preference_record(block, path)
            block = []
        block.append((number, text))
    if block:
        yield _preference_record(block, path)


def _preference_record(block: Sequence[tuple[int, str]], path: str) -> Record | Diagnostic:
    """One comparison, or the diagnostic for its first misplaced line."""
    parts: dict[str, list[str]] = {}
    role = ""
    for number, text in block:
        found = _role(text)
        if found is not None:
            if found in parts:
                hint = "begin each comparison with a line Prompt: ..."
                return Diagnostic(path, number, None, found, f"a second {found}", f"one {found} a comparison", hint)
            role, text = found, text[_end_of_label(text) :]
            parts[role] = []
        assert role, "a file of comparisons begins with a prompt"
        parts[role].append(text.strip())
    texts = {name: "\n".join(summary).strip() for name, summary in parts.items()}
    for needed in ("prompt", "chosen", "rejected"):
        if not texts.get(needed):
            return Diagnostic(path, block[0][0], None, needed, f"a comparison without {needed}", _PREFERENCE_EXPECTED)
    return Record(block[0][0], dict(texts))


def _end_of_label(text: str) -> int:
    found = _PREFERENCE_LABEL.match(text)
    assert found is not None
    return found.end()
