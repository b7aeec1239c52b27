"""Step markers and stop strings work the same whether they are special tokens or ordinary ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico_language_models import Scripted
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.cli.trace import chain_record, described
from loopos.data.demonstrations import Demonstration
from loopos.data.rows import Row
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.templates import ChatTemplate
from loopos.evaluation.answer_check import judge_all
from loopos.evaluation.checkers import checker
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.generation.steps import StepLimits

THINK = NAMED_FORMATS["think"]
SAYS = "<think>\n2 + 5 is it\n</think>\n7"


@pytest.fixture(params=["ordinary", "special"])
def marked(request: pytest.FixtureRequest, pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    """The pico tokenizer with `<think>` and `</think>` as tokens of their own."""
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    marks = ["<think>", "</think>"]
    if request.param == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    else:
        tokenizer.add_tokens(marks)
    assert [len(tokenizer.encode(mark, add_special_tokens=False)) for mark in marks] == [1, 1]
    return tokenizer


def scripted(tokenizer: PreTrainedTokenizerBase, text: str, *, after: int) -> Scripted:
    """A model that generates `text` and its end token after a prompt of this many tokens."""
    ids = [0] * (after - 1) + [*tokenizer.encode(text, add_special_tokens=False), 2]
    logits = torch.zeros(len(ids), len(tokenizer))
    logits[torch.arange(len(ids)), ids] = 20.0
    return Scripted(logits, by_position=True)


def reasoner(tokenizer: PreTrainedTokenizerBase, problem: Demonstration) -> Reasoner:
    template = ChatTemplate(tokenizer)
    empty = Reasoner(scripted(tokenizer, SAYS, after=1), tokenizer, template=template, step_format=THINK)
    length = len(empty.prompt(problem))
    return Reasoner(scripted(tokenizer, SAYS, after=length), tokenizer, template=template, step_format=THINK)


def test_a_chain_is_read_and_right(marked: PreTrainedTokenizerBase) -> None:
    problem = Demonstration("What?", ("2 + 5 is it",), "7", Row({}, "rows", 1, 0))
    requests = reasoner(marked, problem)
    found = requests.answer([problem], SamplingParams(max_new_tokens=40), limits=StepLimits(max_steps=4))
    (chain,) = found[0].chains
    assert (chain.text, found[0].answer, chain.well_formed) == (SAYS, "7", True)
    assert [step.text for step in chain.steps] == ["2 + 5 is it"]
    ((verdict,),) = judge_all(found, [problem], step_format=THINK, checker=checker("auto"))
    assert (verdict.is_right, verdict.parsed) == (True, (("2 + 5 is it",), "7", True))
    assert chain_record("What?", chain, THINK)["steps"][0]["text"] == "2 + 5 is it"
    assert "not in the expected step format" not in described(chain, THINK)


@pytest.mark.parametrize(
    ("stop", "keep", "text"),
    [
        ("</think>", False, "<think>\n2 + 5 is it\n"),
        ("</think>", True, "<think>\n2 + 5 is it\n</think>"),
        ("</think>\n", True, "<think>\n2 + 5 is it\n</think>\n"),
    ],
)
def test_a_stop_string(stop: str, keep: bool, text: str, marked: PreTrainedTokenizerBase) -> None:
    engine = Engine(scripted(marked, SAYS, after=1), marked)
    [got] = engine.generate([[1]], SamplingParams(stop=(stop,), keep_stop=keep, max_new_tokens=40))
    assert (got.text, got.finish_reason) == (text, "stop string")


def test_the_pad_token_is_text_where_it_is_a_stop_string(pico_tokenizer: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(pico_tokenizer)
    summary = f"the box{tokenizer.pad_token} was"
    assert 0 in tokenizer.encode(summary, add_special_tokens=False)
    engine = Engine(scripted(tokenizer, summary, after=1), tokenizer)
    texts = {}
    for stop in ((), (tokenizer.pad_token,)):
        [got] = engine.generate([[1]], SamplingParams(stop=stop, max_new_tokens=40))
        texts[stop] = (got.text, got.finish_reason)
    assert list(texts.values()) == [("the box was", "stop"), ("the box", "stop string")]
