"""Metrics: hand-worked figures, and scikit-learn's and SciPy's for random input."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy
import pytest
import scipy.stats
import sklearn.metrics

from loopos.evaluation.metrics import (
    METRIC_DIRECTION,
    classification_metrics,
    confusion_matrix,
    multi_label_metrics,
    regression_metrics,
)


def test_classification_by_hand() -> None:
    # True 0 0 1 1 2, predicted 0 1 1 1 0.
    probabilities = [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]
    metrics = classification_metrics(probabilities, [0, 0, 1, 1, 2])
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["micro_f1"] == pytest.approx(3 / 5)
    # F1: class 0 2·1/(2+2), class 1 2·2/(2+3), class 2 0.
    assert metrics["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    # Pairs won: class 0 .7 beats 3 others, .3 beats 2 of 3: 5/6; class 1 .8 beats 3, .5 beats 2: 5/6;
    # class 2 .25 beats 3 and ties one: 3.5/4.
    assert metrics["auroc"] == pytest.approx((5 / 6 + 5 / 6 + 3.5 / 4) / 3)
    assert metrics["log_loss"] == pytest.approx(-math.log(0.7 * 0.3 * 0.8 * 0.5 * 0.25) / 5)
    # Each confidence alone in its bin, but the two of 0.5, of which one is right.
    assert metrics["ece"] == pytest.approx((0.3 + 0.6 + 0.2 + 2 * abs(0.5 - 0.5)) / 5)
    assert sorted(metrics) == ["accuracy", "auroc", "ece", "log_loss", "macro_f1", "micro_f1"]


def test_binary_auroc_is_that_of_class_one() -> None:
    metrics = classification_metrics([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]], [0, 0, 1, 1])
    assert metrics["auroc"] == pytest.approx(3 / 4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_classification_equals_scikit_learn(num_classes: int, seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    labels = generator.integers(0, num_classes, 60)
    probabilities = generator.dirichlet(numpy.ones(num_classes), 60).round(2)
    probabilities[:, 0] += 1 - probabilities.sum(axis=1)
    probabilities = numpy.abs(probabilities) / numpy.abs(probabilities).sum(axis=1, keepdims=True)
    metrics = classification_metrics(probabilities, labels)
    predicted = probabilities.argmax(axis=1)
    assert metrics["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert metrics["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    assert metrics["micro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="micro"))
    assert metrics["log_loss"] == pytest.approx(
        sklearn.metrics.log_loss(labels, probabilities, labels=range(num_classes))
    )
    assert len(set(labels)) == num_classes
    if num_classes == 2:
        expected = sklearn.metrics.roc_auc_score(labels, probabilities[:, 1])
    else:
        expected = sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert metrics["auroc"] == pytest.approx(expected)


def test_classes_that_never_occur_do_not_count() -> None:
    # Class 2 is neither true nor predicted; class 3 is predicted only and has an F1 of 0.
    probabilities = numpy.eye(4)[[0, 1, 3]]
    metrics = classification_metrics(probabilities, [0, 1, 1])
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics["macro_f1"] == pytest.approx(sklearn.metrics.f1_score([0, 1, 1], [0, 1, 3], average="macro"))
    # Class 0 is told apart fully, class 1 ties one true row with the false one at 0.
    assert metrics["auroc"] == pytest.approx((1 + 0.75) / 2)


def test_a_single_class_has_no_auroc_and_a_certain_error_a_finite_loss() -> None:
    metrics = classification_metrics([[1.0, 0.0], [0.5, 0.5]], [1, 1])
    assert "auroc" not in metrics
    assert metrics["log_loss"] == pytest.approx((36.04365338911715 + math.log(2)) / 2)
    assert metrics["accuracy"] == 0.0


def test_calibration_error_by_hand_and_at_the_edges_of_the_bins() -> None:
    # Bin (0.8, 0.866…] holds both 0.82 and 0.86: |0.84 - 0.5| · 2; 0.9 alone: |0.9 - 1|; 1.0 belongs to the last bin.
    confidence = numpy.array([0.82, 0.86, 0.9, 1.0])
    probabilities = numpy.stack([confidence, 1 - confidence], axis=1)
    assert classification_metrics(probabilities, [0, 1, 0, 0])["ece"] == pytest.approx((2 * 0.34 + 0.1 + 0) / 4)
    # 0.6 = 9/15 closes the ninth bin; 0.61 opens the tenth: errors of both signs do not cancel across the edge.
    confidence = numpy.array([0.6, 0.61])
    probabilities = numpy.stack([confidence, 1 - confidence], axis=1)
    assert classification_metrics(probabilities, [0, 1])["ece"] == pytest.approx((0.4 + 0.61) / 2)


def test_perfect_and_certain_predictions() -> None:
    metrics = classification_metrics(numpy.eye(3), [0, 1, 2])
    assert metrics == {"accuracy": 1, "macro_f1": 1, "micro_f1": 1, "auroc": 1, "log_loss": 0, "ece": 0}


def test_confusion_matrix_rows_are_true_classes() -> None:
    matrix = confusion_matrix([0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 0, 2], num_classes=4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]


def test_confusion_matrix_equals_scikit_learn() -> None:
    generator = numpy.random.default_rng(0)
    labels, predicted = generator.integers(0, 7, (2, 200))
    expected = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(7))
    assert confusion_matrix(labels, predicted, 7).tolist() == expected.tolist()


def test_multi_label_by_hand() -> None:
    probabilities = [[0.9, 0.5, 0.1], [0.2, 0.7, 0.3], [0.4, 0.1, 0.2]]
    labels = [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    # Predicted at 0.5 and above: 110, 010, 000. Right rows: the first. Columns: F1 2/3, 2/3, 0.
    metrics = multi_label_metrics(probabilities, labels)
    assert metrics["subset_accuracy"] == pytest.approx(1 / 3)
    assert metrics["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    # Column 0: .9 and .4 over .2; column 1: .5 over .1, under .7; column 2 has no true row.
    assert metrics["auroc"] == pytest.approx((1.0 + 0.5) / 2)
    assert metrics["log_loss"] == pytest.approx(-math.log(0.9 * 0.5 * 0.9 * 0.8 * 0.3 * 0.7 * 0.4 * 0.9 * 0.8) / 9)
    assert multi_label_metrics(probabilities, labels, threshold=0.4)["subset_accuracy"] == pytest.approx(2 / 3)
    assert len(metrics) == 5


@pytest.mark.parametrize("seed", range(3))
def test_multi_label_equals_scikit_learn(seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    labels = generator.integers(0, 2, (50, 6))
    probabilities = generator.random((50, 6)).round(2)
    predicted = probabilities >= 0.3
    metrics = multi_label_metrics(probabilities, labels, threshold=0.3)
    assert metrics["subset_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert metrics["micro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="micro"))
    assert metrics["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    assert metrics["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, probabilities, average="macro"))
    assert metrics["log_loss"] == pytest.approx(sklearn.metrics.log_loss(labels.ravel(), probabilities.ravel()))


def test_regression_by_hand() -> None:
    metrics = regression_metrics([2.0, 4.0, 9.0], [1.0, 5.0, 6.0])
    assert metrics["mae"] == pytest.approx(5 / 3)
    assert metrics["rmse"] == pytest.approx(math.sqrt(11 / 3))
    # Targets deviate from their mean 4 by -3, 1, 2; predictions from 5 by -3, -1, 4.
    assert metrics["r2"] == pytest.approx(1 - 11 / 14)
    assert metrics["pearson"] == pytest.approx((9 - 1 + 8) / math.sqrt(14 * 26))
    assert metrics["spearman"] == pytest.approx(1.0)


def test_spearman_gives_ties_their_mean_rank() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: deviations (-1.5, 0, 0, 1.5) and (-1.5, -.5, .5, 1.5).
    metrics = regression_metrics([0.0, 3.0, 3.0, 99.0], [1.0, 2.0, 3.0, 4.0])
    assert metrics["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))


@pytest.mark.parametrize("seed", range(4))
def test_regression_equals_scikit_learn_and_scipy(seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    targets = generator.normal(3.0, 2.0, 80).round(1)
    predictions = (targets + generator.normal(0, 1, 80)).round(1)
    metrics = regression_metrics(predictions, targets)
    assert metrics["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(targets, predictions))
    assert metrics["rmse"] == pytest.approx(sklearn.metrics.root_mean_squared_error(targets, predictions))
    assert metrics["r2"] == pytest.approx(sklearn.metrics.r2_score(targets, predictions))
    assert metrics["pearson"] == pytest.approx(scipy.stats.pearsonr(targets, predictions).statistic)
    assert metrics["spearman"] == pytest.approx(scipy.stats.spearmanr(targets, predictions).statistic)


@pytest.mark.parametrize(
    ("predictions", "targets", "present"),
    [
        ([1.0, 2.0], [3.0, 3.0], ["mae", "rmse"]),
        ([1.0, 1.0], [2.0, 3.0], ["mae", "r2", "rmse"]),
        ([1.0], [2.0], ["mae", "rmse"]),
        ([1.0, 2.0], [2.0, 3.0], ["mae", "pearson", "r2", "rmse", "spearman"]),
    ],
)
def test_what_is_undefined_is_absent(predictions: list[float], targets: list[float], present: list[str]) -> None:
    metrics = regression_metrics(predictions, targets)
    assert sorted(metrics) == present
    assert metrics["mae"] == pytest.approx(numpy.abs(numpy.subtract(predictions, targets)).mean())


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e150])
def test_scale_free_metrics_survive_any_unit(scale: float) -> None:
    metrics = regression_metrics(numpy.array([2.0, 4.0, 9.0]) * scale, numpy.array([1.0, 5.0, 6.0]) * scale)
    assert metrics["r2"] == pytest.approx(1 - 11 / 14)
    assert metrics["pearson"] == pytest.approx(16 / math.sqrt(14 * 26))


def test_single_precision_input_is_worked_in_double() -> None:
    probabilities = numpy.array([[0.1, 0.9], [0.8, 0.2]], dtype=numpy.float32)
    metrics = classification_metrics(probabilities, numpy.array([1, 0], dtype=numpy.int32))
    assert metrics["log_loss"] == pytest.approx(-math.log(0.9 * 0.8) / 2, rel=1e-6)
    assert all(type(value) is float for value in metrics.values())


TWO_ROWS = [[0.5, 0.5], [0.2, 0.8]]


@pytest.mark.parametrize(
    ("call", "summary"),
    [
        (lambda: classification_metrics(numpy.empty((0, 3)), []), "no rows"),
        (lambda: multi_label_metrics(numpy.empty((0, 3)), numpy.empty((0, 3))), "no rows"),
        (lambda: regression_metrics([], []), "no rows"),
        (lambda: confusion_matrix([], [], 3), "no rows"),
        (lambda: classification_metrics([0.5, 0.5], [0, 1]), "expected 2 axes"),
        (lambda: classification_metrics([[1.0], [1.0]], [0, 0]), "at least 2"),
        (lambda: classification_metrics(TWO_ROWS, [0, 2]), "from 0 to 2; expected 0 to 1"),
        (lambda: classification_metrics(TWO_ROWS, [-1, 1]), "from -1 to 1;"),
        (lambda: classification_metrics(TWO_ROWS, [0]), "expected \\(2,\\)"),
        (lambda: classification_metrics(TWO_ROWS, [0.0, 1.0]), "expected integers"),
        (lambda: classification_metrics([[float("nan"), 0.5], [0.2, 0.8]], [0, 1]), "1 of 4 values are nan or inf"),
        (lambda: multi_label_metrics(TWO_ROWS, [[0, 1]]), "expected the shape of probabilities"),
        (lambda: multi_label_metrics(TWO_ROWS, [[0, 1], [2, 0]]), "values other than 0 and 1"),
        (lambda: regression_metrics([1.0, 2.0], [1.0]), "2 predictions for 1 targets"),
        (lambda: regression_metrics([1.0, 2.0], [1.0, float("inf")]), "targets: 1 of 2"),
        (lambda: confusion_matrix([0, 1], [0, 3], 3), "from 0 to 3;"),
        (lambda: confusion_matrix([0, 1], [0], 3), "expected \\(2,\\)"),
    ],
)
def test_unusable_input_is_refused(call: Any, summary: str) -> None:
    with pytest.raises(ValueError, match=summary):
        call()


def test_every_metric_has_a_direction() -> None:
    produced = {
        *classification_metrics(TWO_ROWS, [0, 1]),
        *multi_label_metrics(TWO_ROWS, [[0, 1], [1, 0]]),
        *regression_metrics([1.0, 2.0], [2.0, 4.0]),
    }
    assert len(produced) == 12
    assert set(METRIC_DIRECTION) == produced | {"loss"}
    lower_is_better = {name for name, direction in METRIC_DIRECTION.items() if direction == "min"}
    assert lower_is_better == {"loss", "log_loss", "ece", "mae", "rmse"}


def test_directions_are_known_without_torch_or_scikit_learn() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from loopos.evaluation.metrics import METRIC_DIRECTION\n"
        "print([name for name in ('torch', 'sklearn', 'scipy') if name in sys.modules], len(METRIC_DIRECTION))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 13"
