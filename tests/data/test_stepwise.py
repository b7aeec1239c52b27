"""Rows with step labels: which are read, which are refused and why, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError
from loopos.data import rows
from loopos.data.preferences import Comparison
from loopos.data.stepwise import Judgments, Stepwise, read_judgments
from loopos.data.stepwise_tokens import PROMPT_OVER, UNLABELED, EncodedStepwise, StepwiseRows, encode_stepwise
from loopos.data.supervised_tokens import OVER_LENGTH, RowPolicy, prompt_tokens
from loopos.data.templates import ChatTemplate


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(pico_tokenizer)
    return found


GOOD = {"prompt": "What is 17 + 26?", "completions": ["7 + 6 = 13", "1 + 2 + 1 = 5"], "labels": [True, False]}


def read(
    folder: Path, content: Sequence[dict[str, Any]], *, skip: bool = False, columns: dict[str, str] | None = None
) -> tuple[list[Judgments], Any]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return read_judgments(rows.read(str(file), on_bad_row="skip" if skip else "error"), columns or {})


def problem(folder: Path, row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as raised:
        read(folder, [GOOD, row])
    (only,) = raised.value.diagnostics
    assert only.line == 2
    return str(only)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([True, False], (1.0, 0.0)),
        ([1, 0], (1.0, 0.0)),
        ([0.75, None], (0.75, None)),
        (["+", "-"], (1.0, 0.0)),
        ("[true, null]", (1.0, None)),
    ],
)
def test_labels_of_every_kind(labels: Any, expected: tuple[float | None, ...], tmp_path: Path) -> None:
    (found,), report = read(tmp_path, [{**GOOD, "labels": labels}])
    assert isinstance(found, Stepwise)
    assert (found.steps, found.labels) == (("7 + 6 = 13", "1 + 2 + 1 = 5"), expected)
    assert not isinstance(found.prompt, str)
    assert [message.content for message in found.prompt] == [GOOD["prompt"]]
    assert report.notes[-1] == 'format: steps (prompt <- "prompt", completions <- "completions", labels <- "labels")'


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**GOOD, "labels": [True]}, "labels: got 1 label for 2 steps"),
        ({**GOOD, "labels": [None, None]}, "labels: got only null; expected a label for one step or more"),
        ({**GOOD, "labels": []}, "labels: got an empty list"),
        ({**GOOD, "labels": True}, "labels: got true or false; expected a list with a label for each step"),
        ({**GOOD, "labels": ["good", False]}, "labels[0]: got 'good' (text); expected true or false, a probability"),
        ({**GOOD, "labels": [1, -1]}, "write -1 as false, and 0 and 1 as true"),
        ({**GOOD, "labels": [2, 0]}, "labels[0]: got 2 (a number)"),
        ({**GOOD, "completions": ["7 + 6 = 13", " "]}, "completions[1]: got ' '"),
        ({**GOOD, "completions": ["7 + 6 = 13", 14]}, "completions[1]: got 14 (a number)"),
        ({**GOOD, "completions": "7 + 6 = 13"}, "completions: got text that is neither JSON nor a Python list"),
        (
            {**GOOD, "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages of user, assistant",
        ),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert sentence in problem(tmp_path, row)


def test_refused_rows_are_counted(tmp_path: Path) -> None:
    bad = [{**GOOD, "labels": [True]}, {**GOOD, "labels": [None, None]}, {**GOOD, "completions": ["a", ""]}]
    found, report = read(tmp_path, [GOOD, *bad], skip=True)
    assert (len(found), report.read, report.used) == (1, 4, 1)
    assert report.dropped == {"labels do not fit the steps": 1, "no step is labeled": 1, "step is blank": 1}


def test_comparisons_stay_comparisons(tmp_path: Path) -> None:
    (found,), _ = read(tmp_path, [{"prompt": "a", "completions": ["b", "c"], "scores": [1, 2]}])
    assert isinstance(found, Comparison)
    assert len(found.pairs) == 1
    with pytest.raises(DataError, match="columns of 2 formats: groups and steps"):
        read(tmp_path, [{**GOOD, "scores": [1, 2]}])


def test_columns_may_be_named(tmp_path: Path) -> None:
    row = {"asked": "What is 1 + 1?", "reasoning": ["1 + 1 = 2"], "right": [True]}
    columns = {"prompt": "asked", "completions": "reasoning", "labels": "right"}
    (found,), _ = read(tmp_path, [row], columns=columns)
    assert isinstance(found, Stepwise)
    assert found.steps == ("1 + 1 = 2",)
    with pytest.raises(DataError, match="no column 'nothing'"):
        read(tmp_path, [row], columns={**columns, "labels": "nothing"})


def encoded(
    folder: Path, tokenizer: PreTrainedTokenizerBase, content: Sequence[dict[str, Any]], **settings: Any
) -> tuple[list[EncodedStepwise], Any]:
    examples = [each for each in read(folder, content)[0] if isinstance(each, Stepwise)]
    given = {"separator": "\n", "template": ChatTemplate(tokenizer, "plain"), "max_length": None, **settings}
    return encode_stepwise(tokenizer, examples, **given)


def test_tokens_are_those_of_the_parts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Prompt as generation starts from it, then every step and its separator; scored at the separator's last token."""
    (row,), report = encoded(tmp_path, tokenizer, [GOOD], separator=" ;;")
    template = ChatTemplate(tokenizer, "plain")
    ids = prompt_tokens(tokenizer, str(GOOD["prompt"]), template=template)
    ends = []
    for step in ("7 + 6 = 13", "1 + 2 + 1 = 5"):
        ids = [*ids, *tokenizer.encode(step, add_special_tokens=False)]
        ids += tokenizer.encode(" ;;", add_special_tokens=False)
        ends.append(len(ids) - 1)
    assert row == EncodedStepwise(ids, ends, [1.0, 0.0], 0)
    assert (report.steps, report.labeled_steps, report.tokens) == (2, 2, len(ids))


