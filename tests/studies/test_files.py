"""Items from files, and votes as rows that the readers of data read back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import DataError, UserError
from loopos.config.study_variants import STUDY_FORMATS
from loopos.data import rows
from loopos.data.annotation_exports import flat_rows
from loopos.data.kinds import Kind, kind_of, read_kind
from loopos.data.prompts import prompt_key
from loopos.studies.events import Assignment
from loopos.studies.exports import Exported, export
from loopos.studies.imports import items_of
from loopos.studies.items import Item, Response, text_of
from loopos.studies.study import Study
from loopos.studies.verdicts import judged_items
from tests.studies.study_makers import label_all, pair, study_in


def written(file: Path, values: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(each) + "\n" for each in values), encoding="utf-8")
    return str(file)


def read_back(file: str) -> tuple[Kind, list[Any], Any]:
    """The kind, the examples and the report of a file, as `loopos data check` reads it."""
    reader = rows.read(file)
    kind = kind_of(flat_rows(list(reader.rows())), {}, file)
    examples, report = read_kind(reader, kind, {})
    return kind, examples, report


def exported(study: Study, name: str, **keys: Any) -> Exported:
    return export(judged_items(study.items, study.votes(), study.config.mode), name, **keys)


CHOICES = ["A", "B", "tie", "both_bad", "A", "A"]


def ballot(study: Study, assigned: Assignment) -> dict[str, Any]:
    """By the number in the prompt: A, B, a tie, both bad, A edited, A with a strength."""
    item = study.items[assigned.item]
    number = int(text_of(item.prompt).split()[-1])
    choice = CHOICES[number]
    if choice in ("tie", "both_bad"):
        return {"choice": choice}
    side = "left" if item.responses[assigned.left].source == choice else "right"
    more = {4: {"edited": "an edited answer"}, 5: {"strength": 3}}.get(number, {})
    return {"choice": side, "comment": "because", "seconds": 2.0, **more}


@pytest.fixture
def study(tmp_path: Path) -> Any:
    with study_in(tmp_path / "s", 6) as made:
        label_all(made, "ana", ballot)
        yield made


PAIRS = ("preferences", "llama_factory", "axolotl")


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_read_back(study: Study, tmp_path: Path, name: str) -> None:
    found = exported(study, name)
    assert found.dropped == {"tie": 2}
    kind, examples, report = read_back(written(tmp_path / "rows.jsonl", found.train))
    assert (kind.family, report.read, report.used) == ("comparisons", 4, 4)
    texts = {
        example.prompt[-1].content: tuple(example.responses[index][-1].content for index in (pair.better, pair.worse))
        for example in examples
        for pair in example.pairs
    }
    assert texts == {
        "question 0": ("answer 0 of A", "answer 0 of B"),
        "question 1": ("answer 1 of B", "answer 1 of A"),
        "question 4": ("an edited answer", "answer 4 of B"),
        "question 5": ("answer 5 of A", "answer 5 of B"),
    }
    if name == "preferences":
        assert sorted(pair.margin for example in examples for pair in example.pairs) == [0, 0, 0, 3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Better or worse with p_human; both bad is a tie.
        ("preferences_with_ties", {0: 1.0, 1: 0.0, 2: 0.5, 3: 0.5, 4: 1.0, 5: 1.0}),
        ("argilla", {0: 1.0, 1: 0.0, 2: 0.5, 3: 0.5, 4: 1.0, 5: 1.0}),
        ("chatbot_arena", {0: 1.0, 1: 0.0, 2: 0.5, 3: 0.5, 4: 1.0, 5: 1.0}),
        # Its control has no tie.
        ("label_studio", {0: 1.0, 1: 0.0, 4: 1.0, 5: 1.0}),
    ],
)
def test_votes_with_ties_are_read_back(study: Study, tmp_path: Path, name: str, expected: dict[int, float]) -> None:
    found = exported(study, name)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(found.train), encoding="utf-8")
    kind, examples, report = read_back(str(file))
    assert (kind.family, report.used) == ("comparisons", len(expected))
    actual = {}
    for example in examples:
        prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1].content
        responses = [each if isinstance(each, str) else each[-1].content for each in example.responses]
        (judged,) = example.pairs
        first_is_a = responses[0].endswith("of A") or responses[1].endswith("of B")
        p = judged.probability if judged.better == 0 else 1 - judged.probability
        actual[int(prompt.split()[-1])] = p if first_is_a else 1 - p
    assert actual == expected
    assert found.dropped == ({"tie": 2} if name == "label_studio" else {})


def test_thumbs_are_read_back(study: Study, tmp_path: Path) -> None:
    found = exported(study, "kto")
    assert found.dropped == {"tie": 1}
    kind, examples, report = read_back(written(tmp_path / "rows.jsonl", found.train))
    assert (kind.family, report.used) == ("thumbs", 10)
    thumbs = {example.comparison.responses[0][-1].content: example.desirable[0] for example in examples}
    # Both bad: neither is desirable. The edited answer stands for the one that it mends.
    assert (thumbs["answer 3 of A"], thumbs["answer 3 of B"]) == (False, False)
    assert (thumbs["an edited answer"], thumbs["answer 4 of B"]) == (True, False)
    assert "answer 4 of A" not in thumbs
    assert (thumbs["answer 1 of A"], thumbs["answer 1 of B"]) == (False, True)


@pytest.mark.parametrize(("name", "count"), [("demonstrations", 1), ("best", 4)])
def test_demonstrations_are_read_back(study: Study, tmp_path: Path, name: str, count: int) -> None:
    found = exported(study, name)
    assert sum(found.dropped.values()) == 6 - count
    kind, examples, report = read_back(written(tmp_path / "rows.jsonl", found.train))
    assert (kind.family, report.used) == ("language", count)
    assert "an edited answer" in [
        example.completion if hasattr(example, "completion") else example.messages[-1].content for example in examples
    ]


def test_ratings_become_groups_and_thumbs_labels(tmp_path: Path) -> None:
    items = [Item(prompt="p", responses=(Response(content=text),)) for text in ("good", "bad")]
    items.append(Item(prompt="other", responses=(Response(content="only"),)))
    with study_in(tmp_path / "r", mode="rating", overlap=2) as study:
        study.add(items)
        ratings = {"good": 4, "bad": 2, "only": 3}
        for number, who in enumerate(("ana", "bo")):
            label_all(study, who, lambda study, assigned, extra=number: {
                "rating": ratings[study.items[assigned.item].responses[0].text] + extra})  # fmt: skip
        found = exported(study, "groups")
        assert found.dropped == {"only one rated response to the prompt": 1}
        (row,) = found.train
        assert dict(zip(row["responses"], row["scores"], strict=True)) == {"good": 4.5, "bad": 2.5}
        kind, (example,), _ = read_back(written(tmp_path / "rows.jsonl", found.train))
        assert (kind.family, len(example.pairs)) == ("comparisons", 1)
        with pytest.raises(
            UserError, match='format preferences: got a study of mode "rating"; expected the mode "comp'
        ):
            exported(study, "preferences")
        assert len(exported(study, "argilla").train) == len(exported(study, "label_studio").train) == 3
    with study_in(tmp_path / "t", mode="thumbs") as study:
        study.add(items)
        label_all(study, "ana", lambda study, assigned: {
            "choice": "up" if study.items[assigned.item].responses[0].text == "good" else "down"})  # fmt: skip
        for name in ("kto", "argilla", "label_studio"):
            file = tmp_path / f"{name}.json"
            file.write_text(json.dumps(exported(study, name).train), encoding="utf-8")
            kind, examples, _ = read_back(str(file))
            assert (kind.family, Counter(each.desirable[0] for each in examples)) == ("thumbs", {True: 1, False: 2})


def test_a_split_keeps_prompts_together(tmp_path: Path) -> None:
    def response(text: str, source: str) -> Response:
        return Response(content=text, source=source)

    with study_in(tmp_path / "s") as study:
        study.add([
            Item(prompt=f"question {number}", responses=(response(f"{variant} {number}", "A"), response("no", "B")))
            for number in range(20) for variant in ("one", "two", "three")
        ])  # fmt: skip
        label_all(study, "ana", lambda study, assigned: {"choice": "left"})
        found = exported(study, "preferences", validation=0.2, seed=3)
    sides = [{row["prompt"] for row in side} for side in (found.train, found.validation)]
    assert not sides[0] & sides[1]
    assert (len(sides[0]), len(sides[1])) == (16, 4)
    assert len(found.train) + len(found.validation) == 60


def test_every_format_has_a_test() -> None:
    tested = {*PAIRS, "preferences_with_ties", "argilla", "chatbot_arena", "label_studio", "kto", "groups"}
    assert set(STUDY_FORMATS) == tested | {"demonstrations", "best"}


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ["a", "b"]),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference": 2}, "q", ["a", "b"]),
        ({"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"}, None, [" a", " b"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q", []),
        ({"prompt": "q"}, "q", []),
    ],
)
def test_rows_become_items(tmp_path: Path, row: dict[str, Any], prompt: str | None, responses: list[str]) -> None:
    found = items_of([written(tmp_path / "rows.jsonl", [row])], "compare", names=["A", "B"])
    if "messages" in row:
        assert found.dropped == {"a response without another one to the same prompt": 1}
        return
    (item,) = found.items
    assert prompt is None or text_of(item.prompt) == prompt
    assert [each.text for each in item.responses] == responses
    assert [each.source for each in item.responses] == ["A", "B"][: len(responses)]
    # What the file prefers is kept, out of sight.
    if "preference" in row:
        assert item.metadata["preference"] == 0
    assert "preference" not in json.dumps([item.model_dump()["prompt"], item.model_dump()["responses"]])


def test_answers_of_two_files_are_paired_by_prompt(tmp_path: Path) -> None:
    first = [{"prompt": f"q{n}", "completion": f"a{n}", "score": n} for n in range(4)]
    second = [{"prompt": f"q{n}", "completion": f"b{n}" if n else "a0"} for n in (2, 0, 1, 7)]
    files = [written(tmp_path / f"{name}.jsonl", values) for name, values in (("a", first), ("b", second))]
    found = items_of(files, "compare", names=["old", "new"])
    pairs = {text_of(item.prompt): [(one.text, one.source) for one in item.responses] for item in found.items}
    assert pairs == {f"q{n}": [(f"a{n}", "old"), (f"b{n}", "new")] for n in (1, 2)}
    assert found.dropped == {
        "the two responses are the same": 1,
        "a response without another one to the same prompt": 2,
    }
    assert {item.responses[0].scores for item in found.items} == {(1.0,), (2.0,)}
    single = items_of(files, "rating")
    assert len(single.items) == 8


def test_a_group_gives_pairs_in_which_each_response_is_once(tmp_path: Path) -> None:
    row = {"prompt": "q", "responses": list("abcde"), "scores": [5, 4, 3, 2, 1]}
    found = items_of([written(tmp_path / "rows.jsonl", [row])], "compare")
    texts = [one.text for item in found.items for one in item.responses]
    assert len(found.items) == 2
    assert len(set(texts)) == 4
    assert found.dropped == {"a response without another one to the same prompt": 1}
    assert all(item.margins == (row["scores"]["abcde".index(item.responses[0].text)]
                                - row["scores"]["abcde".index(item.responses[1].text)],) for item in found.items)  # fmt: skip


def test_rewards_of_an_ensemble_come_with_a_pair(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "scores_chosen": [1.0, 2.0], "scores_rejected": [0.5, 3.0]}
    (item,) = items_of([written(tmp_path / "rows.jsonl", [row])], "compare").items
    assert item.margins == (0.5, -1.0)


def test_what_is_no_prompt_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [{"text": "a film", "label": "good"}])
    with pytest.raises(DataError, match="rows: got rows that are labeled; expected prompts, comparisons"):
        items_of([file], "compare")
    with pytest.raises(DataError, match="nowhere"):
        items_of([str(tmp_path / "nowhere.jsonl")], "compare")


def test_exported_rows_are_items_again(study: Study, tmp_path: Path) -> None:
    found = exported(study, "preferences_with_ties")
    again = items_of([written(tmp_path / "rows.jsonl", found.train)], "compare")
    assert len(again.items) == 6
    assert {text_of(item.prompt) for item in again.items} == {f"question {number}" for number in range(6)}
    assert prompt_key("x") == prompt_key("x")
    assert pair(1).digest == pair(1).digest
