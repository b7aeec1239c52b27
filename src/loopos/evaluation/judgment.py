"""Predictions of a task model compared with the labels of rows: metrics, per-class figures, and rows by mistake.

Letters: N rows, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loopos.config.figures import figure
from loopos.data.formats import Labeled
from loopos.data.labeled import Target
from loopos.data.labels import LabelSpace
from loopos.data.reading import DataReport
from loopos.evaluation.blocks import Block, Grid, Heading, Paragraph
from loopos.evaluation.outputs import Meaning, confusion, measure, residual_points
from loopos.evaluation.task_report import ClassFigures, class_figures, class_grid, confusion_blocks, residual_blocks

_ROWS_IN_REPORT = 50
_CHARACTERS_IN_REPORT = 500


@dataclass(frozen=True)
class Judgment:
    """`meaning` (probabilities `[N, C]` or values `[N]`) and `targets`, both in the order of `examples`.

    `report` and `tokens`: what was dropped and cut. `threshold`: the probability from which a label is predicted.
    """

    space: LabelSpace
    examples: Sequence[Labeled]
    targets: Sequence[Target]
    meaning: Meaning
    report: DataReport
    tokens: DataReport
    threshold: float

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The metrics, "rows", and what was dropped or cut; for classes and labels also "classes", the figures of each;
        for classification "class_names" and "confusion" `[C, C]`, row = true class.
        """
        space = self.space
        metrics: dict[str, Any] = dict(measure(space.task, self.meaning, self.targets, threshold=self.threshold))
        metrics["rows"] = self.report.used
        if self.report.dropped:
            metrics["dropped"] = dict(self.report.dropped)
        if self.tokens.cut:
            metrics["truncated"] = self.tokens.cut
        if space.task == "classification":
            metrics["class_names"], metrics["confusion"] = list(space.class_names), self._confusion()
        if space.task != "regression":
            metrics["classes"] = [each.as_record() for each in self.classes()]
        return metrics

    def classes(self) -> list[ClassFigures]:
        """The figures of each class or label; none for a regressor."""
        if self.space.task == "regression":
            return []
        if self.space.task == "classification":
            return class_figures(self.space.class_names, self._confusion())
        truth, predicted = self._chosen()
        counts = zip(truth.sum(0), predicted.sum(0), (truth & predicted).sum(0), strict=True)
        return [
            ClassFigures(name, *map(int, of_label))
            for name, of_label in zip(self.space.class_names, counts, strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """A record of each row, most confident mistakes first and most confident correct rows last; for a regressor the
        largest errors first.
        """
        verdicts = [self._of_value, self._of_class, self._of_labels][
            ("regression", "classification", "multi_label").index(self.space.task)
        ]()
        order = sorted(range(len(verdicts)), key=lambda index: (-verdicts[index][0], index))
        return [{**_named(self.examples[index]), **verdicts[index][1]} for index in order]

    def blocks(self) -> list[Block]:
        """Metrics, classes, confusion or residuals, and the rows with the worst mistakes."""
        figures = [(name, figure(value)) for name, value in self.metrics.items() if isinstance(value, float)]
        lost = [f"{count} dropped ({reason})" for reason, count in self.report.dropped.items()]
        lost += [f"{self.tokens.cut} cut at the model's length"] if self.tokens.cut else []
        counted = ", ".join([f"{self.report.used:,} rows", *lost]) + "."
        parts: list[Block] = [Paragraph(counted), Grid(("metric", "value"), figures, numbers=(1,))]
        if self.space.task == "classification":
            parts += confusion_blocks(self.space.class_names, self._confusion())
        elif self.space.task == "multi_label":
            parts += [Heading("Labels"), class_grid(self.classes(), name="label")]
        else:
            points = residual_points(self.meaning, self.targets)
            parts += residual_blocks(points["true"], points["predicted"], rows=points["rows"])
        return [*parts, *_worst_blocks(self.rows())]

    def _confusion(self) -> list[list[int]]:
        return confusion(self.meaning, [target for target in self.targets if isinstance(target, int)])

    def _chosen(self) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], np.ndarray[Any, np.dtype[np.bool_]]]:
        """Which labels apply and which are predicted, each `[N, C]`."""
        return np.asarray(self.targets, dtype=bool), self.meaning >= self.threshold

    def _of_value(self) -> list[tuple[float, dict[str, Any]]]:
        pairs = zip(np.asarray(self.targets, dtype=float).tolist(), self.meaning.tolist(), strict=True)
        return [
            (abs(predicted - true), {"true": true, "predicted": predicted, "error": predicted - true})
            for true, predicted in pairs
        ]

    def _of_class(self) -> list[tuple[float, dict[str, Any]]]:
        found = []
        for target, probabilities in zip(self.targets, self.meaning, strict=True):
            assert isinstance(target, int), "a class is a number"
            predicted = int(probabilities.argmax())
            probability, is_right = float(probabilities[predicted]), predicted == target
            verdict = {
                "true": self.space.decode(target),
                "predicted": self.space.decode(predicted),
                "probability": probability,
                "probability_of_true": float(probabilities[target]),
                "correct": is_right,
            }
            found.append((-probability if is_right else probability, verdict))
        return found

    def _of_labels(self) -> list[tuple[float, dict[str, Any]]]:
        truths, chosen = self._chosen()
        sure = np.where(chosen, self.meaning, 1.0 - self.meaning)
        found = []
        for truth, predicted, probabilities in zip(truths, chosen, sure, strict=True):
            wrong = truth != predicted
            is_right = not wrong.any()
            # The most confident wrong decision, or the least confident of all if they are correct.
            probability = float(probabilities.min() if is_right else probabilities[wrong].max())
            verdict = {
                "true": self.space.decode(truth.tolist()),
                "predicted": self.space.decode(predicted.tolist()),
                "wrong": self.space.decode(wrong.tolist()),
                "probability": probability,
                "correct": is_right,
            }
            found.append((-probability if is_right else probability, verdict))
        return found


def _named(example: Labeled) -> dict[str, Any]:
    """A row's location and text: its line, or its number from 0 if its file has no lines."""
    row = example.row
    location = {"line": row.line} if row.line is not None else {"row": row.index}
    pair = {} if example.text_pair is None else {"text_pair": example.text_pair}
    return {"file": row.source, **location, "text": example.text, **pair}


def _worst_blocks(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    wrong = [row for row in rows if not row.get("correct", False)]
    title = "Largest errors" if rows and "error" in rows[0] else "Most confident mistakes"
    if not wrong:
        return [Heading(title), Paragraph("None: every row is correct.")]
    names = [name for name in wrong[0] if name not in ("file", "correct")]
    numbers = [index for index, name in enumerate(names) if isinstance(wrong[0][name], int | float)]
    lines = [[_cell(row.get(name)) for name in names] for row in wrong[:_ROWS_IN_REPORT]]
    shown = f"{min(len(wrong), _ROWS_IN_REPORT):,} of {len(wrong):,} rows."
    return [Heading(title), Paragraph(shown), Grid(names, lines, numbers=numbers)]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return figure(value)
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _CHARACTERS_IN_REPORT else f"{text[: _CHARACTERS_IN_REPORT - 1]}…"
