"""Six formats, from the line of a file to ids and mask on the pico tokenizer, written out by hand.

A printable ASCII character that no merge takes has the id of its code less 30 ("2" is 20), a line end is 201, a blank
223, the end token 2; other ids are merges, named where they occur. No template comes with the pico tokenizer, so
conversations are written in the plain format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import read_supervised
from loopos.data.supervised_tokens import encode_supervised

LINE_END, BLANK, END = 201, 223, 2
THINK = [259, 266, 77]  # th in k
SYSTEM = [5, 5, 5, BLANK, 53, 91, 85, 86, 71, 79, 28, LINE_END]  # # # _ S y s t e m : /
USER = [5, 5, 5, BLANK, 55, 85, 262, 28, LINE_END]  # # # _ U s er : /
ASSISTANT = [5, 5, 5, BLANK, 35, 85, 85, 276, 86, 285, 86, 28, LINE_END]  # # # _ A s s is t an t : /
PARTED = [LINE_END, LINE_END]

# (row, [(ids, learned), ...])
BY_HAND: dict[str, tuple[dict[str, Any], list[tuple[list[int], bool]]]] = {
    "demonstrations": (
        {"problem": "2+2=?", "reasoning": ["1+1=2", "2+2=4"], "answer": "4"},
        [
            ([*USER, 20, 13, 20, 31, 33, *PARTED, *ASSISTANT], False),
            ([30, *THINK, 32, LINE_END], True),  # <think>/
            ([19, 13, 19, 31, 20, LINE_END, 20, 13, 20, 31, 22, LINE_END], True),  # 1+1=2/2+2=4/
            ([30, 17, *THINK, 32, LINE_END], True),  # </think>/
            ([22, END], True),
        ],
    ),
    "messages": (
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": "1?"},
                {"role": "assistant", "content": "a good order"},
            ]
        },
        [
            ([*USER, 74, 75, *PARTED, *ASSISTANT], False),
            ([339, END], True),  # no
            ([*PARTED, *USER, 19, 33, *PARTED, *ASSISTANT], False),
            ([67, BLANK, 323, 303, END], True),  # a _ good _order
        ],
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}],
            "system": "7",
        },
        [
            ([*SYSTEM, 25, *PARTED, *USER, 74, 75, *PARTED, *ASSISTANT], False),
            ([81, 77, END], True),
        ],
    ),
    "Alpaca": (
        {"instruction": "add", "input": "1", "output": "2"},
        [
            ([*USER, 67, 314, LINE_END, 19, *PARTED, *ASSISTANT], False),  # a dd / 1
            ([20, END], True),
        ],
    ),
    "prompt and completion": (
        {"prompt": "2+2=", "completion": " 4"},
        [([20, 13, 20, 31], False), ([BLANK, 22, END], True)],
    ),
    "text": (
        {"text": "good value"},
        [([323], False), ([376, 356, END], True)],  # good, then _val ue: nothing predicts the first token
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_ids_and_the_mask_of_a_row(name: str, tmp_path: Path, pico_tokenizer: Path) -> None:
    actual, expected = BY_HAND[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(actual) + "\n")
    examples, _ = read_supervised(read(str(file)), {}, step_format=NAMED_FORMATS["think"])
    (row,), report = encode_supervised(
        AutoTokenizer.from_pretrained(pico_tokenizer), examples, step_format=NAMED_FORMATS["think"], max_length=None
    )
    assert row.ids == [token for ids, _ in expected for token in ids]
    assert row.mask == [learned for ids, learned in expected for _ in ids]
    assert (row.weights, row.index) == (None, 0)
    assert (report.read, report.used, report.trained_tokens) == (1, 1, sum(row.mask))
