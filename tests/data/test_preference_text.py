"""Comparisons as people write them in a .txt file."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopos.config.diagnostics import DataError
from loopos.data import rows
from loopos.data.preferences import Pair, read_comparisons


def comparisons_of(file: Path, text: str) -> list[tuple[str, list[str], tuple[Pair, ...], int | None]]:
    file.write_text(text, encoding="utf-8")
    found, _ = read_comparisons(rows.read(str(file)), {})
    return [
        (each.prompt[0].content, [summary[0].content for summary in each.responses], each.pairs, each.row.line) for each in found
    ]  # fmt: skip


def test_words_lines_and_blank_lines(tmp_path: Path) -> None:
    text = (
        "Prompt: Where is my parcel?\nChosen: It left today.\n\nExpect it on Friday.\nRejected: Wait.\n\n"
        "question 2:\nWhat now?\nworse: nothing\nBETTER:\n  This.\n  That.\n"
    )
    found = comparisons_of(tmp_path / "a.txt", text)
    assert found == [
        ("Where is my parcel?", ["It left today.\n\nExpect it on Friday.", "Wait."], (Pair(0, 1),), 1),
        ("What now?", ["This.\nThat.", "nothing"], (Pair(0, 1),), 7),
    ]


@pytest.mark.parametrize(
    ("text", "line", "field", "expected"),
    [
        ("Prompt: a\nChosen: b\n", 1, "rejected", "a line Rejected:"),
        ("Prompt: a\nChosen: b\nRejected: c\n\nPrompt: d\nRejected: e\n", 5, "chosen", "a line Chosen:"),
        ("Prompt: a\nChosen: b\nChosen: c\nRejected: d\n", 3, "chosen", "one chosen a comparison"),
        ("Prompt:\nChosen: b\nRejected: c\n", 1, "prompt", "a line Prompt:"),
        ("Prompt: a\nChosen: b\nRejected: b\n", 1, "rejected", ""),
    ],
)
def test_diagnostics_name_line_and_field(text: str, line: int, field: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        comparisons_of(tmp_path / "a.txt", text)
    [diagnostic, *_] = caught.value.diagnostics
    assert (diagnostic.line, diagnostic.field) == (line, field)
    assert expected in diagnostic.expected


def test_a_text_with_other_fields_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="comparisons"):
        comparisons_of(tmp_path / "a.txt", "Prompt: a\nAnswer: b\n")
