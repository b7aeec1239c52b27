"""`loopos data check` detects the kind of data in a file and names the methods that train on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke, write_jsonl

CHAT = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On its way."}]
KINDS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "pairs": (
        [{"prompt": "a?", "chosen": "b", "rejected": "c"}],
        "pairs",
        "trains reward_model, dpo and its relatives",
    ),
    "pairs with extra columns": (
        [{"prompt": "a?", "chosen": "b", "rejected": "c", "score": 3, "label": 1}],
        "pairs",
        "trains reward_model",
    ),
    "implicit pairs": ([{"chosen": "a b", "rejected": "a c"}], "implicit pairs", "trains reward_model"),
    "groups": ([{"prompt": "a?", "responses": ["b", "c"], "scores": [1, 2]}], "groups", "trains reward_model"),
    "steps": (
        [{"prompt": "a?", "completions": ["b", "c"], "labels": [True, False]}],
        "steps",
        "trains reward_model as a process reward model",
    ),
    "chats": ([{"messages": CHAT}], "conversations", "trains sft and chain_of_thought"),
    "ShareGPT": (
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        "conversations",
        "trains sft and chain_of_thought",
    ),
    "chats with a category": (
        [{"messages": CHAT, "category": "x"}],
        "conversations",
        "trains sft and chain_of_thought",
    ),
    "instructions": (
        [{"instruction": "a", "input": "b", "output": "c", "topic": "x"}],
        "instructions",
        "trains sft and chain",
    ),
    "completions": ([{"prompt": "a", "completion": "b"}], "completions", "trains sft and chain_of_thought"),
    "answers with a thumb": (
        [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}],
        "answers with a thumb",
        "trains kto",
    ),
    "chats with a thumb": ([{"messages": CHAT, "label": True}], "conversations with a thumb", "trains kto"),
    "completions with a class": (
        [{"prompt": "a", "completion": "b", "label": "billing"}],
        "completions",
        "trains sft and chain_of_thought",
    ),
    "chats with a class": ([{"messages": CHAT, "label": "billing"}], "conversations", "trains sft"),
    "worked problems": (
        [{"problem": "a", "reasoning": ["b"], "answer": "c"}],
        "demonstrations",
        "trains sft and chain",
    ),
    "GSM8K": ([{"question": "a?", "answer": "b\n#### 3"}], "demonstrations", "trains sft and chain_of_thought"),
    "labeled": ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "labeled", "trains fine_tuning"),
    "a pair of texts with a label": (
        [{"question": "a", "answer": "b", "label": 0}, {"question": "c", "answer": "d", "label": 1}],
        "labeled",
        "trains fine_tuning",
    ),
    "texts": ([{"text": "a"}, {"text": "b"}], "texts", "no label column"),
    "reviews": ([{"review": "a"}], "texts", "no label column"),
    "prompts": ([{"prompt": "a"}], "prompts", "only prompts: for ppo"),
    "questions": ([{"question": "a"}], "prompts", "only prompts: for ppo"),
    "samples": ([{"prompt": "a", "text": "b", "sample": 0, "tokens": 3}], "samples", "only prompts: for ppo"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_is_found_and_what_trains_on_it(name: str, invoke: Invoke, tmp_path: Path) -> None:
    rows, kind, serves = KINDS[name]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    result = invoke("data", "check", file)
    assert result.exit_code == 0, result.stdout
    assert f"kind      {kind}: " in result.stdout
    assert serves in result.stdout.partition("\n")[2].partition("\n")[0]
    assert "problems  none" in result.stdout
    if kind not in ("texts",):
        assert "no label column" not in result.stdout


def test_texts_of_worked_problems_comparisons_and_prompts(invoke: Invoke, tmp_path: Path) -> None:
    for content, kind in (
        ("Problem: 1 + 1?\nAnswer: 2\n", "demonstrations"),
        ("Prompt: a\nChosen: b\nRejected: c\n", "pairs"),
        ("Write a poem.\n\nTell a joke, please.\nWrite a poem.\n", "lines"),
    ):
        (tmp_path / "a.txt").write_text(content)
        found = json.loads(invoke("data", "check", tmp_path / "a.txt", "--json").stdout)
        assert (found["kind"], found["num_faults"]) == (kind, 0)
    assert (found["rows"], found["repeated"]) == (3, {"texts": 1, "rows": 2})
    assert found["said"] == ["1 blank lines"]
    assert "prompts for ppo" in found["serves"]


def test_pairs_are_counted(invoke: Invoke, tmp_path: Path) -> None:
    """Three prompts, one of them asked three times: one pair twice the same, and once the other way round."""
    pairs = [
        ("a?", "good one", "bad"),
        ("a?", "good one", "bad"),
        ("a?", "bad", "good one"),
        ("b?", "x", "yy"),
        ("c?", "xxx", "y"),
    ]
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs])
    found = json.loads(invoke("data", "check", file, "--json").stdout)
    assert found["counts"] == {
        "different prompts": 3, "pairs": 5, "ties": 0, "the longer response is preferred": 0.6,
    }  # fmt: skip
    assert found["repeated"] == {"prompts": 1, "rows": 3, "rows that say the same": 1}
    assert found["conflicts"] == [{"text": "a?", "preferences": ["bad", "good one"], "lines": [1, 2, 3]}]
    assert found["ranges"]["response characters"] == {"least": 1, "median": 3, "mean": 4.0, "most": 8}
    assert found["roles"] == {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}


def test_thumbs_are_counted(invoke: Invoke, tmp_path: Path) -> None:
    """The answer "yes" to one prompt is up once and down once; a thumb that is none is a problem."""
    said = [("a?", "yes", True), ("a?", "yes", False), ("a?", "no", False), ("b?", "yes", True)]
    rows = [{"prompt": prompt, "completion": answer, "label": thumb} for prompt, answer, thumb in said]
    found = json.loads(invoke("data", "check", write_jsonl(tmp_path / "a.jsonl", rows), "--json").stdout)
    assert found["counts"] == {"different prompts": 2, "up": 2, "down": 2}
    assert found["conflicts"] == [{"text": "a?", "thumbs": ["yes"], "lines": [1, 2, 3]}]
    assert found["ranges"]["response characters"]["most"] == 3
    rows[3]["label"] = "perhaps"
    result = invoke("data", "check", write_jsonl(tmp_path / "b.jsonl", rows))
    assert (result.exit_code, "b.jsonl:4: label: got 'perhaps' (text)" in result.stdout) == (2, True)


def test_chats_and_problems_are_counted(invoke: Invoke, tmp_path: Path) -> None:
    longer = [{"role": "system", "content": "Be kind."}, *CHAT, {"role": "user", "content": "Thanks"}, CHAT[1]]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT}, {"messages": longer}])
    found = json.loads(invoke("data", "check", file, "--json").stdout)
    assert found["ranges"]["turns"] == {"least": 1, "median": 1, "mean": 1.3, "most": 2}
    assert found["ranges"]["messages"]["most"] == 5
    assert found["counts"] == {"different prompts": 2, "with a system message": 1}
    assert found["repeated"] == {"prompts": 1, "rows": 2, "rows that say the same": 1}
    problems = [
        {"problem": "1 + 1?", "reasoning": [], "answer": "2"},
        {"problem": "1 + 1?", "reasoning": ["a", "b"], "answer": "3"},
    ]
    found = json.loads(invoke("data", "check", write_jsonl(tmp_path / "b.jsonl", problems), "--json").stdout)
    assert found["ranges"]["steps"] == {"least": 0, "median": 1, "mean": 1, "most": 2}
    assert found["conflicts"] == [{"text": "1 + 1?", "answers": ["2", "3"], "lines": [1, 2]}]
    assert found["counts"]["without steps"] == 1


def test_near_rows_are_counted_and_named(invoke: Invoke, tmp_path: Path) -> None:
    texts = [
        "my card was charged twice for one order",
        "My card was charged twice for one order!",
        "where is it",
        "where is it",
    ]
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "label": index % 2} for index, text in enumerate(texts)])
    result = invoke("data", "check", file)
    assert "repeated  1 texts, in 2 rows; 1 of them with different labels" in result.stdout
    assert "near      1 more rows are nearly the same as an earlier one (lines 1 and 2)" in result.stdout


def test_bad_rows_of_chats_are_diagnostics(invoke: Invoke, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}])
    result = invoke("data", "check", file)
    assert result.exit_code == 2
    assert f"{file}:2: messages" in result.stdout
    result = invoke(
        "data", "check", write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "b"}])
    )
    assert result.exit_code == 2
    assert "b.jsonl:1: rejected" in result.stdout


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({"a": 1, "b": 2}, ["no columns of a known kind of data; there: 'a', 'b'", "prompt, chosen and rejected"]),
        ({"text_1": "a", "label": 2, "text_b": 3}, ["no text column found", "--columns text=COLUMN"]),
        ({"chosen": "a", "x": 1}, ["these columns make no known format", "--columns rejected=COLUMN"]),
    ],
)
def test_unknown_columns_name_what_would_do(
    row: dict[str, Any], pieces: list[str], invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("data", "check", write_jsonl(tmp_path / "a.jsonl", [row]))
    assert result.exit_code == 2
    for piece in pieces:
        assert piece in result.stdout


def test_columns_choose_the_kind(invoke: Invoke, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"ask": "a", "said": "b", "y": 1}, {"ask": "c", "said": "d", "y": 2}])
    for columns, kind in (
        (["text=ask", "label=y"], "labeled"),
        (["problem=ask", "answer=said"], "demonstrations"),
        (["prompt=ask"], "prompts"),
    ):
        words = [word for column in columns for word in ("--columns", column)]
        found = json.loads(invoke("data", "check", file, *words, "--json").stdout)
        assert (found["kind"], found["num_faults"]) == (kind, 0)


def test_an_encoding_may_be_named(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\nle café,a\nle thé,b\n".encode("cp1252"))
    refused = invoke("data", "check", tmp_path / "a.csv")
    assert refused.exit_code == 2
    assert "--encoding cp1252" in refused.stderr
    result = invoke("data", "check", tmp_path / "a.csv", "--encoding", "cp1252")
    assert (result.exit_code, "2 rows, 2 good" in result.stdout) == (0, True)
    wrong = invoke("data", "check", tmp_path / "a.csv", "--encoding", "cp125")
    assert wrong.exit_code == 2
    assert "--encoding: got cp125; expected the name of a text encoding" in wrong.stderr
