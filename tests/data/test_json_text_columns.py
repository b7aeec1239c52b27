"""Lists and objects stored as text are parsed in every column that can hold one, and the same rows give the same tokens
from every kind of file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import SPECIAL, TOOL_CHATML
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError
from loopos.data.formats import read_labeled
from loopos.data.labels import infer_task
from loopos.data.preference_tokens import encode_comparisons
from loopos.data.preferences import Pair, read_comparisons
from loopos.data.prompts import read_prompts
from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import read_supervised
from loopos.data.supervised_tokens import encode_supervised

THINK = NAMED_FORMATS["think"]
ASKED, SAID, OTHER = ({"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Ulm."},
                      {"role": "assistant", "content": "In Bonn."})  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


PAIRS: list[dict[str, Any]] = [
    {"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
    {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]},
    {"prompt": [ASKED], "chosen": SAID, "rejected": OTHER},
    {"messages": [ASKED], "chosen": [SAID], "rejected": [OTHER]},
]


@pytest.mark.parametrize("spelled", [json.dumps, repr])
@pytest.mark.parametrize("row", PAIRS)
def test_comparisons_of_messages_as_text(tmp_path: Path, row: dict[str, Any], spelled: Callable[[Any], str]) -> None:
    expected, _ = read_comparisons(read(write(tmp_path / "a.jsonl", row)), {})
    as_text = {name: spelled(value) for name, value in row.items()}
    found, _ = read_comparisons(read(write(tmp_path / "b.jsonl", as_text)), {})
    assert (found[0].prompt, found[0].responses) == (expected[0].prompt, expected[0].responses)
    assert [message.content for message in found[0].prompt] == ["Where?"]  # type: ignore[union-attr]
    prompts, _ = read_prompts(read(write(tmp_path / "b.jsonl", as_text)), {})
    assert prompts[0].prompt == expected[0].prompt


def test_groups_as_text(tmp_path: Path) -> None:
    row = {"prompt": "Where?", "responses": "['In Ulm.', 'In Bonn.']", "scores": "[0.1, 0.9]"}
    (found,), _ = read_comparisons(read(write(tmp_path / "a.jsonl", row)), {})
    assert found.pairs == (Pair(1, 0),)
    ranked = {"prompt": "Where?", "responses": json.dumps([[SAID], [OTHER]]), "ranking": "[1, 0]"}
    (found,), _ = read_comparisons(read(write(tmp_path / "a.jsonl", ranked)), {})
    assert found.pairs == (Pair(1, 0),)
    assert found.responses[0][0].content == "In Ulm."  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]", "chosen": "a",
          "rejected": "b"}, "prompt"),
        ({"prompt": "a", "chosen": '[{"role": "assistant", "content": "cut of', "rejected": "b"}, "chosen"),
        ({"prompt": "a", "responses": "a, b", "scores": [1, 2]}, "responses"),
    ],
)  # fmt: skip
def test_text_that_spells_no_list_is_refused(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError) as caught:
        read_comparisons(read(write(tmp_path / "a.jsonl", row)), {})
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.line, diagnostic.field) == (1, field)
    assert "neither JSON nor a Python list" in diagnostic.actual
    assert "json.dumps" in diagnostic.hint


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": "[{'role': 'user'"}, "messages"),
        ({"problem": json.dumps([ASKED]), "answer": "4"}, "problem"),
        ({"instruction": json.dumps([ASKED]), "output": "4"}, "instruction"),
        ({"prompt": json.dumps([ASKED]), "completion": "4"}, "completion"),
    ],
)
def test_messages_as_text_are_never_learned_as_text(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError) as caught:
        read_supervised(read(write(tmp_path / "a.jsonl", row)), {}, step_format=THINK)
    assert caught.value.diagnostics[0].field == field


def test_steps_as_text(tmp_path: Path) -> None:
    for reasoning in (["one", "two"], '["one", "two"]', "['one', 'two']", "one\ntwo"):
        row = {"problem": "p", "reasoning": reasoning, "answer": "[1, 2]"}
        (example,), _ = read_supervised(read(write(tmp_path / "a.jsonl", row)), {}, step_format=THINK)
        assert (example.steps, example.answer) == (("one", "two"), "[1, 2]")  # type: ignore[union-attr]


def test_labels_as_text(tmp_path: Path) -> None:
    for labels in ((["a", "b"], ["b"]), ('["a", "b"]', '["b"]'), ("['a', 'b']", "['b']")):
        rows = [{"text": "x", "label": label} for label in labels]
        examples, _ = read_labeled(read(write(tmp_path / "a.jsonl", *rows)), {})
        space = infer_task(examples)
        assert (space.task, [space.encode(each.label, each.row) for each in examples]) == (
            "multi_label",
            [[1, 1], [0, 1]],
        )


TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": {"type": "object"}}},
]
CALL = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "find", "arguments": {"id": "A0"}}}]}
COUNT = {"role": "assistant", "tool_calls": [{"id": "d", "function": {"name": "count", "arguments": {}}}]}
TALKS: list[dict[str, Any]] = [
    # Arrow gives every message and call of the column the keys of all of them.
    {"messages": [ASKED, CALL, {"role": "tool", "tool_call_id": "c", "content": "Ulm"}, SAID], "tools": TOOLS[:1]},
    {"messages": [{"role": "user", "content": "How many?", "name": "Ada"}, COUNT], "tools": TOOLS},
    {"messages": [ASKED, {**SAID, "weight": 0.5}], "tools": None},
]
SPOKEN: list[dict[str, Any]] = [
    {"prompt": [ASKED], "chosen": [CALL], "rejected": [SAID], "tools": TOOLS[:1], "margin": 1.5},
    {"prompt": [ASKED, SAID, {**ASKED, "name": "Ada"}], "chosen": [SAID], "rejected": [OTHER], "tools": None},
]
CHOICES: list[dict[str, Any]] = [
    {"problem": "p", "context": "c", "choices": ["Ulm", "Bonn"], "reasoning": ["one", "two"], "answer": "B"},
    {"problem": "q", "context": None, "choices": ["Bonn", "Ulm"], "reasoning": [], "answer": "A"},
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    return write(path / "rows.jsonl", *rows)


def json_array(path: Path, rows: list[dict[str, Any]]) -> str:
    (path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return str(path / "rows.json")


def as_csv(spelled: Callable[[Any], str]) -> Callable[[Path, list[dict[str, Any]]], str]:
    def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
        with (path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                cells = {k: spelled(v) if isinstance(v, list | dict) else v for k, v in row.items()}
                writer.writerow(cells)
        return str(path / "rows.csv")

    return write_csv


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "rows.parquet")
    return str(path / "rows.parquet")


def arrow(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow
    import pyarrow.feather

    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), str(path / "rows.feather"))
    return str(path / "rows.feather")


def saved(path: Path, rows: list[dict[str, Any]]) -> str:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path / "saved"))
    return str(path / "saved")


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    opened = AutoTokenizer.from_pretrained(pico_tokenizer)
    opened.add_tokens(SPECIAL, special_tokens=True)
    opened.chat_template = TOOL_CHATML
    return opened


def supervised_tokens(tokenizer: PreTrainedTokenizerBase, source: str) -> object:
    examples, _ = read_supervised(read(source), {}, step_format=THINK)
    rows, _ = encode_supervised(tokenizer, examples, step_format=THINK, max_length=None)
    return [(row.ids, row.mask, row.weights) for row in rows]


def preference_tokens(tokenizer: PreTrainedTokenizerBase, source: str) -> object:
    examples, _ = read_comparisons(read(source), {})
    rows, _ = encode_comparisons(tokenizer, examples, template=None, max_length=None)
    return [(row.prompt, row.responses, row.pairs) for row in rows]


@pytest.mark.parametrize("writer", [json_array, as_csv(json.dumps), as_csv(repr), parquet, arrow, saved])
@pytest.mark.parametrize(
    ("rows", "tokens"), [(TALKS, supervised_tokens), (SPOKEN, preference_tokens), (CHOICES, supervised_tokens)]
)
def test_the_same_rows_give_the_same_tokens_from_every_file(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, rows: Any, tokens: Any, writer: Any
) -> None:
    expected = tokens(tokenizer, jsonl(tmp_path, rows))
    assert len(expected) == len(rows)
    assert tokens(tokenizer, writer(tmp_path, rows)) == expected
