"""Digests of what was learned from: equal for equal batches, another one for each thing that a batch holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from loopos.data.digest import comparisons_digest, prompts_digest, rows_digest, text_digest, tokenizer_digest
from loopos.data.preference_tokens import EncodedComparison
from loopos.data.preferences import Pair
from loopos.data.tokens import Encoded

ROWS = [Encoded([5, 6, 7], None, 0, 0, [0.0, 1.0, 1.0]), Encoded([8, 9], None, 1, 0, [0.0, 1.0])]
PAIRS = [
    EncodedComparison([1, 2], [[3, 4], [5]], (Pair(0, 1),), 0),
    EncodedComparison([6], [[7], [8]], (Pair(1, 0),), 1),
]


def all_differ(digests: list[str]) -> bool:
    return len(set(digests)) == len(digests) and all(len(digest) == 64 for digest in digests)


def test_of_rows_each_id_each_border_each_weight_and_the_order_count() -> None:
    targets = torch.tensor([0, 1])
    one, two = ROWS
    assert rows_digest([replace(one, index=9, cut=3), two]) == rows_digest(ROWS)
    assert all_differ(
        [
            rows_digest(ROWS),
            rows_digest(ROWS[::-1]),
            rows_digest(ROWS[:1]),
            rows_digest([replace(one, ids=[5, 6, 1]), two]),
            rows_digest([replace(one, ids=[5, 6], weights=[0.0, 1.0]), replace(two, ids=[7, 8, 9], weights=[1.0] * 3)]),
            rows_digest([replace(one, weights=[0.0, 0.0, 1.0]), two]),
            rows_digest([replace(one, weights=None), replace(two, weights=None)]),
            rows_digest([replace(one, token_types=[0, 0, 1]), two]),
            rows_digest(ROWS, targets),
            rows_digest(ROWS, targets.flip(0)),
            rows_digest(ROWS, targets.float()),
        ]
    )


def test_comparisons_are_identified_by_prompt_responses_winner_and_margin() -> None:
    one, two = PAIRS
    assert comparisons_digest([replace(one, index=4), two]) == comparisons_digest(PAIRS)
    assert all_differ(
        [
            comparisons_digest(PAIRS),
            comparisons_digest(PAIRS[::-1]),
            comparisons_digest([replace(one, responses=[[5], [3, 4]]), two]),
            comparisons_digest([replace(one, prompt=[1], responses=[[2, 3, 4], [5]]), two]),
            comparisons_digest([replace(one, pairs=(Pair(1, 0),)), two]),
            comparisons_digest([replace(one, pairs=(Pair(0, 1, margin=2.0),)), two]),
            comparisons_digest([replace(one, pairs=(Pair(0, 1, probability=0.9),)), two]),
        ]
    )


def test_of_prompts_the_ids_their_borders_and_the_order_count() -> None:
    assert prompts_digest([[1, 2], [3]]) == prompts_digest([(1, 2), (3,)])
    assert all_differ([prompts_digest(each) for each in ([[1, 2], [3]], [[3], [1, 2]], [[1], [2, 3]], [[1, 2, 3]], [])])


def test_of_a_tokenizer_what_each_id_means_counts(pico_tokenizer: Path) -> None:
    tokenizer, other = (AutoTokenizer.from_pretrained(pico_tokenizer) for _ in range(2))
    tokenizer("texts that were cut leave no trace", truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == tokenizer_digest(other)
    other.add_tokens(["<step>"])
    assert tokenizer_digest(tokenizer) != tokenizer_digest(other)
    assert text_digest("\ud800") != text_digest("?")
