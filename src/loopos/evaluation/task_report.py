"""Per-class tables, confusion and residuals as blocks of a report, from a run's events or an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopos.config.figures import figure
from loopos.evaluation.blocks import Block, Grid, Heading, Paragraph, Picture
from loopos.evaluation.drawing import confusion_svg, residuals_svg

_MOST_CLASSES_IN_TABLE = 30
_MOST_CLASSES_IN_PICTURE = 100
_MOST_CONFUSIONS_LISTED = 20


@dataclass(frozen=True)
class ClassFigures:
    """One class: `precision` = correct / predicted and `recall` = correct / rows, None for 0 / 0; `f1` = 2·correct /
    (rows + predicted), None for a class that neither occurs nor is predicted.
    """

    name: str
    rows: int
    predicted: int
    right: int

    @property
    def precision(self) -> float | None:
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        return self.right / self.rows if self.rows else None

    @property
    def f1(self) -> float | None:
        both = self.rows + self.predicted
        return 2 * self.right / both if both else None

    def as_record(self) -> dict[str, str | int | float | None]:
        """The figures by name; "support": rows of the class."""
        return {
            "class": self.name,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "support": self.rows,
            "predicted": self.predicted,
        }


def class_figures(class_names: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[ClassFigures]:
    """Every class of a confusion matrix `[C, C]`, row = true class, column = predicted class."""
    return [
        ClassFigures(name, sum(matrix[index]), sum(row[index] for row in matrix), matrix[index][index])
        for index, name in enumerate(class_names)
    ]


def confusion_blocks(class_names: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[Block]:
    """Per-class table, the confusion matrix as a picture and as a table for few classes; for many the largest
    confusions.
    """
    parts: list[Block] = [Heading("Classes"), class_grid(class_figures(class_names, matrix)), Heading("Confusion")]
    if len(class_names) <= _MOST_CLASSES_IN_PICTURE:
        parts.append(Picture("confusion", confusion_svg(class_names, matrix), "Row: true class. Column: predicted."))
    if len(class_names) <= _MOST_CLASSES_IN_TABLE:
        lines = [(name, *map(str, counts)) for name, counts in zip(class_names, matrix, strict=True)]
        return [*parts, Grid(("true class", *class_names), lines, numbers=range(1, len(class_names) + 1))]
    largest, pairs = largest_confusions(matrix, _MOST_CONFUSIONS_LISTED)
    sentence = f"{len(class_names)} classes: the {len(largest)} largest of {pairs} confusions."
    lines = [(class_names[true], class_names[predicted], str(count)) for count, true, predicted in largest]
    return [*parts, Paragraph(sentence), Grid(("true class", "predicted class", "rows"), lines, numbers=(2,))]


def class_grid(figures: Sequence[ClassFigures], *, name: str = "class") -> Grid:
    """A table of one line per class or label."""
    rows = [
        (each.name, f"{each.rows:,}", f"{each.predicted:,}", *map(_ratio, (each.precision, each.recall, each.f1)))
        for each in figures
    ]
    return Grid((name, "rows", "predicted", "precision", "recall", "F1"), rows, numbers=range(1, 6))


def largest_confusions(matrix: Sequence[Sequence[int]], most: int) -> tuple[list[tuple[int, int, int]], int]:
    """Count, true class and predicted class of the `most` largest confusions, and how many there are."""
    pairs = [
        (count, true, predicted)
        for true, counts in enumerate(matrix)
        for predicted, count in enumerate(counts)
        if true != predicted and count > 0
    ]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:most], len(pairs)


def residual_blocks(true: Sequence[float], predicted: Sequence[float], *, rows: int) -> list[Block]:
    """Predicted over true values and the errors; rows: number of all rows, of which these are the first."""
    errors = sorted((abs(p - t) for t, p in zip(true, predicted, strict=True)), reverse=True)
    shown = "" if rows == len(true) else f"The first {len(true):,} of {rows:,} rows. "
    median = (
        f"{shown}Median error {figure(errors[len(errors) // 2])}, largest {figure(errors[0])}." if errors else shown
    )
    return [Heading("Residuals"), Picture("residuals", residuals_svg(true, predicted)), Paragraph(median)]


def task_blocks(events: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Blocks from the last events "confusion" and "residuals" of a run; nothing without."""
    parts: list[Block] = []
    for kind in ("confusion", "residuals"):
        found = [event["metrics"] for event in events if event["event"] == kind]
        if found and kind == "confusion":
            parts += confusion_blocks(found[-1]["class_names"], found[-1]["matrix"])
        elif found:
            parts += residual_blocks(found[-1]["true"], found[-1]["predicted"], rows=found[-1]["rows"])
    return parts


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
