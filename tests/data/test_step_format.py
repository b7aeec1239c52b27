"""Chains as text: written, read back exactly, refused where that cannot be; any text is read without an error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.config.chain_of_thought import StepFormatSection
from loopos.data.step_format import NAMED_FORMATS, StepFormat, chosen_format

THINK, HASHES, LINES = NAMED_FORMATS["think"], NAMED_FORMATS["hashes"], NAMED_FORMATS["lines"]
SAYS = StepFormat(opening="", closing="", answer_marker="The answer is ")
SAYS_BEHIND = StepFormat(answer_marker="The answer is ")
FORMATS = [
    THINK,
    HASHES,
    LINES,
    StepFormat(answer_marker="Answer: "),
    StepFormat(opening="", closing="</reasoning>"),
    StepFormat(opening="Let us think.\n", closing="", delimiter="\n\n", answer_marker="So the answer is "),
    StepFormat(delimiter=" ;; "),
]

# Letters, and what means something to one of the formats.
PIECES = st.sampled_from(
    [
        "a",
        "7",
        " ",
        "\n",
        "\n\n",
        "<think>",
        "</think>",
        "####",
        "#### ",
        "Answer:",
        ";;",
        "</reasoning>",
        "é",
        "\r",
        "So",
    ]
)
TEXTS = st.lists(PIECES, max_size=5).map("".join) | st.text(max_size=6)


def test_the_three_named_formats_as_written() -> None:
    steps = ["3 + 4 = 7", "7 + 5 = 12"]
    assert THINK.render(steps, "12") == "<think>\n3 + 4 = 7\n7 + 5 = 12\n</think>\n12"
    assert HASHES.render(steps, "12") == "3 + 4 = 7\n7 + 5 = 12\n#### 12"
    assert LINES.render(steps, "12") == "3 + 4 = 7\n7 + 5 = 12\n12"
    assert [form.render([], "yes") for form in (THINK, HASHES, LINES)] == ["<think>\n</think>\nyes", "#### yes", "yes"]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(form=st.sampled_from(FORMATS), steps=st.lists(TEXTS, max_size=4), answer=TEXTS)
def test_what_is_written_is_read_back_and_the_rest_is_refused(form: StepFormat, steps: list[str], answer: str) -> None:
    if form.problem(steps, answer) is None:
        assert form.parse(form.render(steps, answer)) == (tuple(steps), answer, True)
    else:
        with pytest.raises(ValueError):
            form.render(steps, answer)


PLAIN = st.text(st.sampled_from("abz019 +=.,()-é"), min_size=1, max_size=12).filter(lambda text: text.strip() == text)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(form=st.sampled_from(FORMATS), steps=st.lists(PLAIN, max_size=5), answer=PLAIN)
def test_ordinary_steps_are_never_refused(form: StepFormat, steps: list[str], answer: str) -> None:
    assert form.problem(steps, answer) is None
    assert form.parse(form.render(steps, answer)) == (tuple(steps), answer, True)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(form=st.sampled_from(FORMATS), text=TEXTS)
def test_any_text_has_a_reading_and_a_border(form: StepFormat, text: str) -> None:
    steps, answer, well_formed = form.parse(text)
    assert answer == answer.strip()
    assert all(step.strip() for step in steps)
    assert answer or not well_formed
    assert 0 <= form.answer_start(text) <= len(text)


@pytest.mark.parametrize(
    ("form", "steps", "answer", "reason"),
    [
        (THINK, ["a", " "], "1", "step 2 is blank"),
        (THINK, ["a\nb"], "1", "step 1 holds the delimiter '\\n'"),
        (THINK, ["a </think> b"], "1", "step 1 holds the closing '</think>'"),
        (THINK, ["a"], "", "the answer is blank"),
        (THINK, ["a"], "1\n", "white space around it"),
        (HASHES, ["#### 4"], "1", "step 1 begins with the answer marker '####'"),
        (LINES, [], "1\n2", "holds the delimiter"),
        (HASHES, ["a"], "1\n2", "contains a line break"),
        (THINK, ["a"], "1\n\nQuestion: 2", "it would be read back as the steps ['a'] and the answer '1'"),
        (StepFormat(delimiter="\n\n"), ["a\n", "b"], "1", "it would be read back as the steps ['a', '\\nb']"),
    ],
)
def test_why_a_chain_is_refused(form: StepFormat, steps: list[str], answer: str, reason: str) -> None:
    assert reason in (form.problem(steps, answer) or "")


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        # What models write: no end, no beginning, no tags, blank lines, a word before, an answer of several lines.
        (THINK, "<think>\na\nb", (("a", "b"), "", False)),
        (THINK, "a\nb\n</think>\n7", (("a", "b"), "7", True)),
        (THINK, "7", ((), "7", False)),
        (THINK, "<think>\n\na\n\n</think>\n\n7\n", (("a",), "7", True)),
        (THINK, "<think>\na\n</think>\n", (("a",), "", False)),
        (THINK, "<think>\na\n</think>\nx\n\ny", (("a",), "x\n\ny", True)),
        (THINK, "<think> a </think> 7", ((" a ",), "7", True)),
        (THINK, "", ((), "", False)),
        (HASHES, "a\n####7", (("a",), "7", True)),
        (HASHES, "a = 7 #### 7", (("a = 7 ",), "7", False)),
        (HASHES, "a\nb", (("a",), "b", False)),
        (HASHES, "a\n#### ", (("a",), "", False)),
        (StepFormat(answer_marker="Answer: "), "<think>\na\n</think>\n7", (("a",), "7", False)),
        (StepFormat(answer_marker="Answer: "), "<think>\na\n</think>\nAnswer: 7", (("a",), "7", True)),
        (StepFormat(answer_marker="Answer: "), "It is so. Answer: 7", ((), "7", False)),
        # What stands behind the answer is not part of it: a question more, a sentence, the marks once more.
        (HASHES, "7 + 6 = 13\n#### 43\n\nQuestion: What is 1 + 1?\n#### 2", (("7 + 6 = 13",), "43", False)),
        (HASHES, "a\n#### 43\nSo she has 43 parcels and 2 boxes.", (("a",), "43", False)),
        (HASHES, "a = 43 #### 43\nand 2 #### 2", (("a = 43 ",), "43", False)),
        (HASHES, "a\n####\n43\n", (("a",), "43", True)),
        (THINK, "<think>\na\n</think>\n43\n\nQuestion: What is 1 + 1?\n2", (("a",), "43", False)),
        (THINK, "<think>\na\n</think>\n43\n### User:\nWhat?", (("a",), "43", False)),
        (THINK, "<think>\na\n</think>\n43\n\nUser: What?", (("a",), "43", False)),
        (THINK, "<think>\na\n</think>\n43<|im_start|>user\nWhat?", (("a",), "43", False)),
        (THINK, "<think>\na\n</think>\n43\n<think>\nb\n</think>\n44", (("a",), "43", False)),
        (THINK, "<think>\na\n</think>\n43</think>\n43", (("a",), "43", False)),
        (THINK, "<think>\na\n</think>\nname: x\nuser: y", (("a",), "name: x\nuser: y", True)),
        (LINES, "a\n43\n\nQuestion: What is 1 + 1?\n2", (("a",), "43", False)),
        (LINES, "Question 1: is it odd?\nno\n43", (("Question 1: is it odd?", "no"), "43", True)),
        (SAYS, "a\nThe answer is 43.\nb\nThe answer is 43.", (("a",), "43.", False)),
        (SAYS, "a\nThe answer is 43. The answer is 43.", (("a",), "43.", False)),
        (SAYS_BEHIND, "<think>\na\n</think>\nThe answer is 43.\nb\nThe answer is 44.", (("a",), "43.\nb", False)),
        (SAYS_BEHIND, "<think>\na\n</think>\nThe answer is 43. The answer is 44.", (("a",), "43.", False)),
        (SAYS_BEHIND, "<think>\na\n</think>\nSo. The answer is 43.\nThe answer is 44.", (("a",), "43.", False)),
    ],
)
def test_readings_of_what_models_write(
    form: StepFormat, text: str, expected: tuple[tuple[str, ...], str, bool]
) -> None:
    assert form.parse(text) == expected


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        (THINK, "<think>\na\n</think>\n7<end>", "7<end>"),
        (THINK, "<think>\na\n</think>\n\n7", "7"),
        (THINK, "7", "7"),
        (HASHES, "a\nb\n#### 7<end>", "#### 7<end>"),
        (HASHES, "a", "a"),
        (LINES, "a\nb\n7", "7"),
        (LINES, "7", "7"),
    ],
)
def test_where_the_answer_begins(form: StepFormat, text: str, answer: str) -> None:
    assert text[form.answer_start(text) :] == answer


def test_a_format_from_the_config() -> None:
    section = StepFormatSection(opening="<r>", closing="</r>", delimiter="|", answer_marker="A:")
    assert chosen_format(section).render(["x", "y"], "z") == "<r>x|y|</r>A:z"
    assert chosen_format(StepFormatSection()) == chosen_format("think") == StepFormat()
