"""The packaged demo data: its counts, columns and encoding; no message repeats another, and length carries no information."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import combinations, pairwise

import pytest

INTENTS = {
    "order_status",
    "cancel_order",
    "refund_request",
    "change_address",
    "payment_problem",
    "technical_problem",
    "account_access",
    "product_question",
    "complaint_service",
    "praise_thanks",
}
TRAINING, VALIDATION, LIVE = "intents_train.jsonl", "intents_validation.jsonl", "intents_live.txt"
REPLIES, PROMPTS = {"replies_train.jsonl": 240, "replies_judge.jsonl": 60}, "reply_prompts.jsonl"


def read_lines(name: str) -> list[str]:
    """The file's lines; decoding is strict, so a byte that is not UTF-8 fails the test."""
    text = files("loopos.demo").joinpath(name).read_bytes().decode("utf-8", errors="strict")
    assert text.endswith("\n")
    return text.removesuffix("\n").split("\n")


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in read_lines(name)]


def every_message() -> list[str]:
    texts = [row["text"] for name in (TRAINING, VALIDATION) for row in read_rows(name)] + read_lines(LIVE)
    assert len(texts) == 320 + 80 + 3
    return texts


def words_of(text: str) -> list[str]:
    """Lower-case words; apostrophes are dropped so that "don't" is one word and equals "dont"."""
    return re.findall(r"[^\W_]+", text.lower().replace("'", ""))


def test_words_ignore_case_and_punctuation() -> None:
    assert words_of("Don't send B-12, OK?") == ["dont", "send", "b", "12", "ok"]


@pytest.mark.parametrize(("name", "per_intent"), [(TRAINING, 32), (VALIDATION, 8)])
def test_intents_have_their_expected_counts(name: str, per_intent: int) -> None:
    counts = Counter(row["label"] for row in read_rows(name))
    assert counts == dict.fromkeys(INTENTS, per_intent)


@pytest.mark.parametrize("name", [TRAINING, VALIDATION])
def test_columns_are_text_and_label(name: str) -> None:
    for number, row in enumerate(read_rows(name), start=1):
        assert list(row) == ["text", "label"], f"{name}:{number}"
        assert isinstance(row["text"], str), f"{name}:{number}"


@pytest.mark.parametrize("name", [TRAINING, VALIDATION])
def test_intents_are_mixed_in_file_order(name: str) -> None:
    labels = [row["label"] for row in read_rows(name)]
    changes = sum(first != second for first, second in pairwise(labels))
    # Sorted by intent there would be nine changes; a fair shuffle changes at nine rows in ten.
    assert changes > len(labels) * 3 // 4


def test_messages_have_5_to_30_words_and_clean_edges() -> None:
    for text in every_message():
        assert 5 <= len(text.split()) <= 30, text
        assert text == " ".join(text.split()), text
        assert text.isprintable(), text
        assert "\ufffd" not in text, text


def test_no_message_repeats_in_or_between_files() -> None:
    normalized = Counter(" ".join(words_of(text)) for text in every_message())
    assert [text for text, count in normalized.items() if count > 1] == []


def test_no_two_messages_share_more_than_half_of_their_words() -> None:
    vocabularies = [(frozenset(words_of(text)), text) for text in every_message()]
    too_close = [
        (first_text, second_text)
        for (first, first_text), (second, second_text) in combinations(vocabularies, 2)
        if 2 * len(first & second) > min(len(first), len(second))
    ]
    assert too_close == []


@pytest.mark.parametrize(("name", "count"), REPLIES.items())
def test_length_does_not_give_away_the_chosen_reply(name: str, count: int) -> None:
    rows = read_rows(name)
    assert len(rows) == count
    longer = 0
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected"]
        for text in row.values():
            assert 3 <= len(text.split()) <= 60, text
            assert text == " ".join(text.split()), text
            assert text.isprintable(), text
        longer += len(row["chosen"]) > len(row["rejected"])
    # Whoever names the longer reply the better one is right about as often as a coin.
    assert 0.4 <= longer / count <= 0.68, longer


def test_no_prompt_of_the_replies_repeats_in_or_between_files() -> None:
    prompts = [row["prompt"] for name in (*REPLIES, PROMPTS) for row in read_rows(name)]
    assert len(prompts) == 240 + 60 + 60
    assert len({" ".join(words_of(prompt)) for prompt in prompts}) == len(prompts)


def test_readme_names_every_file_and_intent() -> None:
    readme = files("loopos.demo").joinpath("README.md").read_text(encoding="utf-8")
    named = (TRAINING, VALIDATION, LIVE, *REPLIES, PROMPTS, *sorted(INTENTS))
    missing = [name for name in named if f"`{name}`" not in readme]
    assert missing == []
