"""Metrics of classification, multi-label classification and regression, in NumPy: arrays → dict of name → float.

A metric that is not defined for its input (AUROC of one class, correlation with a constant) is absent, never nan. NumPy
keeps validation free of heavy imports; tests compare every figure with scikit-learn and SciPy.
Letters: N rows, C classes, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[numpy.float64]
Integers: TypeAlias = NDArray[numpy.int64]

METRIC_DIRECTION: Mapping[str, Literal["min", "max"]] = {
    "loss": "min",
    "accuracy": "max",
    "macro_f1": "max",
    "micro_f1": "max",
    "auroc": "max",
    "log_loss": "min",
    "ece": "min",
    "subset_accuracy": "max",
    "mae": "min",
    "rmse": "min",
    "r2": "max",
    "pearson": "max",
    "spearman": "max",
}

# For readers of reports; docs/metrics.md has the definitions.
METRIC_MEANING: Mapping[str, str] = {
    "accuracy": "fraction of correct rows",
    "macro_f1": "balance of precision and recall, with equal weight for every class",
    "micro_f1": "balance of precision and recall over all decisions together",
    "auroc": "chance that a row of a class gets a higher probability for it than a row of another; 0.5 is guessing",
    "log_loss": "how surprising the right answers are to the model, nats; 0 is certainty",
    "ece": "difference between stated probabilities and the fraction that is correct; 0 is perfect",
    "subset_accuracy": "fraction of rows with every label correct",
    "mae": "mean size of the errors, in the unit of the targets",
    "rmse": "like mae, with more weight on large errors",
    "r2": "fraction of the targets' variance that is explained; 0 is no better than their mean",
    "pearson": "linear correlation of predictions and targets",
    "spearman": "correlation of their ranks",
    "perplexity": "exp(loss): effective number of tokens that the model hesitates between",
    "pair_accuracy": "fraction of pairs whose preferred response scores higher",
    "step_accuracy": "fraction of steps that the model puts on the labels' side of one half",
    "step_auroc": "probability that a right step scores above a wrong one",
    "first_error_accuracy": "fraction of answers whose first wrong step is found, or found to be absent",
    "first_error_f1": "harmonic mean of first_error_accuracy with and without an error",
    "right_steps": "fraction of labeled steps that are right",
    "score_gap": "mean difference between the scores of the preferred and the other response",
}

NUM_CALIBRATION_BINS = 15

# A probability of 0 for what happened would cost infinity; scikit-learn's bound for float64.
_SMALLEST_PROBABILITY = float(numpy.finfo(numpy.float64).eps)


def classification_metrics(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Metrics of one class a row. `probabilities` [N, C], C >= 2, rows sum to 1; `labels` [N] in 0..C-1.

    accuracy · macro_f1 over the classes that occur among labels or predictions · micro_f1 · auroc of class 1 for C = 2,
    else one class against the rest, averaged over classes with rows of both kinds (absent if none has) · log_loss in
    nats · ece: sum over 15 bins of equal width (a, b] of the highest probability, |bin| / N * |accuracy - confidence|
    (Guo et al. 2017, section 2). Equal probabilities predict the lowest class. Raises ValueError on empty, non-finite
    or misshapen input.
    """
    scores = finite_floats("probabilities", probabilities, num_axes=2)
    truth = _class_indices(labels, num_rows=scores.shape[0], num_classes=scores.shape[1])
    rows = numpy.arange(len(truth))
    predicted = scores.argmax(axis=1)
    classes = numpy.arange(scores.shape[1])
    true_indicators = truth[:, None] == classes
    predicted_indicators = predicted[:, None] == classes
    occurs = true_indicators.any(axis=0) | predicted_indicators.any(axis=0)
    correct = predicted == truth
    metrics = {
        "accuracy": float(correct.mean()),
        "macro_f1": float(_f1(true_indicators, predicted_indicators)[occurs].mean()),
        "micro_f1": _micro_f1(true_indicators, predicted_indicators),
        "log_loss": float(-numpy.log(_away_from_zero(scores[rows, truth])).mean()),
        "ece": _expected_calibration_error(scores[rows, predicted], correct),
    }
    judged = [1] if scores.shape[1] == 2 else list(classes)
    _add_auroc(metrics, true_indicators[:, judged], scores[:, judged])
    return metrics


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> Integers:
    """Counts [C, C]: row = true class, column = predicted class. `labels` and `predictions` [N] in 0..C-1."""
    predicted = _class_indices(predictions, num_rows=numpy.shape(labels)[0], num_classes=num_classes)
    truth = _class_indices(labels, num_rows=len(predicted), num_classes=num_classes)
    flat = numpy.bincount(truth * num_classes + predicted, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes).astype(numpy.int64)


