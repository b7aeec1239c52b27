"""Split rows into training and validation, stratified by label and grouped by prompt or text.

Each row has a 64-bit key from NumPy's PCG64 (O'Neill 2014), whose raw output is the same on all platforms and versions,
unlike `permutation`; the smallest keys of each class validate. A group has the key of its first row. For other groups
(same author, same film) use `data.validation_data`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.config.diagnostics import DataError, Diagnostic

MAXIMUM_BINS = 10
Labels: TypeAlias = Sequence[int] | Sequence[float] | Sequence[Sequence[int]] | None


@dataclass(frozen=True, slots=True)
class Split:
    """Row indices of both sides, ascending; each row is in one. `summary`: how they were split."""

    train: list[int]
    validation: list[int]
    summary: str


def split_off(
    keys: Sequence[Hashable],
    fraction: float,
    seed: int,
    *,
    by: Literal["prompt", "row"],
    what: Literal["prompt", "text"] = "prompt",
    labels: Labels = None,
    source: str = "data",
) -> Split:
    """Splits rows into training and validation; rows of one key all go to one side.

    Where no key repeats, or `by` is "row", or all rows have one key, this is `stratified_split`. Else each class (bin,
    or all rows together) has the number of rows that `stratified_split` would give it, and fills it with whole groups:
    a group is taken where that comes closer to the number. Its class is that of its first row.

    Args:
        keys: the prompt or text of each row.
        what: name of a key in messages.
        labels: as for `stratified_split`.
    Raises:
        DataError: fewer than two rows.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    how = f"split off{' by label' if labels is not None else ''} with seed {seed}"
    if by == "prompt" and 1 < len(groups) < len(keys):
        train, validation = _whole_groups(list(groups.values()), labels, len(keys), fraction, seed)
        num_groups = len({keys[row] for row in validation})
        counted = f"{len(validation)} of the rows, those of {num_groups} of the {len(groups)} {what}s"
    else:
        train, validation = stratified_split(labels, fraction, seed, num_rows=len(keys), source=source)
        counted = f"{len(validation)} of the rows"
        if by == "prompt" and len(groups) == 1 and len(keys) > 1:
            how += f", row by row, since all rows have one {what}"
    return Split(train, validation, f"validation: {counted}, {how}; {len(train)} train")


def _whole_groups(
    groups: list[list[int]], labels: Labels, total: int, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """The rows of either side, where groups stay whole: at least one on each."""
    draws = _draws(seed, total)
    expected = _expected(fraction, total)
    first_labels = None if labels is None else [labels[group[0]] for group in groups]
    strata = _groups(first_labels, len(groups), _expected(fraction, len(groups)))  # type: ignore[arg-type]
    quotas = _quotas([sum(len(groups[index]) for index in stratum) for stratum in strata], expected)
    order = {index: (draws[group[0]], group[0]) for index, group in enumerate(groups)}
    chosen: set[int] = set()
    for stratum, quota in zip(strata, quotas, strict=True):
        taken = 0
        for index in sorted(stratum, key=order.__getitem__):
            size = len(groups[index])
            if abs(taken + size - quota) < abs(taken - quota) and len(chosen) < len(groups) - 1:
                chosen.add(index)
                taken += size
    if not chosen:
        chosen.add(min(range(len(groups)), key=lambda index: (len(groups[index]), order[index])))
    validation = {row for index in chosen for row in groups[index]}
    return [row for row in range(total) if row not in validation], sorted(validation)


def _draws(seed: int, count: int) -> list[int]:
    """The key of each row."""
    import numpy  # 50 ms that an error in the rows does not wait for

    draws: list[int] = numpy.random.PCG64(seed).random_raw(count).tolist()
    return draws


def _expected(fraction: float, total: int) -> int:
    """How many of `total` rows validate."""
    return min(max(1, math.floor(fraction * total + 0.5)), total - 1)


def stratified_split(
    labels: Labels,
    fraction: float,
    seed: int,
    *,
    num_rows: int | None = None,
    source: str = "data",
) -> tuple[list[int], list[int]]:
    """Splits rows into training and validation, keeping the mix of labels.

    Validation gets max(1, floor(fraction * N + 0.5)) of N rows, at most N - 1. Whole-number labels (classes) split it
    in proportion (largest remainders first), with at least one row of each class in validation and in training where a
    class has two rows and there is room; a class of one row trains, unless all are such. Floats (regression) do so by
    bins of equal size over their order; lists (multi-label) and None (no labels) are drawn at random.

    Args:
        labels: one per row; None with `num_rows` for rows without labels.
        fraction: fraction of the rows for validation, in (0, 1).
        seed: a whole number >= 0.
    Returns:
        Indices of the training and of the validation rows, both ascending; each row is in one.
    Raises:
        DataError: fewer than two rows.
    """
    assert 0 < fraction < 1, fraction
    assert labels is not None or num_rows is not None, "rows without labels need their number"
    total = len(labels) if labels is not None else num_rows
    assert total is not None
    if total < 2:
        actual = f"{total} row{'s' if total != 1 else ''}"
        hint = "add rows, or set data.validation_data"
        raise DataError(
            [Diagnostic(source, None, None, "data.validation_share", actual, "at least 2 rows to split", hint)]
        )
    expected = _expected(fraction, total)
    groups = _groups(labels, total, expected)
    keys = _draws(seed, total)
    validation: set[int] = set()
    for group, quota in zip(groups, _quotas([len(group) for group in groups], expected), strict=True):
        validation.update(sorted(group, key=lambda row: (keys[row], row))[:quota])
    return [row for row in range(total) if row not in validation], sorted(validation)


def _groups(labels: Labels, total: int, expected: int) -> list[list[int]]:
    """Rows by class, by bin, or all together."""
    if labels is None or any(isinstance(label, Sequence) for label in labels):
        return [list(range(total))]
    if all(isinstance(label, int) for label in labels):
        classes: dict[int, list[int]] = {}
        for row, label in enumerate(labels):
            assert isinstance(label, int)
            classes.setdefault(label, []).append(row)
        return [classes[label] for label in sorted(classes)]
    values = [float(label) for label in labels if not isinstance(label, Sequence)]
    ordered = sorted(range(total), key=lambda row: (values[row], row))
    bins = min(MAXIMUM_BINS, expected, total - expected)
    return [ordered[total * number // bins : total * (number + 1) // bins] for number in range(bins)]


def _quotas(sizes: Sequence[int], expected: int) -> list[int]:
    """How many rows of each group validate: `expected` in all, fewer if groups of one row leave no more."""
    most = [size - 1 for size in sizes] if any(size > 1 for size in sizes) else list(sizes)
    expected, total = min(expected, sum(most)), sum(sizes)
    quotas = [min(size * expected // total, limit) for size, limit in zip(sizes, most, strict=True)]
    if sum(limit > 0 for limit in most) <= expected:
        quotas = [max(quota, min(1, limit)) for quota, limit in zip(quotas, most, strict=True)]
    # The larger group goes first where two are equally far from their quota.
    groups = sorted(range(len(sizes)), key=lambda group: (-sizes[group], group))
    while sum(quotas) > expected:
        quotas[max((g for g in groups if quotas[g] > 1), key=lambda g: quotas[g] * total - sizes[g] * expected)] -= 1
    while sum(quotas) < expected:
        quotas[
            max((g for g in groups if quotas[g] < most[g]), key=lambda g: sizes[g] * expected - quotas[g] * total)
        ] += 1
    return quotas
