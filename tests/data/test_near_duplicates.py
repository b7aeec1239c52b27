"""Texts that are nearly the same are found, by an exact likeness worked by hand."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from loopos.data import near_duplicates as near
from loopos.data.near_duplicates import near_duplicates
from tests.conftest import SENTENCES


def _jaccard(one: str, other: str) -> float:
    """Of sets of 5 characters in a row of the words in small letters, written by sets of strings."""
    import re

    sets = []
    for text in (one, other):
        plain = " ".join(re.findall(r"\w+", text.casefold()))
        sets.append({plain[index : index + 5] for index in range(len(plain) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("My card was charged twice for one order.", "my card  was charged twice for ONE order!!", True),
        ("the parcel came late and the box was open, again", "the parcel came late and the box was open", True),
        ("my card was charged twice for one order", "where is the invoice for march", False),
        ("荷物が遅れて届きました。箱が開いていた", "荷物が遅れて届きました、箱が開いていた", True),
        ("good", "good!", True),
        ("good", "bad", False),
        ("", "...", False),
    ],
)
def test_near_and_far(one: str, other: str, expected: bool) -> None:
    assert near_duplicates([one, other]).pairs == ([(1, 0)] if expected else [])


def test_it_finds_what_comparing_all_finds() -> None:
    draw = random.Random(0)
    texts = []
    for number in range(80):
        words = [word for sentence in draw.sample(SENTENCES, 3) for word in sentence.split()]
        texts.append(" ".join(words))
        if number % 5 == 0:
            words[draw.randrange(len(words))] = "changed"
            texts.append(" ".join(words))
    likeness = {(b, a): _jaccard(texts[a], texts[b]) for a, b in combinations(range(len(texts)), 2)}
    expected = {later for (later, _), value in likeness.items() if value >= near.NEAR}
    found = near_duplicates(texts).pairs
    assert all(likeness[pair] >= near.NEAR for pair in found)
    # A text that is near only one which itself has an earlier twin may go unseen; most do not.
    assert 12 < 0.9 * len(expected) <= len(found) <= len(expected)


def test_its_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST_TEXTS", 2)
    found = near_duplicates(["a good film", "another one", "a good film"])
    assert (found.pairs, found.compared) == ([], 2)