def multi_label_metrics(probabilities: ArrayLike, labels: ArrayLike, threshold: float = 0.5) -> dict[str, float]:
    """Metrics of any number of labels a row. `probabilities` [N, L] in [0, 1]; `labels` [N, L] of 0 and 1.

    A label is predicted at probability >= threshold. subset_accuracy: rows with every label right · micro_f1 over all
    cells · macro_f1 over all L labels (0 for one that neither occurs nor is predicted) · auroc averaged over labels
    with rows of both kinds (absent if none has) · log_loss: mean binary cross-entropy of a cell in nats. Raises
    ValueError on empty, non-finite or misshapen input.
    """
    scores = finite_floats("probabilities", probabilities, num_axes=2)
    actual = numpy.asarray(labels)
    if actual.shape != scores.shape:
        raise ValueError(f"labels: got shape {actual.shape}; expected the shape of probabilities, {scores.shape}")
    if not numpy.isin(actual, (0, 1)).all():
        raise ValueError("labels: got values other than 0 and 1")
    truth = actual.astype(bool)
    predicted = scores >= threshold
    likelihood = _away_from_zero(numpy.where(truth, scores, 1.0 - scores))
    metrics = {
        "subset_accuracy": float((truth == predicted).all(axis=1).mean()),
        "micro_f1": _micro_f1(truth, predicted),
        "macro_f1": float(_f1(truth, predicted).mean()),
        "log_loss": float(-numpy.log(likelihood).mean()),
    }
    _add_auroc(metrics, truth, scores)
    return metrics


def regression_metrics(predictions: ArrayLike, targets: ArrayLike) -> dict[str, float]:
    """Metrics of one number a row, both [N], mae and rmse in the unit of the targets.

    r2 = 1 - squared errors / squared deviations of the targets, absent for constant targets; pearson and spearman
    (ties share their mean rank), absent if either side is constant. Raises ValueError on empty, non-finite or
    misshapen input.
    """
    predicted = finite_floats("predictions", predictions, num_axes=1)
    truth = finite_floats("targets", targets, num_axes=1)
    if predicted.shape != truth.shape:
        raise ValueError(f"got {len(predicted)} predictions for {len(truth)} targets; expected one for each")
    errors = predicted - truth
    metrics = {"mae": float(numpy.abs(errors).mean()), "rmse": float(numpy.sqrt(numpy.square(errors).mean()))}
    if numpy.ptp(truth) > 0:
        scale = numpy.abs(truth - truth.mean()).max()
        deviations = numpy.square((truth - truth.mean()) / scale).sum()
        metrics["r2"] = float(1.0 - numpy.square(errors / scale).sum() / deviations)
        if numpy.ptp(predicted) > 0:
            metrics["pearson"] = correlation(predicted, truth)
            metrics["spearman"] = correlation(_ranks(predicted), _ranks(truth))
    return metrics


