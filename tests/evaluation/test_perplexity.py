"""Perplexity: windows by hand, every token once, values beside transformers' own logits, tokens and bytes counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.diagnostics import UserError
from loopos.evaluation.perplexity import TextLoss, text_loss, windows
from tests.conftest import SENTENCES

TEXT = "\n".join(SENTENCES) + "\nß — ok\n"


@pytest.fixture
def opened(pico_folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(pico_folder)


def test_windows_by_hand() -> None:
    assert list(windows(10, 4, 2)) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert list(windows(9, 4, 3)) == [(0, 4, 1), (3, 7, 4), (6, 9, 7)]
    assert list(windows(5, 8, 4)) == [(0, 5, 1)]
    assert list(windows(4, 4, 1)) == [(0, 4, 1)]


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(50, 7, 1), (50, 7, 6), (13, 4, 3), (2, 2, 1), (101, 100, 50)]
)
def test_every_token_but_the_first_is_counted_once(tokens: int, window: int, stride: int) -> None:
    counted = [index for _, last, start in windows(tokens, window, stride) for index in range(start, last)]
    assert counted == list(range(1, tokens))
    assert all(start - first >= min(window - stride, start) for first, _, start in windows(tokens, window, stride))


@torch.no_grad()
@pytest.mark.parametrize(("window", "stride"), [(256, 128), (32, 8), (32, 31)])
def test_the_choice_equals_that_of_transformers_logits(opened: tuple[Any, Any], window: int, stride: int) -> None:
    """Token by token: −log p given the tokens before it in its window."""
    model, tokenizer = opened
    ids = tokenizer(TEXT)["input_ids"]
    nats, last = 0.0, 0
    for index in range(1, len(ids)):
        # The first window that reaches the token.
        first = 0 if index < window else math.ceil((index + 1 - window) / stride) * stride
        logits = model(input_ids=torch.tensor([ids[first:index]])).logits[0, -1]
        nats -= float(logits.double().log_softmax(-1)[ids[index]])
        last = index
    found = text_loss(model, tokenizer, TEXT, window=window, stride=stride)
    assert found.tokens == last == len(ids) - 1
    assert found.nats == pytest.approx(nats, rel=1e-5)
    first_text = tokenizer.decode(ids[:1])
    assert found.num_bytes == len(TEXT.encode()) - len(first_text.encode())
    assert found.perplexity == pytest.approx(math.exp(nats / last), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    torch.nn.init.zeros_(model.lm_head.weight)
    assert text_loss(model, tokenizer, TEXT, window=64).perplexity == pytest.approx(400, rel=1e-5)


def test_a_begin_token_is_context_and_every_token_of_the_text_counts(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    own = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = text_loss(model, tokenizer, TEXT)
    assert (found.tokens, found.num_bytes) == (len(own), len(TEXT.encode()))


def test_bits_a_byte_by_hand() -> None:
    found = TextLoss(nats=8 * math.log(2), tokens=4, num_bytes=16, window=8, stride=4)
    assert (found.perplexity, found.bits_per_byte, found.context) == (pytest.approx(4.0), pytest.approx(0.5), 4)


@pytest.mark.parametrize(
    ("text", "window", "stride", "told"),
    [
        (TEXT, 257, None, "window: got 257 tokens; expected 2 to 256, the model's positions"),
        (TEXT, 1, None, "window: got 1 tokens"),
        (TEXT, 64, 64, "stride: got 64 tokens; expected 1 to 63"),
        ("a", None, None, "a text of 1 tokens; expected 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    opened: tuple[Any, Any], text: str, window: int | None, stride: int | None, told: str
) -> None:
    with pytest.raises(UserError, match=told.replace("(", r"\(")):
        text_loss(*opened, text, window=window, stride=stride)
