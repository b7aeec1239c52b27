"""The split into training and validation rows: sizes by hand, classes kept, the same on every machine."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.config.diagnostics import DataError
from loopos.data.split import split_off, stratified_split


@pytest.mark.parametrize(
    ("sizes", "share", "validation"),
    [
        ({0: 50, 1: 50}, 0.1, {0: 5, 1: 5}),
        ({0: 90, 1: 10}, 0.1, {0: 9, 1: 1}),
        ({0: 96, 1: 4}, 0.1, {0: 9, 1: 1}),
        ({0: 97, 1: 2, 2: 1}, 0.1, {0: 9, 1: 1}),
        ({0: 3, 1: 2}, 0.9, {0: 2, 1: 1}),
        ({0: 6, 1: 3}, 1 / 3, {0: 2, 1: 1}),
        ({0: 5, 1: 3, 2: 2}, 0.2, {0: 1, 1: 1}),
        ({0: 1, 1: 1, 2: 1, 3: 1}, 0.5, {0: 1, 1: 1}),
    ],
)
def test_classes_share_validation(sizes: dict[int, int], share: float, validation: dict[int, int]) -> None:
    labels = [label for label, size in sizes.items() for _ in range(size)]
    training, chosen = stratified_split(labels, share, 42)
    assert Counter(labels[row] for row in chosen) == validation
    assert sorted([*training, *chosen]) == list(range(len(labels)))


def test_the_draw_is_fixed() -> None:
    # The first raw outputs of PCG64 seeded with 42; the two smallest of them are those of rows 1 and 3.
    keys = [14276969152011380360, 8095878257575067585, 15838336090824644132, 12864169557245331597]
    assert numpy.random.PCG64(42).random_raw(4).tolist() == keys
    assert stratified_split(None, 0.5, 42, num_rows=4) == ([0, 2], [1, 3])


def test_seeds_differ_and_repeat() -> None:
    labels = [row % 3 for row in range(300)]
    assert stratified_split(labels, 0.2, 1) == stratified_split(labels, 0.2, 1)
    assert stratified_split(labels, 0.2, 1) != stratified_split(labels, 0.2, 2)


def test_regression_takes_from_the_whole_range() -> None:
    labels = [float((row * 37) % 100) + 0.5 for row in range(100)]
    _, validation = stratified_split(labels, 0.1, 7)
    assert sorted(int(labels[row] // 10) for row in validation) == list(range(10))


def test_multi_label_rows_are_drawn_plainly() -> None:
    labels = [[row % 2, 1] for row in range(10)]
    assert stratified_split(labels, 0.3, 5) == stratified_split(None, 0.3, 5, num_rows=10)
    assert len(stratified_split(labels, 0.3, 5)[1]) == 3


@pytest.mark.parametrize("labels", [[], [1]])
def test_too_few_rows(labels: list[int]) -> None:
    with pytest.raises(DataError, match="at least 2 rows to split") as caught:
        stratified_split(labels, 0.1, 42, source="rows.csv")
    assert (caught.value.diagnostics[0].source, caught.value.diagnostics[0].field) == (
        "rows.csv",
        "data.validation_share",
    )


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=2, max_size=60),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_every_row_once_and_every_class_where_there_is_room(labels: list[int], share: float, seed: int) -> None:
    training, validation = stratified_split(labels, share, seed)
    assert sorted([*training, *validation]) == list(range(len(labels)))
    assert training == sorted(training)
    assert validation == sorted(validation)
    assert training
    assert validation
    sizes = Counter(labels)
    pairs = {label for label, size in sizes.items() if size >= 2}
    if pairs:
        assert pairs <= {labels[row] for row in training}
    expected = min(max(1, int(share * len(labels) + 0.5)), len(labels) - 1)
    most = sum(size - 1 for size in sizes.values())
    assert len(validation) == (min(expected, most) if pairs else expected)
    if len(pairs) <= len(validation):
        assert pairs <= {labels[row] for row in validation}


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.floats(-5, 5), min_size=2, max_size=40), share=st.floats(0.01, 0.99))
def test_regression_gets_its_validation_fraction(labels: list[float], share: float) -> None:
    training, validation = stratified_split(labels, share, 3)
    assert sorted([*training, *validation]) == list(range(len(labels)))
    assert len(validation) == min(max(1, int(share * len(labels) + 0.5)), len(labels) - 1)


def test_all_rows_of_a_prompt_go_to_one_side() -> None:
    """24 prompts with six pairs each, as collected from people: 29 of 144 rows are expected, and five prompts have 30."""
    keys = [f"prompt {row % 24}" for row in range(144)]
    found = split_off(keys, 0.2, 42, by="prompt")
    asked = {keys[row] for row in found.validation}
    assert len(found.validation) == 30
    assert len(asked) == 5
    assert asked.isdisjoint(keys[row] for row in found.train)
    assert sorted([*found.train, *found.validation]) == list(range(144))
    assert found.summary == (
        "validation: 30 of the rows, those of 5 of the 24 prompts, split off with seed 42; 114 train"
    )
    # By row every prompt is on both sides.
    rows = split_off(keys, 0.2, 42, by="row")
    assert len(rows.validation) == 29
    assert {keys[row] for row in rows.validation} <= {keys[row] for row in rows.train}


@pytest.mark.parametrize("labels", [None, [row % 3 for row in range(60)], [row / 7 for row in range(60)]])
def test_rows_without_repeats_are_split_as_ever(labels: list[int] | list[float] | None) -> None:
    """Runs that began before prompts were kept together resume with the same rows."""
    found = split_off(list(range(60)), 0.1, 7, by="prompt", labels=labels)
    assert (found.train, found.validation) == stratified_split(labels, 0.1, 7, num_rows=60)


def test_groups_keep_the_mix_of_labels() -> None:
    """90 rows of class 0 and 10 of class 1, every text twice: 10 validate, 9 and 1 by row, whole pairs here."""
    keys, labels = [row // 2 for row in range(100)], [int(row >= 90) for row in range(100)]
    found = split_off(keys, 0.1, 42, by="prompt", what="text", labels=labels)
    counted = Counter(labels[row] for row in found.validation)
    assert counted in ({0: 8, 1: 2}, {0: 10, 1: 2}, {0: 8}, {0: 10})
    assert {keys[row] for row in found.validation}.isdisjoint(keys[row] for row in found.train)
    assert "split off by label with seed 42" in found.summary


@pytest.mark.parametrize(
    ("sizes", "share", "validation"),
    [
        # A group over the share stays in training.
        ([90, 5, 5], 0.1, {5}),
        ([50, 50], 0.1, {50}),
        ([1, 99], 0.5, {1}),
        ([99, 1], 0.9, {99}),
    ],
)
def test_uneven_groups(sizes: list[int], share: float, validation: set[int]) -> None:
    keys = [index for index, size in enumerate(sizes) for _ in range(size)]
    found = split_off(keys, share, 3, by="prompt")
    assert found.train
    assert found.validation
    assert {sizes[keys[row]] for row in found.validation} == validation


def test_rows_of_one_prompt_are_split_by_row_and_it_is_reported() -> None:
    found = split_off(["same"] * 10, 0.2, 42, by="prompt")
    assert (len(found.train), len(found.validation)) == (8, 2)
    assert "row by row, since all rows have one prompt" in found.summary


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.integers(0, 9), min_size=2, max_size=60),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
    classes=st.integers(1, 3),
)
def test_both_sides_have_whole_groups(keys: list[int], share: float, seed: int, classes: int) -> None:
    labels = [key % classes for key in keys] if classes > 1 else None
    found = split_off(keys, share, seed, by="prompt", labels=labels)
    assert found.train
    assert found.validation
    assert sorted([*found.train, *found.validation]) == list(range(len(keys)))
    if len(set(keys)) > 1:
        assert {keys[row] for row in found.validation}.isdisjoint(keys[row] for row in found.train)
