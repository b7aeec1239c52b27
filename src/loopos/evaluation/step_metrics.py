"""Metrics of a process reward model from the probabilities and labels of steps.

Apart from `preference_metrics`, whose rows are pairs. Letters: M labeled steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy

from loopos.evaluation.metrics import Floats, auroc

STEP_METRIC_DIRECTION: Mapping[str, Literal["min", "max"]] = {
    "loss": "min",
    "step_accuracy": "max",
    "step_auroc": "max",
    "first_error_accuracy": "max",
    "first_error_f1": "max",
}
"""Whether a higher value is better, for the metrics that may choose a checkpoint."""

Labels = Sequence[float | None]


def labeled(scores: Sequence[Sequence[float]], labels: Sequence[Labels]) -> tuple[Floats, Floats]:
    """Scores and labels of the labeled steps of all answers, each `[M]`."""
    pairs = [
        (score, label)
        for each, judged in zip(scores, labels, strict=True)
        for score, label in zip(each, judged, strict=True)
        if label is not None
    ]
    both = numpy.array(pairs, dtype=numpy.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def step_metrics(scores: Sequence[Sequence[float]], labels: Sequence[Labels]) -> dict[str, float]:
    """Metrics of the scores s of each answer's steps; σ(s) is the probability that a step is right. labels: those
    probabilities as people or a check gave them, None for steps that were not judged.

    num_steps: labeled steps · loss: mean −[y log σ(s) + (1 − y) log σ(−s)] in nats · right_steps: the fraction of
    labels above ½ · step_accuracy: the fraction of steps that s and y put on the same side of ½; undecided ones are
    half right · step_auroc: probability that a right step has a higher score than a wrong one; absent unless both occur
    · first_error_accuracy: the fraction of answers whose first wrong step is found, which includes finding none where
    there is none; of answers whose labels determine it · first_error_f1: harmonic mean of that accuracy over answers
    with an error and over those without (Zheng et al. 2024, ProcessBench); absent unless both occur. Raises
    ValueError without a labeled step.
    """
    score, label = labeled(scores, labels)
    if not len(score):
        raise ValueError("labels: got no labeled step; expected at least one")
    loss = label * numpy.logaddexp(0, -score) + (1 - label) * numpy.logaddexp(0, score)
    agrees = (numpy.sign(score) * numpy.sign(label - 0.5) + 1) / 2
    metrics = {
        "num_steps": float(len(score)),
        "loss": float(loss.mean()),
        "right_steps": float((label > 0.5).mean()),
        "step_accuracy": float(agrees.mean()),
    }
    right, decided = label > 0.5, label != 0.5
    if 0 < (right & decided).sum() < decided.sum():
        metrics["step_auroc"] = auroc(right[decided], score[decided])
    return metrics | _first_errors(scores, labels)


def first_error(labels: Labels) -> int | None:
    """The index of the first wrong step, len(labels) if there is none; None where a step before it was not judged, or
    cannot be called right or wrong.
    """
    for index, label in enumerate(labels):
        if label is None or label == 0.5:
            return None
        if label < 0.5:
            return index
    return len(labels)


def _first_errors(scores: Sequence[Sequence[float]], labels: Sequence[Labels]) -> dict[str, float]:
    """first_error_accuracy and first_error_f1."""
    found: dict[bool, list[bool]] = {True: [], False: []}
    for each, judged in zip(scores, labels, strict=True):
        true = first_error(judged)
        if true is not None:
            predicted = next((index for index, score in enumerate(each) if score < 0), len(each))
            found[true < len(judged)].append(predicted == true)
    every = found[True] + found[False]
    metrics = {"first_error_accuracy": sum(every) / len(every)} if every else {}
    if found[True] and found[False]:
        with_error, without = (sum(each) / len(each) for each in (found[True], found[False]))
        total = with_error + without
        metrics["first_error_f1"] = 2 * with_error * without / total if total else 0.0
    return metrics
