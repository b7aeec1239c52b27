"""Chains of steps: parsing, limits, and continuation where they would end too early, on hand-made texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pico_language_models import mixed_prompts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.generation.completions import GrowingText, Verdict
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.generation.steps import Chain, StepLimits, mean_logprob, reason


@dataclass(frozen=True)
class Marks:
    opening: str = ""
    closing: str = ">>\n"
    delimiter: str = "\n"
    answer_marker: str = ""


# Every character of these texts is one token, so that positions can be counted by hand.
Says = Callable[[str], Any]


@pytest.fixture
def chain(says: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> Callable[..., Chain]:
    def build(text: str, marks: Marks = Marks(), **limits: Any) -> Chain:
        assert len(tokenizer.encode(text)) == len(text)
        model, prompt = says(text)
        return reason(Engine(model, tokenizer), [prompt], marks, limits=StepLimits(**limits))[0][0]

    return build


def test_a_chain_is_taken_apart(chain: Callable[..., Chain]) -> None:
    got = chain("11\n22\n\n3\n>>\n7")
    assert [step.text for step in got.steps] == ["11", "22", "3"]
    assert (got.answer.text, got.well_formed, got.finish_reason) == ("7", True, "stop")
    # An empty line belongs to the step before it; the closing and the end token to the answer.
    assert [step.tokens for step in got.steps] == [3, 4, 2]
    assert got.answer.tokens == 5
    sums = [sum(got.logprobs[a:b]) for a, b in ((0, 3), (3, 7), (7, 9), (9, 14))]
    assert [step.logprob for step in (*got.steps, got.answer)] == pytest.approx(sums)
    assert mean_logprob(got) == pytest.approx(sum(got.logprobs) / 14)


def test_opening_and_answer_marker(chain: Callable[..., Chain]) -> None:
    got = chain("<<\n1\n2\n>>\n#7", Marks(opening="<<\n", answer_marker="#"))
    assert ([step.text for step in got.steps], got.answer.text) == (["1", "2"], "7")
    assert [step.tokens for step in got.steps] == [5, 2]
    limited = chain("<<\n1\n2\n>>\n#7", Marks(opening="<<\n", answer_marker="#"), max_steps=2)
    assert limited.text == got.text
    hashes = chain("1\n2\n####7", Marks(closing="", answer_marker="####"))
    assert ([step.text for step in hashes.steps], hashes.answer.text, hashes.well_formed) == (["1", "2"], "7", True)


def test_a_chain_without_an_end_has_no_answer(chain: Callable[..., Chain]) -> None:
    got = chain("11\n22")
    assert ([step.text for step in got.steps], got.answer.text, got.well_formed) == (["11", "22"], "", False)
    assert [step.tokens for step in got.steps] == [3, 3]


def test_limits_that_are_not_reached_change_nothing(chain: Callable[..., Chain]) -> None:
    text = "11\n22\n33\n>>\n7"
    free = chain(text)
    limited = chain(
        text, max_steps=3, max_step_tokens=3, max_thinking_tokens=12, max_answer_tokens=5, min_thinking_tokens=9
    )
    assert limited == free
    assert limited.forced == ()


def test_the_number_of_steps_is_limited(chain: Callable[..., Chain]) -> None:
    """After the first step the closing is forced at positions 3 to 5; the model continues at position 6."""
    got = chain("11\n22\n33\n>>\n7", max_steps=1)
    assert got.text == "11\n>>\n33\n>>\n7"
    assert got.forced == (3, 4, 5)
    assert [got.logprobs[index] for index in got.forced] == [0, 0, 0]
    assert ([step.text for step in got.steps], got.answer.text) == (["11"], "33\n>>\n7")


def test_the_length_of_a_step_is_limited(chain: Callable[..., Chain]) -> None:
    """A delimiter is forced at every third position."""
    got = chain("123456\n>>\n7", max_step_tokens=2)
    assert got.text == "12\n45\n\n>>\n7"
    assert ([step.text for step in got.steps], got.forced) == (["12", "45"], (2, 5))


def test_thinking_is_closed_at_its_limit(chain: Callable[..., Chain]) -> None:
    got = chain("1234567890", max_thinking_tokens=4)
    assert got.text == "1234\n>>\n90"
    assert ([step.text for step in got.steps], got.answer.text, got.forced) == (["1234"], "90", (4, 5, 6, 7))


def test_thinking_continues_until_its_minimum(chain: Callable[..., Chain]) -> None:
    """The closing at positions 3 to 5 is taken back; "9\\n" is forced at 3 and 4, and the model continues at 5."""
    got = chain("11\n>>\n22\n>>\n7", min_thinking_tokens=8, continuation="9\n")
    assert got.text == "11\n9\n\n22\n>>\n7"
    assert ([step.text for step in got.steps], got.answer.text, got.forced) == (["11", "9", "22"], "7", (3, 4))
    assert len(got.logprobs) == len(got.token_ids)


def test_an_early_end_token_is_taken_back(chain: Callable[..., Chain]) -> None:
    got = chain("11\n", min_thinking_tokens=4, continuation="9\n")
    assert (got.text, got.forced, got.finish_reason, got.well_formed) == ("11\n9\n", (3, 4), "stop", False)


def test_the_answer_is_limited(chain: Callable[..., Chain]) -> None:
    got = chain("1\n>>\n777777", max_answer_tokens=2)
    assert (got.text, got.answer.text, got.finish_reason) == ("1\n>>\n77", "77", "guide")


@pytest.mark.parametrize(
    "limits",
    [
        {"max_steps": 0},
        {"max_thinking_tokens": 3, "min_thinking_tokens": 4},
        {"min_thinking_tokens": 1, "continuation": ""},
    ],
)
def test_limits_that_make_no_sense_are_named(limits: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        StepLimits(**limits)


class TakesBack:
    """At the sixth token, once, keeps two tokens and forces a text."""

    def __init__(self) -> None:
        self.has_acted = False

    def after(self, text: GrowingText, tokens: Sequence[int], *, ended: bool) -> Verdict | None:
        if self.has_acted or len(tokens) < 6:
            return None
        self.has_acted = True
        return Verdict(keep=2, written="the box")


@pytest.mark.parametrize("path", ["cached", "plain"])
def test_what_was_taken_back_leaves_no_trace(
    path: str, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = Engine(llama, tokenizer, max_rows=2)
    engine.path = path
    prompts = mixed_prompts(3)
    settings = SamplingParams(max_new_tokens=12, stop_at_end=False)
    free = engine.generate(prompts, settings)
    written = tokenizer.encode("the box", add_special_tokens=False)
    for prompt, before, got in zip(
        prompts, free, engine.generate(prompts, settings, guide=lambda _p, _s: TakesBack()), strict=True
    ):
        assert got.token_ids[: 2 + len(written)] == before.token_ids[:2] + written
        assert got.forced == tuple(range(2, 2 + len(written)))
        with torch.no_grad():
            logits = (
                llama(input_ids=torch.tensor([prompt + got.token_ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            )
        for index, (token, logprob) in enumerate(zip(got.token_ids, got.logprobs, strict=True)):
            if index not in got.forced:
                assert int(logits[index].argmax()) == token
                assert logprob == pytest.approx(float(logits[index, token]), abs=1e-5)
