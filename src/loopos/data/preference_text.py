"""Preferences as people write them in a .txt file → rows.

    Prompt: Where is my parcel?
    Chosen: It left our house today and will be with you on Friday.
    Rejected: Wait and see.

Enters: numbered lines. Leaves: records with `prompt`, `chosen` and `rejected`, or faults. A comparison begins at a line
`Prompt:`, `Question:` or `User:`; `Chosen:` and `Rejected:` follow in either order, also written `Better:` and
`Worse:`. What follows a word goes on over the lines below it up to the next. Case does not matter, a number may stand
before the colon (`Prompt 3:`), and blank lines inside a text are kept.
Left out: what the texts must hold (`preferences`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loopos.config.faults import Fault
from loopos.data.record import ReadReport, Record, Records

_ROLES = {
    "prompt": "prompt",
    "question": "prompt",
    "user": "prompt",
    "chosen": "chosen",
    "better": "chosen",
    "rejected": "rejected",
    "worse": "rejected",
}
_LABEL = re.compile(rf"\s*({'|'.join(_ROLES)})(?:\s*\d+)?\s*:(?=\s|$)", re.IGNORECASE)
_WANTED = "a line Prompt: ..., a line Chosen: ... and a line Rejected: ..."


def _role(text: str) -> str | None:
    found = _LABEL.match(text)
    return None if found is None else _ROLES[found[1].lower()]


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
            yield _record(block, path)
            block = []
        block.append((number, text))
    if block:
        yield _record(block, path)


def _record(block: Sequence[tuple[int, str]], path: str) -> Record | Fault:
    """One comparison, or the fault of the first line that has no place in it."""
    parts: dict[str, list[str]] = {}
    role = ""
    for number, text in block:
        found = _role(text)
        if found is not None:
            if found in parts:
                hint = "begin each comparison with a line Prompt: ..."
                return Fault(path, number, None, found, f"a second {found}", f"one {found} a comparison", hint)
            role, text = found, text[_end_of_label(text) :]
            parts[role] = []
        assert role, "a file of comparisons begins with a prompt"
        parts[role].append(text.strip())
    told = {name: "\n".join(said).strip() for name, said in parts.items()}
    for needed in ("prompt", "chosen", "rejected"):
        if not told.get(needed):
            return Fault(path, block[0][0], None, needed, f"a comparison without {needed}", _WANTED)
    return Record(block[0][0], dict(told))


def _end_of_label(text: str) -> int:
    found = _LABEL.match(text)
    assert found is not None
    return found.end()
