"""Metrics of a reward model from scored comparisons, and their tables for the log and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from loopos.data.preference_tokens import EncodedComparison
from loopos.evaluation.blocks import Block, Grid, Heading, Paragraph, shown
from loopos.evaluation.metrics import Floats
from loopos.evaluation.preference_metrics import margin_buckets, preference_metrics, reliability

Scores = Sequence[Sequence[Sequence[float]]]
"""For every comparison and every response: a score from each head."""


@dataclass(frozen=True)
class _Pairs:
    """Every pair of every comparison, one column each."""

    better: list[float]
    worse: list[float]
    probabilities: list[float]
    margins: list[float]
    better_lengths: list[int]
    worse_lengths: list[int]


def measured(rows: Sequence[EncodedComparison], scores: Scores) -> dict[str, float]:
    """The metrics of `preference_metrics`; the score of a response is the mean over its heads."""
    pairs = _pairs(rows, scores)
    return preference_metrics(
        pairs.better,
        pairs.worse,
        probabilities=pairs.probabilities,
        margins=pairs.margins if any(pairs.margins) else None,
        better_lengths=pairs.better_lengths,
        worse_lengths=pairs.worse_lengths,
    )


def preferred_scores(rows: Sequence[EncodedComparison], scores: Scores) -> tuple[Floats, Floats]:
    """Scores `[P]` of the preferred response of each pair and of the other one."""
    pairs = _pairs(rows, scores)
    better, worse = numpy.array(pairs.better), numpy.array(pairs.worse)
    is_turned = numpy.array(pairs.probabilities) < 0.5
    return numpy.where(is_turned, worse, better), numpy.where(is_turned, better, worse)


def bucket_tables(rows: Sequence[EncodedComparison], scores: Scores) -> dict[str, Any]:
    """Accuracy by margin (if the rows have margins) and the calibration curve of σ(Δ)."""
    pairs = _pairs(rows, scores)
    buckets = margin_buckets(pairs.better, pairs.worse, pairs.margins) if any(pairs.margins) else []
    curve = reliability(pairs.better, pairs.worse, pairs.probabilities)
    return {
        "by_margin": [dataclasses.asdict(bucket) for bucket in buckets],
        "calibration": [dataclasses.asdict(each) for each in curve],
    }


def preference_blocks(events: Sequence[Mapping[str, Any]]) -> list[Block]:
    """A reward model's part of a report, from the last event "preferences"; nothing without one."""
    found = [event["metrics"] for event in events if event["event"] == "preferences"]
    if not found:
        return []
    parts: list[Block] = [Heading("Preferences")]
    if found[-1]["by_margin"]:
        rows = [
            (
                f"{shown(each['low'])} to {shown(each['high'])}",
                str(each["pairs"]),
                f"{each['accuracy']:.3f} ({each['accuracy_low']:.3f} to {each['accuracy_high']:.3f})",
            )
            for each in found[-1]["by_margin"]
        ]
        parts += [
            Paragraph("Accuracy by margin, with its 95% interval."),
            Grid(("margin", "pairs", "pair accuracy"), rows, numbers=(1,)),
        ]
    rows = [
        (f"{each['confidence']:.3f}", f"{each['frequency']:.3f}", str(each["pairs"]))
        for each in found[-1]["calibration"]
    ]
    parts.append(
        Paragraph("Calibration: how often the first of two is preferred at the probability that the model predicts.")
    )
    return [*parts, Grid(("predicted probability", "preferred", "pairs, both orders"), rows, numbers=range(3))]


def _pairs(rows: Sequence[EncodedComparison], scores: Scores) -> _Pairs:
    found = _Pairs([], [], [], [], [], [])
    for row, responses in zip(rows, scores, strict=True):
        means = [sum(heads) / len(heads) for heads in responses]
        lengths = [len(response) for response in row.responses]
        for pair in row.pairs:
            found.better.append(means[pair.better])
            found.worse.append(means[pair.worse])
            found.probabilities.append(pair.probability)
            found.margins.append(pair.margin)
            found.better_lengths.append(lengths[pair.better])
            found.worse_lengths.append(lengths[pair.worse])
    return found
