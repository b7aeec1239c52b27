"""The expected grade of a judge model, beside a plain computation with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.diagnostics import UserError
from loopos.evaluation.grading import Grader
from loopos.evaluation.grading_prompt import GRADING_PROMPT, YES_OR_NO, GradingPrompt
from loopos.evaluation.reasoning import Reasoner

ASKED = [{"prompt": f"where is parcel {i}", "response": "thank you " * (i + 1)} for i in range(5)]


@pytest.fixture
def reasoner(pico_folder: Path) -> Reasoner:
    # Opened for each test: a model that scores packed rows runs in no other way.
    return Reasoner.open(str(pico_folder))


def test_numbers_have_their_expectation(reasoner: Reasoner, pico_folder: Path) -> None:
    prompt = GradingPrompt.of("{prompt} {response}", ["1", "2.5"])
    assert dict(prompt.values) == {"1": 1.0, "2.5": 2.5}
    assert not prompt.is_probability
    grader = Grader(reasoner, prompt)
    model = AutoModelForCausalLM.from_pretrained(pico_folder)
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    masses = []
    for fields, score in zip(ASKED, grader.grade(ASKED), strict=True):
        begin = reasoner.prompt(f"{fields['prompt']} {fields['response']}")
        mass, total = 0.0, 0.0
        for grade, value in prompt.values.items():
            for spelling in (grade, f" {grade}"):
                end = tokenizer(spelling, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logprobs = model(torch.tensor([[*begin, *end]])).logits[0].double().log_softmax(-1)
                logprob = sum(logprobs[len(begin) - 1 + i, token] for i, token in enumerate(end))
                mass += float(logprob.exp())
                total += value * float(logprob.exp())
        assert score == pytest.approx(total / mass, rel=1e-4)
        masses.append(mass)
    assert grader.mass == pytest.approx(sum(masses) / len(masses), rel=1e-4)


def test_a_response_has_one_score_in_any_batch(reasoner: Reasoner) -> None:
    grader = Grader(reasoner, GradingPrompt.of("{response}", YES_OR_NO))
    assert grader.mass is None
    together = grader.grade(ASKED)
    one_by_one = [grader.grade([fields])[0] for fields in ASKED]
    assert together == pytest.approx(one_by_one, rel=1e-5)
    assert len(set(together)) == 5


def test_what_is_longer_than_the_judge_s_positions_has_no_score(reasoner: Reasoner) -> None:
    grader = Grader(reasoner, GradingPrompt.of(GRADING_PROMPT, YES_OR_NO))
    long = {"prompt": "my card " * 300, "response": "thank you"}
    assert grader.grade([long, long]) == [None, None]
    assert grader.mass is None
    short, none = grader.grade([ASKED[0], long])
    assert none is None
    assert short is not None
    assert 0 < short < 1


def test_names_in_braces_are_fields_and_other_braces_stay() -> None:
    prompt = GradingPrompt.of('{response} {tags} {"grade": 1} { x }', YES_OR_NO)
    # What is filled in is not searched again.
    assert prompt.filled({"response": "{tags}", "tags": [1, "ü"]}) == '{tags} [1, "ü"] {"grade": 1} { x }'
    with pytest.raises(UserError, match=r"names \{tags\}, but the row has no such column \(known: response\)"):
        prompt.filled({"response": "a"})


@pytest.mark.parametrize(
    "grades", [[], ["yes"], ["yes", "Yes"], ["yes", "no", "maybe"], ["1", "no"], ["1", "1"], ["yes", ""]]
)
def test_other_grades_are_refused(grades: list[str]) -> None:
    with pytest.raises(UserError, match="expected a good and a bad word"):
        GradingPrompt.of("{response}", grades)


def test_a_prompt_without_the_response_is_refused() -> None:
    with pytest.raises(UserError, match=r"no \{response\}"):
        GradingPrompt.of("{prompt}", YES_OR_NO)
    assert GradingPrompt.of("{response}", ["good", "bad"]).is_probability
    assert GradingPrompt.of("{response}", ["0", "1"]).is_probability