def test_the_first_steps_have_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    short = {**GOOD, "completions": GOOD["completions"][:1], "labels": GOOD["labels"][:1]}  # type: ignore[index]
    (whole, part), _ = encoded(tmp_path, tokenizer, [GOOD, short])
    assert part.ids == whole.ids[: whole.ends[0] + 1]


def test_answers_over_the_maximum_length(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (row,), _ = encoded(tmp_path, tokenizer, [GOOD])
    late = {**GOOD, "labels": [None, True]}
    content, most = [GOOD, late, {**GOOD, "prompt": "a" * 400}], row.ends[0] + 1
    cut = RowPolicy("cut", max_dropped_share=1.0)
    found, report = encoded(tmp_path, tokenizer, content, max_length=most, policy=cut)
    assert found == [EncodedStepwise(row.ids[:most], row.ends[:1], [1.0], 0)]
    assert report.dropped == {UNLABELED: 1, PROMPT_OVER: 1}
    # The one that is used lost its second step, and so did the one whose only label was there.
    assert (report.cut, report.tokens_cut) == (2, 2 * (len(row.ids) - most))
    with pytest.raises(DataError, match="max_length"):
        encoded(tmp_path, tokenizer, content, max_length=most, policy=RowPolicy("error"))
    whole, report = encoded(
        tmp_path, tokenizer, content, max_length=len(row.ids), policy=RowPolicy("drop", max_dropped_share=1.0)
    )
    assert (len(whole), report.dropped) == (2, {OVER_LENGTH: 1})


def test_a_batch_by_hand() -> None:
    first = EncodedStepwise([5, 6, 7, 8], [2, 3], [0.75, None], 0)
    second = EncodedStepwise([9, 10], [1], [0.5], 1)
    batch = StepwiseRows([first, second])([1, 0])
    assert batch.ids.tolist() == [9, 10, 5, 6, 7, 8]
    assert batch.ends.tolist() == [1, 4, 5]
    assert batch.labels.tolist() == [0.5, 0.75, 0.0]
    assert batch.is_labeled.tolist() == [True, True, False]
    assert (batch.counts, batch.rows, batch.num_tokens) == ((1, 2), (1, 0), 6)
    assert StepwiseRows([first, second], soft_labels=False)([0, 1]).labels.tolist() == [1.0, 0.0, 0.5]
