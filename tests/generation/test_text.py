"""Incremental text: equal to decoding at once, complete characters, stop strings across token boundaries."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loopos.generation.completions import GrowingText, decoded

TEXTS = [
    "the parcel came late",
    "  two spaces, a tab\tand a line\n\nend ",
    "naïve café — 日本語 👩‍🚀 and ß",
    "a kind answer within the hour, thank you",
]


@pytest.fixture(scope="module")
def sentencepiece_like() -> PreTrainedTokenizerBase:
    """A tokenizer that writes a space as a mark before the word and drops the first, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=80, special_tokens=["<eos>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_growing_text_equals_decoding_at_once(
    text: str, kind: str, tokenizer: PreTrainedTokenizerBase, sentencepiece_like: PreTrainedTokenizerBase
) -> None:
    used = tokenizer if kind == "bytes" else sentencepiece_like
    ids = used.encode(text, add_special_tokens=False)
    assert len(ids) > 5
    growing = GrowingText(used)
    before = ""
    for number, token in enumerate(ids, 1):
        growing.add(token)
        assert growing.text.startswith(before)
        assert "\ufffd" not in growing.text
        assert decoded(used, ids[:number]).startswith(growing.text)
        before = growing.text
    growing.finish()
    assert growing.text == decoded(used, ids)
    assert growing.ends[-1] == len(growing.text)
    assert growing.ends == sorted(growing.ends)


def test_bytes_of_a_character_are_buffered_and_flushed_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert len(ids) == 2
    growing = GrowingText(tokenizer)
    growing.add(ids[0])
    assert growing.text == ""
    growing.finish()
    assert growing.text == "\ufffd"


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    growing = GrowingText(tokenizer)
    for token in [*tokenizer.encode("the box", add_special_tokens=False), 2]:
        growing.add(token)
    assert growing.text == "the box"


@pytest.mark.parametrize("stop", ["came", "l ca", "e late", "the", "late"])
def test_a_stop_string_is_found_wherever_tokens_end(stop: str, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "the parcel came late"
    growing = GrowingText(tokenizer, (stop, "never"))
    actual = ""
    for token in tokenizer.encode(text, add_special_tokens=False):
        growing.add(token)
        actual = growing.text[: growing.final_length()] if growing.stopped_at is None else actual
        if growing.stopped_at is not None:
            break
    index = text.index(stop)
    assert growing.stopped_at == (index, index + len(stop))
    # The text streamed before never included a part of the stop string.
    assert len(actual) <= index


def test_the_first_of_two_stop_strings_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    growing = GrowingText(tokenizer, ("box", "parcel"))
    for token in tokenizer.encode("parcel box", add_special_tokens=False):
        growing.add(token)
    assert growing.stopped_at == (0, 6)


def test_a_possible_stop_string_is_not_final(tokenizer: PreTrainedTokenizerBase) -> None:
    growing = GrowingText(tokenizer, ("\n\nEnd",))
    lengths = []
    for token in [
        token for part in ("ab", "\n", "\n", "E", "x") for token in tokenizer.encode(part, add_special_tokens=False)
    ]:
        growing.add(token)
        lengths.append(growing.final_length())
    assert growing.text == "ab\n\nEx"
    assert lengths == [1, 2, 2, 2, 2, 6]
