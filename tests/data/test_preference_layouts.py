"""Every layout of preference data of other tools and data sets, a row each, read as the plain form of the same row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_preferences import assistant, shown, user, write

from loopos.cli.data_check import check
from loopos.config.diagnostics import DataError
from loopos.config.preference import PolicyDataSection
from loopos.config.reward_model import PreferenceDataSection
from loopos.config.variants import FORMATS
from loopos.data.decoding import PLAIN_RULES
from loopos.data.preference_data import load_comparisons, load_prompts, load_thumbs
from loopos.data.preference_formats import detect
from loopos.data.preference_layouts import LAYOUTS
from loopos.data.preferences import Comparison, Pair
from loopos.data.reading import opened
from loopos.data.row_check import _diagnostics

ASKED, GOOD, BAD = "Where is my parcel?", "It leaves tonight.", "Just wait."
SYSTEM = {"role": "system", "content": "Be kind."}
BEFORE = [user("Hello"), assistant("Good day.")]
TOOL = {"type": "function", "function": {"name": "track", "parameters": {"type": "object", "properties": {}}}}
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
WITH_SYSTEM = {"prompt": [SYSTEM, user(ASKED)], "chosen": GOOD, "rejected": BAD}
WITH_TURNS = {"prompt": [*BEFORE, user(ASKED)], "chosen": GOOD, "rejected": BAD}
SWAPPED = {"prompt": ASKED, "responses": [BAD, GOOD], "ranking": [1, 0]}
RANKED = {"prompt": ASKED, "responses": [GOOD, BAD, "Soon."], "scores": [3, 1, 1]}
HH = f"\n\nHuman: {ASKED}\n\nAssistant: "


def judged(preference: object, **names: object) -> dict[str, Any]:
    return {**names, "preference": preference}


def label_studio(control: str, kind: str, value: object) -> dict[str, Any]:
    result = {"id": "r1", "from_name": control, "to_name": "answer1", "type": kind, "value": value}
    return {
        "id": 4, "data": {"prompt": ASKED, "answer1": GOOD, "answer2": BAD}, "predictions": [], "inner_id": 1,
        "annotations": [{"id": 9, "completed_by": 1, "was_cancelled": False, "result": [result]}],
    }  # fmt: skip


ARGILLA_FIELDS = {"prompt": ASKED, "response-1": GOOD, "response-2": BAD}
USER = "00000000-0000-0000-0000-000000000001"

# Name → a row as the tool has it, the plain row that says the same, and what data.columns must name.
COMPARISONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "TRL, explicit": (PAIR, PAIR, {}),
    "TRL, implicit": ({"chosen": f"{ASKED}\n{GOOD}", "rejected": f"{ASKED}\n{BAD}"},
                      {"chosen": f"{ASKED}\n{GOOD}", "rejected": f"{ASKED}\n{BAD}"}, {}),
    "TRL, conversational": (
        {"prompt": [user(ASKED)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}, PAIR, {}),
    "TRL, conversational, implicit": (
        {"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)]}, PAIR, {}),
    "TRL, tools": (
        {"prompt": [user(ASKED)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)], "tools": json.dumps([TOOL])},
        {**PAIR, "tools": [TOOL]}, {}),
    "LLaMA-Factory, alpaca": (
        {"instruction": "Where is", "input": "my parcel?", "chosen": GOOD, "rejected": BAD},
        {**PAIR, "prompt": "Where is\nmy parcel?"}, {}),
    "LLaMA-Factory, alpaca with history and system": (
        {"instruction": ASKED, "input": "", "system": "Be kind.", "history": [["Hello", "Good day."]], "chosen": GOOD,
         "rejected": BAD},
        {**PAIR, "prompt": [SYSTEM, *BEFORE, user(ASKED)]}, {}),
    "LLaMA-Factory, sharegpt": (
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."},
                           {"from": "human", "value": ASKED}],
         "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}, "system": "Be kind.",
         "tools": json.dumps([TOOL["function"]])},
        {"prompt": [SYSTEM, *BEFORE, user(ASKED)], "chosen": GOOD, "rejected": BAD, "tools": [TOOL]}, {}),
    "Axolotl, argilla": ({"system": "Be kind.", "instruction": ASKED, "chosen_response": GOOD, "rejected_response": BAD},
                         WITH_SYSTEM, {}),
    "Axolotl, argilla_chat": (
        {"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)]}, PAIR, {}),
    "Axolotl, icr": ({"system": "Be kind.", "input": ASKED, "chosen": GOOD, "rejected": BAD}, WITH_SYSTEM, {}),
    "Axolotl, intel": ({"system": "Be kind.", "question": ASKED, "chosen": GOOD, "rejected": BAD}, WITH_SYSTEM, {}),
    "Axolotl, prompt_pairs": ({"system": "Be kind.", **PAIR}, WITH_SYSTEM, {}),
    "Axolotl, ultra": (
        {"system": "Be kind.", "prompt": ASKED, "chosen": [user(ASKED), assistant(GOOD)],
         "rejected": [user(ASKED), assistant(BAD)]}, WITH_SYSTEM, {}),
    "Axolotl, chat_template": (
        {"messages": [SYSTEM, user(ASKED)], "chosen": assistant(GOOD), "rejected": assistant(BAD)}, WITH_SYSTEM, {}),
    "Axolotl, chat_template.argilla of several turns": (
        {"prompt": "Hello", "chosen": [*BEFORE, user(ASKED), assistant(GOOD)],
         "rejected": [*BEFORE, user(ASKED), assistant(BAD)]}, WITH_TURNS, {}),
    "Axolotl, user_defined": (
        {"ask": ASKED, "role_text": "Be kind.", "good": GOOD, "bad": BAD}, WITH_SYSTEM,
        {"prompt": "ask", "system": "role_text", "chosen": "good", "rejected": "bad"}),
    "Axolotl, nectar": (
        {"prompt": HH, "answers": [{"answer": GOOD, "model": "a", "rank": 1.0}, {"answer": BAD, "model": "b", "rank": 2.0},
                                   {"answer": "Soon.", "model": "c", "rank": 2.0}],
         "turns": 1, "num_responses": 3, "good_natured": True}, RANKED, {}),
    "ms-swift, rejected_response": (
        {"messages": [SYSTEM, user(ASKED), assistant(GOOD)], "rejected_response": BAD}, WITH_SYSTEM, {}),
    "ms-swift, rejected_messages": (
        {"messages": [SYSTEM, *BEFORE, user(ASKED), assistant(GOOD)],
         "rejected_messages": [SYSTEM, *BEFORE, user(ASKED), assistant(BAD)], "tools": json.dumps([TOOL])},
        {"prompt": [SYSTEM, *BEFORE, user(ASKED)], "chosen": GOOD, "rejected": BAD, "tools": [TOOL]}, {}),
    "ms-swift, query and response": (
        {"system": "Be kind.", "query": ASKED, "response": GOOD, "rejected_response": BAD,
         "history": [["Hello", "Good day."]]},
        {**PAIR, "prompt": [SYSTEM, *BEFORE, user(ASKED)]}, {}),
    "ms-swift, alpaca": ({"instruction": ASKED, "input": None, "output": GOOD, "rejected_response": BAD}, PAIR, {}),
    "ms-swift, margin": (
        {"messages": [user(ASKED), assistant(GOOD)], "rejected_response": BAD, "margin": 2}, {**PAIR, "margin": 2}, {}),
    "OpenAI": (
        {"input": {"messages": [user(ASKED)], "tools": [TOOL], "parallel_tool_calls": True},
         "preferred_output": [assistant(GOOD)], "non_preferred_output": [assistant(BAD)]},
        {**PAIR, "tools": [TOOL]}, {}),
    "UltraFeedback": (
        {"source": "own", "instruction": ASKED, "models": ["a", "b", "c"], "correct_answers": [], "incorrect_answers": [],
         "completions": [
             {"model": "a", "response": GOOD, "overall_score": 9.0, "fine-grained_score": 4.5},
             {"model": "b", "response": BAD, "overall_score": None,
              "annotations": {"honesty": {"Rating": "3"}, "helpfulness": {"Rating": "1"}, "truthfulness": {"Rating": "N/A"}}},
             {"model": "c", "response": "Soon.", "overall_score": 2}]},
        RANKED, {}),
    "UltraFeedback, binarized": (
        {"prompt": ASKED, "prompt_id": "1", "chosen": [user(ASKED), assistant(GOOD)],
         "rejected": [user(ASKED), assistant(BAD)], "messages": [user(ASKED), assistant(GOOD)], "score_chosen": 9.0,
         "score_rejected": 2.0}, PAIR, {}),
    "UltraFeedback, Argilla's": (
        {"source": "own", "instruction": ASKED, "chosen_response": GOOD, "rejected_response": BAD,
         "chosen_avg_rating": 4.75, "rejected_avg_rating": 2.0, "chosen_model": "a"}, PAIR, {}),
    "HH": ({"chosen": HH + GOOD, "rejected": HH + BAD}, {"chosen": HH + GOOD, "rejected": HH + BAD}, {}),
    "SHP, A": (
        {"post_id": "p", "domain": "own_train", "history": ASKED, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1,
         "score_A": 7, "score_B": 2, "score_ratio": 3.5}, PAIR, {}),
    "SHP, B": (
        {"post_id": "p", "history": ASKED, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_A": 2,
         "score_B": 7}, SWAPPED, {}),
    "HelpSteer2": (
        {"split": "train", "prompt": ASKED, "response_1": GOOD, "response_2": BAD, "preference_strength": -2,
         "preference_statement": "The first one says when."}, {**PAIR, "margin": 2}, {}),
    "HelpSteer3": (
        {"domain": "general", "language": "english", "context": [*BEFORE, user(ASKED)], "response1": GOOD,
         "response2": BAD, "overall_preference": -1, "individual_preference": [{"score": -1}]},
        {**WITH_TURNS, "margin": 1}, {}),
    "SafeRLHF": (
        {"prompt": ASKED, "response_0": BAD, "response_1": GOOD, "is_response_0_safe": True, "better_response_id": 1,
         "safer_response_id": 1}, SWAPPED, {}),
    "Chatbot Arena": (
        {"question_id": "q", "model_a": "a", "model_b": "b", "winner": "model_a", "judge": "own", "turn": 1,
         "conversation_a": [user(ASKED), assistant(GOOD)], "conversation_b": [user(ASKED), assistant(BAD)],
         "anony": True, "language": "English"}, PAIR, {}),
    "Chatbot Arena, a tie": (
        {"winner": "tie (bothbad)", "conversation_a": [user(ASKED), assistant(GOOD)],
         "conversation_b": [user(ASKED), assistant(BAD)]}, {**PAIR, "tie": True}, {}),
    "distilabel": (
        {"instruction": ASKED, "generations": [GOOD, BAD, "Soon."], "ratings": [3, 1, 1], "rationales": ["", "", ""],
         "generation_models": ["a", "b", "c"], "distilabel_metadata": {}}, RANKED, {}),
    "distilabel, pairs": (
        {"prompt": ASKED, "prompt_id": "1", "chosen": [user(ASKED), assistant(GOOD)], "chosen_model": "a",
         "chosen_rating": 5, "rejected": [user(ASKED), assistant(BAD)], "rejected_model": "b", "rejected_rating": 2},
        PAIR, {}),
    "Argilla, records": (
        {"id": "1", "fields": ARGILLA_FIELDS, "metadata": {"source": "own"}, "suggestions": {}, "vectors": {},
         "responses": {"preference": [{"value": "response-1", "user_id": USER}]}, "status": "completed"}, PAIR, {}),
    "Argilla, records with a ranking": (
        {"id": "1", "fields": ARGILLA_FIELDS, "metadata": {}, "suggestions": {}, "vectors": {},
         "responses": {"ranking": [{"value": ["response-1", "response-2"], "user_id": USER}]}}, PAIR, {}),
    "Argilla, records with a suggestion": (
        {"id": "1", "fields": ARGILLA_FIELDS, "metadata": {}, "responses": {}, "vectors": {},
         "suggestions": {"preference": {"value": "response-1", "score": 0.9, "agent": "own"}}}, PAIR, {}),
    "Argilla, flat": (
        {"id": "1", "status": "completed", "_server_id": USER, **ARGILLA_FIELDS,
         "preference.responses": ["response-2", "response-1"], "preference.responses.users": [USER, USER],
         "preference.responses.status": ["discarded", "submitted"]}, PAIR, {}),
    "Argilla 1, records": (
        {"fields": ARGILLA_FIELDS, "metadata": {}, "vectors": {}, "external_id": None, "suggestions": [],
         "responses": [
             {"user_id": USER, "status": "submitted",
              "values": {"ranking": {"value": [{"value": "response-2", "rank": 2}, {"value": "response-1", "rank": 1}]}}},
             {"user_id": USER, "status": "discarded", "values": {"ranking": {"value": []}}}]}, PAIR, {}),
    "Argilla 1, data set": (
        {**ARGILLA_FIELDS, "best": [{"user_id": USER, "value": {"rank": [1, 2], "value": ["response-1", "response-2"]},
                                     "status": "submitted"}, {"user_id": USER, "value": None, "status": "discarded"}],
         "best-suggestion": None, "external_id": None, "metadata": "{}"}, PAIR, {"preference": "best"}),
    "Label Studio, JSON": (label_studio("pw", "pairwise", {"selected": "left"}), PAIR, {}),
    "Label Studio, JSON_MIN": (
        {"id": 4, "prompt": ASKED, "answer1": GOOD, "answer2": BAD, "comparison": [{"selected": "left"}], "annotator": 1,
         "annotation_id": 9, "lead_time": 3.2}, PAIR, {}),
    "Label Studio, JSON_MIN with a control of another name": (
        {"id": 4, "prompt": ASKED, "answer1": GOOD, "answer2": BAD, "pw": [{"selected": "left"}], "annotator": 1},
        PAIR, {"preference": "pw"}),
}  # fmt: skip

ONE = {"prompt": ASKED, "completion": GOOD, "label": True}
THUMBS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "TRL": (ONE, ONE, {}),
    "TRL, conversational": ({"prompt": [user(ASKED)], "completion": [assistant(GOOD)], "label": True}, ONE, {}),
    "LLaMA-Factory, alpaca": (
        {"instruction": "Where is", "input": "my parcel?", "output": GOOD, "kto_tag": True,
         "history": [["Hello", "Good day."]]},
        {**ONE, "prompt": [*BEFORE, user("Where is\nmy parcel?")]}, {}),
    "LLaMA-Factory, sharegpt": (
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": GOOD}], "kto_tag": True}, ONE, {}),
    "Axolotl, argilla": ({"system": "Be kind.", "instruction": ASKED, "completion": GOOD, "label": True},
                         {**ONE, "prompt": [SYSTEM, user(ASKED)]}, {}),
    "Axolotl, argilla_chat": (
        {"chosen": [user(ASKED)], "completion": [assistant(GOOD)], "label": True}, ONE, {"prompt": "chosen"}),
    "Axolotl, llama3.argilla_chat": (
        {"completion": [user(ASKED), assistant(GOOD)], "label": True}, ONE, {"messages": "completion"}),
    "Axolotl, intel": ({"question": ASKED, "completion": GOOD, "label": "true"}, ONE, {}),
    "Axolotl, user_defined": (
        {"ask": ASKED, "said": GOOD, "up": 1}, ONE, {"prompt": "ask", "completion": "said", "label": "up"}),
    "ms-swift": ({"messages": [SYSTEM, user(ASKED), assistant(GOOD)], "label": True},
                 {**ONE, "prompt": [SYSTEM, user(ASKED)]}, {}),
    "Argilla, records": (
        {"id": "1", "fields": {"prompt": ASKED, "response": GOOD}, "metadata": {}, "suggestions": {}, "vectors": {},
         "responses": {"label": [{"value": "yes", "user_id": USER}, {"value": "no", "user_id": USER},
                                 {"value": "yes", "user_id": USER}]}}, ONE, {}),
    "Label Studio, JSON": (
        {"id": 4, "data": {"prompt": ASKED, "answer": GOOD}, "annotations": [
            {"result": [{"from_name": "thumb", "to_name": "a", "type": "choices", "value": {"choices": ["Good"]}}]}]},
        ONE, {}),
    "Label Studio, JSON_MIN": ({"id": 4, "prompt": ASKED, "answer": GOOD, "thumb": "Good", "annotator": 1}, ONE, {}),
}  # fmt: skip


def policy(folder: Path, row: dict[str, Any], columns: dict[str, str] | None = None) -> PolicyDataSection:
    source = write(folder / "rows.jsonl", [row])
    return PolicyDataSection.model_validate(
        {"pretrained_weights": "new", "preference_data": source, "output_dir": str(folder / "run"),
         "columns": columns or {}, "validation_share": 0}
    )  # fmt: skip


def compared(folder: Path, row: dict[str, Any], columns: dict[str, str] | None = None) -> Comparison:
    """The row as the methods of preference optimization and reward models read it, which is the same."""
    data = policy(folder, row, columns)
    (found,) = load_comparisons(data, data.source, seed=0).train
    rewards = PreferenceDataSection.model_validate(data.model_dump(exclude_unset=True))
    (same,) = load_comparisons(rewards, rewards.source, seed=0).train
    assert same == found
    return found


def meaning(example: Comparison) -> tuple[Any, ...]:
    """What a comparison says: the prompt, the responses with the better one first, how sure, and the tools."""
    pairs = [
        (shown(example.responses[pair.better]), shown(example.responses[pair.worse]), pair.probability, pair.margin)
        for pair in example.pairs
    ]
    return shown(example.prompt), pairs, example.tools


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_row_of_each_layout_is_the_same_comparison(tmp_path: Path, name: str) -> None:
    row, plain, columns = COMPARISONS[name]
    (tmp_path / "plain").mkdir()
    expected = compared(tmp_path / "plain", plain)
    assert meaning(compared(tmp_path, row, columns)) == meaning(expected)
    assert expected.pairs[0].probability in (0.5, 1.0)
    # As a KTO run reads it, as the prompts of PPO, and as the checks before training and `data check` see it.
    data = policy(tmp_path, row, columns)
    (thumbs,) = load_thumbs(data, data.source, seed=0).train
    assert meaning(thumbs.comparison) == meaning(expected)
    (prompt,) = load_prompts(data, data.source, seed=0).train
    # Turns that both responses repeat are behind the prompt's column.
    assert shown(prompt.prompt) == shown(expected.prompt)[: len(shown(prompt.prompt))]
    assert prompt.tools == expected.tools
    opener = lambda: opened(data, data.source, "train")  # noqa: E731
    assert _diagnostics(data.source, opener, lambda names, source: detect(names, columns, source=source)) == []
    found = check(data.source, columns, PLAIN_RULES)
    assert (found.rows, found.used, found.num_diagnostics) == (1, 1, 0)
    assert found.serves.startswith("trains reward_model, dpo")


@pytest.mark.parametrize("name", THUMBS)
def test_a_row_of_each_layout_is_the_same_answer_with_a_thumb(tmp_path: Path, name: str) -> None:
    row, plain, columns = THUMBS[name]
    (tmp_path / "plain").mkdir()
    one, other = policy(tmp_path, row, columns), policy(tmp_path / "plain", plain)
    (found,), (expected,) = (load_thumbs(each, each.source, seed=0).train for each in (one, other))
    assert (meaning(found.comparison), found.desirable) == (meaning(expected.comparison), (True,))
    assert [shown(each) for each in found.comparison.responses] == [[("assistant", GOOD)]]
    report = check(one.source, columns, PLAIN_RULES)
    assert (report.used, report.num_diagnostics) == (1, 0)
    assert report.serves.startswith("trains kto")


def test_the_groups_have_every_pair(tmp_path: Path) -> None:
    """Of three answers with the scores 9, 2 (the mean of two ratings) and 2."""
    found = compared(tmp_path, COMPARISONS["UltraFeedback"][0])
    assert found.pairs == (Pair(0, 1), Pair(0, 2), Pair(1, 2, 0.5))


def test_each_layout_has_a_row() -> None:
    detected = {form.layout.name for row, _, _ in COMPARISONS.values() if (form := _form(row)) and form.layout}
    assert detected == {layout.name for layout in LAYOUTS}


@pytest.mark.parametrize(("name", "number_of_columns"), [("Axolotl, nectar", 2), ("UltraFeedback", 2)])
def test_a_layout_may_be_named(tmp_path: Path, name: str, number_of_columns: int) -> None:
    """Axolotl needs only the prompt and the answers, which could also be right answers."""
    row, plain, _ = COMPARISONS[name]
    kept = {key: row[key] for key in ("prompt", "answers", "instruction", "completions") if key in row}
    assert len(kept) == number_of_columns
    data = policy(tmp_path, kept).model_copy(update={"format": name.rpartition(" ")[2].lower()})
    (found,) = load_comparisons(data, data.source, seed=0).train
    (tmp_path / "plain").mkdir()
    assert meaning(found) == meaning(compared(tmp_path / "plain", plain))
    with pytest.raises(DataError, match="no known format"):
        load_comparisons(policy(tmp_path, kept), data.source, seed=0)


def test_each_layout_is_listed_with_its_columns() -> None:
    listed = " ".join(FORMATS[name].about.lower() for name in FORMATS)
    for layout in LAYOUTS:
        is_named = layout.name.partition("'")[0].lower() in ("nectar", "ultrafeedback")
        assert is_named or all(column in listed for column in layout.needed), layout.name
    assert {"nectar", "ultrafeedback"} <= set(FORMATS)


def _form(row: dict[str, Any]) -> Any:
    try:
        return detect(list(row), {})
    except DataError:
        return None


@pytest.mark.parametrize(
    ("name", "change", "field", "piece"),
    [
        ("OpenAI", {"input": {"messages": []}}, "input.messages", "an empty list"),
        ("OpenAI", {"input": {"tools": []}}, "input.messages", "null"),
        ("OpenAI", {"preferred_output": [user("x")]}, "preferred_output", "messages of user"),
        ("ms-swift, rejected_response", {"messages": [user(ASKED)]}, "messages", "an empty list"),
        ("ms-swift, rejected_response", {"messages": [user(ASKED), user("x")]}, "messages[-1]", "messages of user"),
        ("ms-swift, rejected_response", {"rejected_response": ""}, "rejected_response", "''"),
        ("UltraFeedback", {"completions": ["a", "b"]}, "completions[].overall_score", "null"),
        ("UltraFeedback", {"completions": [{"response": "a"}, {"response": "b"}]}, "completions[].overall_score[0]", "None"),
        ("SHP, A", {"labels": 2}, "labels", "got 2 (a number); expected 1 for A, or 0 for B"),
        ("SHP, A", {"labels": "A man"}, "labels", "'A man'"),
        ("SHP, A", {"history": None}, "history", "null"),
        ("Axolotl, nectar", {"answers": [{"answer": GOOD, "rank": 1}]}, "answers", "1 response"),
        ("Axolotl, nectar", {"answers": [{"answer": GOOD}, {"answer": BAD}]}, "answers[].rank[0]", "None"),
        ("HelpSteer2", {"preference_strength": "much"}, "preference_strength", "expected a number from -3"),
        ("SafeRLHF", {"better_response_id": 5}, "better_response_id", "got 5 (a number); expected 0 or 1"),
        ("Chatbot Arena", {"conversation_b": [user("x"), assistant(BAD)]}, "conversation_b", "messages that begin with"),
        ("Chatbot Arena", {"winner": "nobody"}, "winner", "'nobody'"),
        ("Label Studio, JSON_MIN", {"comparison": []}, "comparison", "an empty list"),
        ("Argilla, flat", {"preference.responses.status": ["discarded", "draft"]}, "preference.responses", "an empty list"),
    ],
)  # fmt: skip
def test_a_broken_row_names_the_place_in_the_file(
    tmp_path: Path, name: str, change: dict[str, Any], field: str, piece: str
) -> None:
    row, _, columns = COMPARISONS[name]
    with pytest.raises(DataError) as caught:
        compared(tmp_path, row | change, columns)
    first = caught.value.diagnostics[0]
    assert (first.line, first.field) == (1, field)
    assert piece in str(first)


def test_columns_of_the_user_win_over_a_layout(tmp_path: Path) -> None:
    row, _, _ = COMPARISONS["SHP, A"]
    columns = {"prompt": "history", "chosen": "human_ref_B", "rejected": "human_ref_A"}
    found = compared(tmp_path, row, columns)
    assert meaning(found) == ([("user", ASKED)], [([("assistant", BAD)], [("assistant", GOOD)], 1.0, 0.0)], ())


@pytest.mark.parametrize(("columns", "expected"), [({"tools": None}, ()), ({"tools": "mine"}, (TOOL,)), ({}, (TOOL,))])
def test_a_column_beside_a_layout_may_be_named(
    tmp_path: Path, columns: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    row = COMPARISONS["ms-swift, rejected_response"][0]
    tools = (
        {"mine": [TOOL], "tools": [{**TOOL, "function": {"name": "other"}}]}
        if "mine" in columns.values()
        else {"tools": [TOOL]}
    )
    assert compared(tmp_path, row | tools, columns).tools == expected
    with pytest.raises(DataError, match="no known format"):
        compared(tmp_path, row | {"note": "x"}, {"context": "note"})


def test_the_summary_names_the_layout_and_what_is_not_read(tmp_path: Path) -> None:
    data = policy(tmp_path, COMPARISONS["OpenAI"][0] | {"note": "x"})
    found = load_comparisons(data, data.source, seed=0)
    assert found.summary[0] == (
        'format: OpenAI\'s preferences, pairs (prompt <- "input.messages", tools <- "input.tools", '
        'chosen <- "preferred_output", rejected <- "non_preferred_output")'
    )
    assert found.reports[0].unread == ("note",)
    assert found.train[0].row.values["input"]["parallel_tool_calls"] is True  # type: ignore[index]
