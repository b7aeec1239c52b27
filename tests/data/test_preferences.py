"""Columns to preference formats, rows to comparisons with the exact pairs; broken rows name line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import DataError
from loopos.data.preference_formats import detect
from loopos.data.preferences import Comparison, Pair, read_comparisons
from loopos.data.prompts import PromptContent
from loopos.data.rows import read

Shown = str | list[tuple[str, str]]
FIRST = (Pair(0, 1),)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def comparisons_of(
    tmp_path: Path, *rows: dict[str, Any], columns: dict[str, str] | None = None, as_text: bool = False
) -> list[Comparison]:
    return read_comparisons(read(write(tmp_path / "rows.jsonl", list(rows))), columns or {}, as_text=as_text)[0]


def shown(words: PromptContent) -> Shown:
    return words if isinstance(words, str) else [(message.role, message.content) for message in words]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("columns", "kind", "roles"),
    [
        ("prompt chosen rejected", "pairs", "prompt chosen rejected"),
        ("Prompt Chosen Rejected id", "pairs", "Prompt Chosen Rejected"),
        ("question chosen rejected system", "pairs", "question chosen rejected system"),
        ("instruction input chosen rejected", "pairs", "instruction chosen rejected input"),
        ("instruction chosen_response rejected_response", "pairs", "instruction chosen_response rejected_response"),
        ("question response_j response_k", "pairs", "question response_j response_k"),
        ("system input chosen rejected", "pairs", "input chosen rejected system"),
        ("conversations chosen rejected", "pairs", "conversations chosen rejected"),
        ("prompt prompt_id messages chosen rejected score_chosen", "pairs", "prompt chosen rejected"),
        ("prompt chosen rejected margin p-human tie", "pairs", "prompt chosen rejected margin p-human tie"),
        ("prompt chosen rejected probability", "pairs", "prompt chosen rejected probability"),
        ("chosen rejected", "implicit pairs", "chosen rejected"),
        ("chosen rejected p_chosen score", "implicit pairs", "chosen rejected p_chosen"),
        ("prompt responses scores", "groups", "prompt responses scores"),
        ("question completions ranking", "groups", "question completions ranking"),
    ],
)
def test_columns_of_common_data_sets(columns: str, kind: str, roles: str) -> None:
    found = detect(columns.split(), {})
    assert found.kind == kind
    assert list(found.columns.values()) == roles.split()


def test_the_choice_is_reported_and_can_be_overridden() -> None:
    assert (
        detect(["question", "chosen", "rejected"], {}).summary
        == 'format: pairs (prompt <- "question", chosen <- "chosen", rejected <- "rejected")'
    )
    chosen = detect(["q", "good", "bad", "chosen"], {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (chosen.kind, dict(chosen.columns)) == ("pairs", {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert detect(["a", "b"], {"chosen": "a", "rejected": "b"}).kind == "implicit pairs"
    both = ["prompt", "responses", "scores", "ranking"]
    assert dict(detect(both, {"ranking": "ranking"}).columns) == {
        "prompt": "prompt", "responses": "responses", "ranking": "ranking",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "overrides", "field", "piece"),
    [
        ("prompt chosen", {}, "data.columns", "these columns make no known format: 'prompt', 'chosen'"),
        ("prompt responses", {}, "data.columns", '"chosen": "COLUMN", "rejected": "COLUMN"'),
        ("text label", {}, "data.columns", '{"prompt", "responses", "ranking"}'),
        ("prompt responses scores ranking", {}, "data.columns", 'data.columns: {"scores": "COLUMN"}'),
        ("prompt chosen rejected responses scores", {}, "data.columns", "columns of 2 formats"),
        ("messages conversations chosen rejected", {}, "data.columns.prompt", "messages, conversations"),
        ("prompt chosen Chosen rejected", {}, "data.columns.chosen", "2 columns may be the chosen"),
        ("q chosen rejected", {"promt": "q"}, "data.columns.promt", "did you mean prompt?"),
        ("prompt chosen rejected", {"prompt": "promt"}, "data.columns.prompt", 'did you mean "prompt"?'),
        (
            "prompt chosen rejected",
            {"chosen": "rejected", "rejected": "rejected"},
            "data.columns.rejected",
            "also has the role",
        ),
        ("a b", {"scores": "a", "chosen": "b"}, "data.columns", "roles of one format"),
    ],
)
def test_columns_that_are_no_format(columns: str, overrides: dict[str, str], field: str, piece: str) -> None:
    with pytest.raises(DataError) as caught:
        detect(columns.split(), overrides, source="rows.csv")
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.source, diagnostic.field) == ("rows.csv", field)
    assert piece in str(diagnostic)


ASKED: Shown = [("user", "a")]
GOOD: Shown = [("assistant", "b")]
BAD: Shown = [("assistant", "c")]
HH = "\n\nHuman: why\n\nAssistant: it is\n\nHuman: so\n\nAssistant:"

FORMATS: list[tuple[str, dict[str, Any], Shown, list[Shown], tuple[Pair, ...]]] = [
    ("texts", {"prompt": "a", "chosen": "b", "rejected": "c"}, ASKED, [GOOD, BAD], FIRST),
    (
        "Alpaca's input and a system text",
        {"instruction": "a", "input": "x", "system": "s", "chosen": "b", "rejected": "c"},
        [("system", "s"), ("user", "a\nx")], [GOOD, BAD], FIRST,
    ),
    (
        "blank input, blank system",
        {"instruction": "a", "input": " ", "system": "", "chosen": "b", "rejected": "c"},
        ASKED, [GOOD, BAD], FIRST,
    ),
    (
        "lists of messages",
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        ASKED, [GOOD, BAD], FIRST,
    ),
    (
        "ShareGPT's prompt, a message object each",
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"},
        },
        ASKED, [GOOD, BAD], FIRST,
    ),
    (
        "messages as prompt, texts as responses",
        {"prompt": [user("p"), assistant("q"), user("a")], "system": "s", "chosen": "b", "rejected": "c"},
        [("system", "s"), ("user", "p"), ("assistant", "q"), ("user", "a")], [GOOD, BAD], FIRST,
    ),
    (
        "responses that repeat the prompt, as in UltraFeedback's binarized pairs",
        {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "messages": []},
        ASKED, [GOOD, BAD], FIRST,
    ),
    (
        "a response of several turns",
        {
            "prompt": "a",
            "chosen": [
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "t"}, assistant("b"),
            ],
            "rejected": "c",
        },
        ASKED, [[("assistant", ""), ("tool", "t"), ("assistant", "b")], BAD], FIRST,
    ),
    (
        "a shared prefix of messages",
        {
            "chosen": [user("p"), assistant("q"), user("a"), assistant("b")],
            "rejected": [user("p"), assistant("q"), user("a"), assistant("c")],
        },
        [("user", "p"), ("assistant", "q"), ("user", "a")], [GOOD, BAD], FIRST,
    ),
    (
        "a shared prefix of text, with Assistant:",
        {"chosen": HH + " I think so.", "rejected": HH + " I think not."},
        HH, [" I think so.", " I think not."], FIRST,
    ),
    (
        "a shared prefix of text, cut back to white space",
        {"chosen": "Q: sky?\nA: because", "rejected": "Q: sky?\nA: beyond me"},
        "Q: sky?\nA:", [" because", " beyond me"], FIRST,
    ),
    (
        "a text that is the other's beginning",
        {"chosen": "why so\n\nbe cause", "rejected": "why so\n\nbe"},
        "why so", ["\n\nbe cause", "\n\nbe"], FIRST,
    ),
    (
        "scores",
        {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2.5, 1]},
        ASKED, [GOOD, BAD, [("assistant", "d")]], (Pair(1, 0), Pair(0, 2, 0.5), Pair(1, 2)),
    ),
    (
        "a ranking",
        {"prompt": "a", "responses": ["b", [assistant("c")], "d"], "ranking": [2, 0, 1]},
        ASKED, [GOOD, BAD, [("assistant", "d")]], (Pair(2, 0), Pair(2, 1), Pair(0, 1)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "prompt", "responses", "pairs"), FORMATS, ids=[case[0] for case in FORMATS])
def test_rows_of_each_format(
    tmp_path: Path, name: str, row: dict[str, Any], prompt: Shown, responses: list[Shown], pairs: tuple[Pair, ...]
) -> None:
    (found,) = comparisons_of(tmp_path, row)
    assert shown(found.prompt) == prompt
    assert [shown(response) for response in found.responses] == responses
    assert found.pairs == pairs
    assert found.row.line == 1


def test_raw_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2=", "chosen": " 4\n", "rejected": " 5"},
        {"prompt": "2+3=", "chosen": [assistant("5")], "rejected": "6"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    (text, messages), report = read_comparisons(read(path), {}, as_text=True)
    assert (text.prompt, text.responses) == ("2+2=", (" 4\n", " 5"))
    assert shown(messages.prompt) == [("user", "2+3=")]
    assert shown(messages.responses[1]) == [("assistant", "6")]
    assert report.notes[-1] == "text without a chat template: 1 of 2"
    untouched = read_comparisons(read(path), {})[1].notes
    assert not any("without a chat template" in sentence for sentence in untouched)
    group = {"instruction": "a", "input": "x", "responses": ["b", "c"], "ranking": [1, 0]}
    (found,) = comparisons_of(tmp_path, group, as_text=True)
    assert (found.prompt, found.responses, found.pairs) == ("a\nx", ("b", "c"), (Pair(1, 0),))


@pytest.mark.parametrize(
    ("more", "pair"),
    [
        ({"margin": 2}, Pair(0, 1, 1.0, 2.0)),
        ({"margin": 0.25, "p_human": 0.8}, Pair(0, 1, 0.8, 0.25)),
        ({"margin": None, "p_human": None, "tie": None}, Pair(0, 1)),
        ({"p_human": 0}, Pair(0, 1, 0.0)),
        ({"p_chosen": 1}, Pair(0, 1)),
        ({"probability": 0.5}, Pair(0, 1, 0.5)),
        ({"tie": True}, Pair(0, 1, 0.5)),
        ({"tie": True, "margin": 0}, Pair(0, 1, 0.5)),
        ({"tie": True, "p_human": None}, Pair(0, 1, 0.5)),
        ({"tie": False, "p_human": 0.75}, Pair(0, 1, 0.75)),
    ],
)
@pytest.mark.parametrize(
    "row", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": "a: b", "rejected": "a: c"}]
)
def test_confidence_of_a_pair(tmp_path: Path, row: dict[str, Any], more: dict[str, Any], pair: Pair) -> None:
    (found,) = comparisons_of(tmp_path, row | more)
    assert found.pairs == (pair,)


def test_cells_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,margin,p_human,tie\na,b,c,0.5,0.75,false\na,c,b,,,TRUE\na,d,b,,,\n")
    found, report = read_comparisons(read(str(path)), {})
    assert [example.pairs for example in found] == [(Pair(0, 1, 0.75, 0.5),), (Pair(0, 1, 0.5),), (Pair(0, 1),)]
    assert (report.read, report.used, report.dropped) == (3, 3, {})


def test_other_keys_of_a_message_are_kept(tmp_path: Path) -> None:
    named = {"role": "user", "content": "a", "name": "Ida"}
    (found,) = comparisons_of(tmp_path, {"prompt": [named], "chosen": "b", "rejected": "c"})
    assert not isinstance(found.prompt, str)
    assert found.prompt[0].as_template() == named


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
GROUP = {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}
RANKED = {"prompt": "a", "responses": ["b", "c"], "ranking": [1, 0]}
IMPLIED = {"chosen": "a: b", "rejected": "a: c"}
CHAT = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}

BROKEN: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (PAIR, {"prompt": " "}, "prompt", "got ' '"),
    (PAIR, {"prompt": None}, "prompt", "got null"),
    (PAIR, {"prompt": []}, "prompt", "got an empty list"),
    (PAIR, {"prompt": {"role": "user"}}, "prompt.content", "got null"),
    (PAIR, {"prompt": ["a"]}, "prompt[0]", 'a message such as {"role": "user"'),
    (PAIR, {"prompt": [{"role": "user", "content": ""}]}, "prompt[0].content", "got ''"),
    (PAIR, {"prompt": [user("a"), assistant("x")]}, "prompt", "messages of user, assistant"),
    (PAIR, {"chosen": "\n"}, "chosen", r"got '\n'"),
    (PAIR, {"chosen": 3}, "chosen", "got 3 (a number)"),
    (PAIR, {"chosen": []}, "chosen", "got an empty list"),
    (PAIR, {"chosen": [user("b")]}, "chosen", "got messages of user"),
    (PAIR, {"chosen": [user("x"), assistant("b")]}, "chosen", "and in the prompt column if there is one"),
    (PAIR, {"chosen": [user("a")]}, "chosen", "no message after the prompt"),
    (PAIR, {"rejected": None}, "rejected", "got null"),
    (PAIR, {"rejected": [{"role": "bard", "content": "c"}]}, "rejected[0].role", "'bard'"),
    (PAIR, {"rejected": {"content": "c"}}, "rejected", "an object with 'content'"),
    (PAIR, {"rejected": "b"}, "rejected", "chosen and rejected are identical ('b')"),
    (PAIR, {"rejected": [assistant("b\n")]}, "rejected", "are identical"),
    (PAIR, {"rejected": "\ud800"}, "rejected", "half of a surrogate pair"),
    (PAIR, {"margin": -1}, "margin", "got -1 (a number); expected a number >= 0"),
    (PAIR, {"margin": "much"}, "margin", "got 'much' (text)"),
    (PAIR, {"margin": True}, "margin", "(true or false)"),
    (PAIR, {"p_human": 1.5}, "p_human", "got 1.5 (a number); expected a number from 0 to 1"),
    (PAIR, {"p_human": -0.1}, "p_human", "expected a number from 0 to 1"),
    (PAIR, {"p_human": [1]}, "p_human", "(a list)"),
    (PAIR, {"tie": 1}, "tie", "got 1 (a number); expected true or false"),
    (PAIR, {"tie": "so"}, "tie", "got 'so'"),
    (PAIR, {"tie": True, "p_human": 0.5}, "p_human", "0.5, but 'tie' marks the row as a tie"),
    (PAIR, {"tie": True, "margin": 1}, "margin", "1, but 'tie' marks the row as a tie"),
    (PAIR, {"prompt": [user("a")], "input": "x"}, "input", "the whole prompt in the messages"),
    (PAIR, {"prompt": [{"role": "system", "content": "s"}, user("a")], "system": "s"}, "system", "one system message"),
    (IMPLIED, {"chosen": "x: b"}, "rejected", "responses that start with the same prompt"),
    (IMPLIED, {"rejected": "a: b"}, "rejected", "are identical"),
    (IMPLIED, {"rejected": "a: b\n"}, "rejected", "are identical"),
    (IMPLIED, {"rejected": " "}, "rejected", "got ' '"),
    (IMPLIED, {"chosen": CHAT["chosen"]}, "rejected", "a list as chosen and text as rejected"),
    (IMPLIED, {"system": "s"}, "system", "no system prompt with text"),
    (IMPLIED, {"p_human": 2}, "p_human", "got 2"),
    (CHAT, {"rejected": [user("x"), assistant("c")]}, "rejected", "messages that begin with 'a' and 'x'"),
    (CHAT, {"rejected": CHAT["chosen"]}, "rejected", "are identical"),
    (CHAT, {"rejected": [user("a")]}, "rejected", "no message after the prompt"),
    (CHAT, {"rejected": [user("a"), user("x"), assistant("c")]}, "rejected", "messages of user, assistant"),
    (CHAT, {"chosen": [user("a"), assistant("b"), user("x")]}, "chosen", "messages of assistant, user"),
    (CHAT, {"chosen": [user("a"), 7]}, "chosen[1]", "got 7 (a number)"),
    (GROUP, {"responses": ["b"], "scores": [1]}, "responses", "got 1 response"),
    (GROUP, {"responses": "b"}, "responses", "a list of two or more responses"),
    (GROUP, {"responses": ["b", " "]}, "responses[1]", "got ' '"),
    (GROUP, {"responses": ["b", [user("c")]]}, "responses[1]", "messages of user"),
    (GROUP, {"responses": ["b", "b"]}, "responses[1]", "are identical"),
    (GROUP, {"scores": [1]}, "scores", "1 scores for 2 responses"),
    (GROUP, {"scores": [1, "good"]}, "scores[1]", "got 'good' (text)"),
    (GROUP, {"scores": None}, "scores", "got null"),
    (RANKED, {"ranking": [1, 2]}, "ranking", "indices start at 0"),
    (RANKED, {"ranking": [0, 0]}, "ranking", "got [0, 0] for 2 responses"),
    (RANKED, {"ranking": [0]}, "ranking", "got [0] for 2 responses"),
    (RANKED, {"ranking": [True, False]}, "ranking", "from 0, from best"),
]


@pytest.mark.parametrize(("good", "change", "field", "piece"), BROKEN)
def test_broken_rows_name_line_and_field(
    tmp_path: Path, good: dict[str, Any], change: dict[str, Any], field: str, piece: str
) -> None:
    with pytest.raises(DataError) as caught:
        comparisons_of(tmp_path, good, good | change)
    (diagnostic,) = caught.value.diagnostics
    assert str(diagnostic).startswith(f"{tmp_path}/rows.jsonl:2: {field}: ")
    assert piece in str(diagnostic)


def test_the_broken_rows_are_broken_only_by_their_change(tmp_path: Path) -> None:
    assert len(BROKEN) == 56
    assert [len(comparisons_of(tmp_path, good)) for good in (PAIR, GROUP, RANKED, IMPLIED, CHAT)] == [1] * 5


def test_a_system_prompt_is_refused_with_raw_prompts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: system: got 's'; expected no system prompt with text"):
        comparisons_of(tmp_path, {**PAIR, "system": "s"}, as_text=True)


def test_read_is_used_and_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        PAIR,
        {**PAIR, "rejected": "b"},
        {**PAIR, "chosen": ""},
        {"prompt": "a", "chosen": "b"},
        {**PAIR, "margin": -1, "p_human": 3},
        PAIR,
    ]
    path = Path(write(tmp_path / "rows.jsonl", rows))
    path.write_text(path.read_text() + "{oops\n")
    found, report = read_comparisons(read(str(path), on_bad_row="skip"), {})
    assert [example.row.line for example in found] == [1, 6]
    assert report.dropped == {
        "unreadable row": 1, "the two responses are the same": 1, "chosen is blank": 1, "rejected is missing": 1,
        "margin does not fit": 1,
    }  # fmt: skip
    assert (report.read, report.used) == (7, 2)
    assert len(report.diagnostics) == 6
