"""Texts that are far too long are cut before tokenization, and the remaining tokens are the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loopos.data import tokens as text_bounds
from loopos.data.formats import Labeled
from loopos.data.preference_tokens import encode_comparisons
from loopos.data.preferences import Comparison, Pair
from loopos.data.rows import Row
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import Completion
from loopos.data.supervised_tokens import RowPolicy, encode_supervised
from loopos.data.tokens import TextBound, encode_labeled, spans
from tests.conftest import SENTENCES

LONG = 2400
ROW = Row({}, "a.jsonl", 7, 6)


@pytest.fixture(autouse=True)
def _short_texts_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer takes seconds for the texts that are long enough by themselves."""
    monkeypatch.setattr(text_bounds, "SHORT_CHARACTERS", 500)


def _text(seed: int, length: int = LONG) -> str:
    """Sentences, digits, marks, runs of blanks and letters beyond ASCII, in an order of the seed's."""
    draw = random.Random(seed)
    parts = [*SENTENCES, "1234567", "naïve 東京", "  two  blanks ", "\n\n", "a.b,c;", "!!", "don't", "x" * 40]
    words: list[str] = []
    size = 0
    while size < length:
        words.append(draw.choice(parts))
        size += len(words[-1]) + 1
    return " ".join(words)


def _sentence_piece() -> PreTrainedTokenizerFast:
    """A unigram model that splits the whole text at once, with marks for blanks, and never into words."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(SENTENCES) + " 0123456789"], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def _word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def tokenizers(pico_tokenizer: Path) -> dict[str, Any]:
    return {
        "bpe": AutoTokenizer.from_pretrained(pico_tokenizer),
        "unigram": _sentence_piece(),
        "wordpiece": _word_piece(),
    }


@pytest.mark.parametrize("name", ["bpe", "unigram", "wordpiece"])
def test_the_first_tokens_of_a_beginning_are_those_of_the_whole(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    bound = TextBound(tokenizer)
    assert bound.is_safe
    for seed, expected in ((0, 32), (1, 1), (2, 50)):
        text = _text(seed)
        begun = bound.beginning(text, expected)
        assert text.startswith(begun)
        assert len(begun) < 0.8 * len(text)
        ids, whole = (tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in (begun, text))
        assert len(ids) > expected
        assert whole[:expected] == ids[:expected]


def test_a_long_row_by_the_bounds_as_they_are(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    text = _text(3, 1 << 18)
    begun = TextBound(tokenizers["bpe"]).beginning(text, 256)
    assert text_bounds.SHORT_CHARACTERS < len(begun) < 0.6 * len(text)
    (encoded,), _ = encode_labeled(tokenizers["bpe"], [Labeled(text, None, 1, ROW)], max_length=256)
    assert encoded.ids == tokenizers["bpe"](text, add_special_tokens=False, verbose=False)["input_ids"][:256]
    assert encoded.cut > 10_000


def test_what_cannot_be_shown_to_be_equal_is_not_cut(tokenizers: dict[str, Any]) -> None:
    bound = TextBound(tokenizers["bpe"])
    for text in (_text(0)[:500], "x" * LONG, "東京" * LONG):
        assert bound.beginning(text, 10) is text
    assert bound.beginning(_text(0), None) == _text(0)
    joined = Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1, "aĠ": 2}, merges=[("a", "Ġ")]))
    assert not TextBound(PreTrainedTokenizerFast(tokenizer_object=joined)).is_safe


@pytest.mark.parametrize(
    ("name", "pair", "side"),
    [
        ("bpe", None, "right"),
        ("bpe", None, "left"),
        ("wordpiece", None, "right"),
        ("wordpiece", "short", "right"),
        ("wordpiece", "long", "right"),
        ("bpe", "longer", "right"),
    ],
)
def test_labeled_rows_are_those_of_the_tokenizer(
    name: str, pair: str | None, side: str, tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers[name]
    second = {None: None, "short": "a kind answer", "long": _text(5), "longer": _text(5, 2 * LONG)}[pair]
    tokenizer.truncation_side = side
    try:
        for length in (23, 24):
            expected = tokenizer(_text(4), second, truncation=True, max_length=length, verbose=False)["input_ids"]
            (encoded,), report = encode_labeled(tokenizer, [Labeled(_text(4), second, 1, ROW)], max_length=length)
            assert encoded.ids == expected
            assert report.cut == 1
            assert ("at least" in report.summary()) is (side == "right")
    finally:
        tokenizer.truncation_side = "right"


def _parts(kind: str) -> tuple[Callable[..., Any], Any]:
    if kind == "supervised":
        return encode_supervised, Completion("where is it?", _text(6), ROW)
    return encode_comparisons, Comparison("where is it?", (_text(6), "late"), (Pair(0, 1),), ROW)


@pytest.mark.parametrize("kind", ["supervised", "comparisons"])
def test_rows_of_language_models_are_the_same_cut_and_the_same_dropped(
    kind: str, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, example = _parts(kind)
    extra = {"step_format": NAMED_FORMATS["think"]} if kind == "supervised" else {"template": None}

    def cut() -> Any:
        rows, report = encode(tokenizers["bpe"], [example], max_length=40, policy=RowPolicy("cut"), **extra)
        with pytest.raises(Exception, match=r"tokens; expected at most 40") as caught:
            encode(tokenizers["bpe"], [example], max_length=40, policy=RowPolicy("error"), **extra)
        return rows, report.cut, str(caught.value)

    rows, count, message = cut()
    monkeypatch.setattr(text_bounds, "SHORT_CHARACTERS", 10 * LONG)
    whole_rows, whole_count, whole_message = cut()
    assert (rows, count) == (whole_rows, whole_count)
    assert "a.jsonl:7: row: got at least " in message
    assert "at least" not in whole_message


def test_spans_hold_few_rows_and_few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_bounds, "CHUNK_CHARACTERS", 10)
    assert list(spans([4, 4, 4, 30, 1, 1, 1, 1], 3)) == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]
    assert list(spans([], 3)) == []
