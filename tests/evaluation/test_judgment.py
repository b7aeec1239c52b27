"""Labeled rows compared with predictions: the figures of each class, and the order of the mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from loopos.data.formats import Labeled
from loopos.data.label_space import LabelSpace
from loopos.data.labels import infer_task
from loopos.data.reading import DataReport
from loopos.data.rows import Row
from loopos.evaluation.judgment import Judgment


def judgment(labels: Sequence[Any], meaning: Any, *, task: Any, space: LabelSpace | None = None) -> Judgment:
    examples = [Labeled(f"text {i}", None, label, Row({}, "rows.jsonl", i + 1, i)) for i, label in enumerate(labels)]
    space = space or infer_task(examples, task)
    targets = [space.encode(example.label, example.row, "label") for example in examples]
    report = DataReport(read=len(examples), used=len(examples))
    return Judgment(space, examples, targets, np.asarray(meaning, dtype=float), report, DataReport(), 0.5)


def test_the_figures_of_classes_are_scikit_learn_s() -> None:
    random = np.random.default_rng(3)
    names = np.array(["a", "b", "c", "d"])
    labels = random.choice(names[:3], 60).tolist()
    space = infer_task([Labeled("t", None, name, Row({}, "f", 1, 0)) for name in names], "classification")
    probabilities = random.dirichlet(np.ones(4), 60)
    probabilities[:, 0] = 0.0  # never predicted
    found = judgment(labels, probabilities, task="classification", space=space)
    expected = precision_recall_fscore_support(
        labels, names[probabilities.argmax(1)], labels=names, zero_division=np.nan
    )
    figures = found.metrics["classes"]
    assert [each["class"] for each in figures] == list("abcd")
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        ours = [np.nan if each[name] is None else each[name] for each in figures]
        np.testing.assert_allclose(ours, values, err_msg=name)
    # Of class a nothing is predicted, of class d there are no rows.
    assert figures[0]["precision"] is None
    assert figures[0]["recall"] == 0
    assert figures[3]["recall"] is None
    assert figures[3]["precision"] == 0


def test_the_figures_of_labels_are_scikit_learn_s() -> None:
    random = np.random.default_rng(4)
    truth = random.integers(0, 2, (50, 3))
    truth[:3] = np.eye(3)
    labels = [[name for name, applies in zip("xyz", row, strict=True) if applies] for row in truth]
    probabilities = random.random((50, 3))
    found = judgment(labels, probabilities, task="multi_label")
    expected = precision_recall_fscore_support(truth, probabilities >= 0.5)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([each[name] for each in found.metrics["classes"]], values, err_msg=name)


def test_the_most_confident_mistakes_come_first() -> None:
    # Lines 2 (.9) and 4 (.6) are wrong; of the right ones line 3 is least sure.
    probabilities = [[0.8, 0.2], [0.1, 0.9], [0.45, 0.55], [0.6, 0.4]]
    rows = judgment(["no", "no", "yes", "yes"], probabilities, task="classification").rows()
    assert [row["line"] for row in rows] == [2, 4, 3, 1]
    assert rows[0] == {
        "file": "rows.jsonl",
        "line": 2,
        "text": "text 1",
        "true": "no",
        "predicted": "yes",
        "probability": 0.9,
        "probability_of_true": 0.1,
        "correct": False,
    }
    assert [row["correct"] for row in rows] == [False, False, True, True]


def test_the_most_confident_wrong_label_decides_the_order() -> None:
    # Line 1 misses y at .05: a decision held for .95. Line 2 is right. Line 3 adds y at .7.
    found = judgment([["x", "y"], ["x"], ["x"]], [[0.9, 0.05], [0.8, 0.4], [0.9, 0.7]], task="multi_label").rows()
    assert [(row["line"], row["wrong"]) for row in found] == [(1, ["y"]), (3, ["y"]), (2, [])]
    assert [row["probability"] for row in found] == pytest.approx([0.95, 0.7, 0.6])
    assert (found[0]["true"], found[0]["predicted"]) == (["x", "y"], ["x"])


def test_the_largest_errors_come_first() -> None:
    found = judgment([1.5, 2.5, 3.5], [1.25, 4.5, 3.0], task="regression")
    assert [(row["line"], row["error"]) for row in found.rows()] == [(2, 2.0), (3, -0.5), (1, -0.25)]
    assert "classes" not in found.metrics
    assert found.classes() == []