def finite_floats(name: str, values: ArrayLike, num_axes: int) -> Floats:
    """The values as 64-bit floats with `num_axes` axes. Raises ValueError, with `name`, for another number of axes, no
    values, nan or inf.
    """
    array = numpy.asarray(values, dtype=numpy.float64)
    if array.ndim != num_axes:
        raise ValueError(f"{name}: got shape {array.shape}; expected {num_axes} axes")
    if array.size == 0:
        raise ValueError(f"{name}: got no rows; expected at least one")
    num_bad = int((~numpy.isfinite(array)).sum())
    if num_bad:
        raise ValueError(f"{name}: {num_bad} of {array.size} values are nan or inf")
    return array


def _class_indices(labels: ArrayLike, num_rows: int, num_classes: int) -> Integers:
    array = numpy.asarray(labels)
    if array.shape != (num_rows,):
        raise ValueError(f"labels: got shape {array.shape}; expected ({num_rows},)")
    if num_rows == 0:
        raise ValueError("labels: got no rows; expected at least one")
    if num_classes < 2:
        raise ValueError(f"got {num_classes} classes; expected at least 2")
    if not numpy.issubdtype(array.dtype, numpy.integer):
        raise ValueError(f"labels: got type {array.dtype}; expected integers")
    if array.min() < 0 or array.max() >= num_classes:
        raise ValueError(f"labels: got values from {array.min()} to {array.max()}; expected 0 to {num_classes - 1}")
    return array.astype(numpy.int64)


def _away_from_zero(probabilities: Floats) -> Floats:
    return numpy.clip(probabilities, _SMALLEST_PROBABILITY, 1.0)


def _f1(truth: NDArray[numpy.bool_], predicted: NDArray[numpy.bool_]) -> Floats:
    """F1 of each column: 2 * both / (true + predicted), 0 for a column without either."""
    both = (truth & predicted).sum(axis=0)
    either = truth.sum(axis=0) + predicted.sum(axis=0)
    columns: Floats = 2.0 * both / numpy.maximum(either, 1)
    return columns


def _micro_f1(truth: NDArray[numpy.bool_], predicted: NDArray[numpy.bool_]) -> float:
    return float(_f1(truth.reshape(-1, 1), predicted.reshape(-1, 1))[0])


def _expected_calibration_error(confidence: Floats, correct: NDArray[numpy.bool_]) -> float:
    bins = numpy.clip(
        numpy.ceil(confidence * NUM_CALIBRATION_BINS).astype(numpy.int64) - 1, 0, NUM_CALIBRATION_BINS - 1
    )
    surplus = numpy.bincount(bins, weights=confidence - correct, minlength=NUM_CALIBRATION_BINS)
    return float(numpy.abs(surplus).sum() / len(confidence))


def _add_auroc(metrics: dict[str, float], truth: NDArray[numpy.bool_], scores: Floats) -> None:
    judged = [column for column in range(truth.shape[1]) if 0 < truth[:, column].sum() < len(truth)]
    if judged:
        metrics["auroc"] = float(numpy.mean([auroc(truth[:, column], scores[:, column]) for column in judged]))


def auroc(truth: NDArray[numpy.bool_], scores: Floats) -> float:
    """Probability that a true row's score is above a false row's, ties half (Mann and Whitney 1947)."""
    num_true = int(truth.sum())
    rank_sum = _ranks(scores)[truth].sum()
    return float((rank_sum - num_true * (num_true + 1) / 2) / (num_true * (len(truth) - num_true)))


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, positions, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    mean_ranks: Floats = numpy.cumsum(counts) - (counts - 1) / 2.0
    return mean_ranks[positions]


def correlation(left: Floats, right: Floats) -> float:
    """Pearson's r of two columns that are not constant."""
    units = []
    for values in (left, right):
        deviations = values - values.mean()
        # Scaled first, so that squares of very small or large deviations neither vanish nor overflow.
        deviations = deviations / numpy.abs(deviations).max()
        units.append(deviations / numpy.sqrt(numpy.square(deviations).sum()))
    return float(numpy.clip((units[0] * units[1]).sum(), -1.0, 1.0))
