"""A labelled file, held against what a task model or an ensemble says of its rows.

Enters: a model, a file and the choice of columns. Leaves: a `Judgement`. Left out: running the model (`predictor`,
`ensemble`), metrics and reports (`judgement`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from loopos.data import rows
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.formats import Labelled, read_labelled
from loopos.data.labelled import Target, encode_all
from loopos.data.labels import LabelSpace
from loopos.data.tokens import TokenReport
from loopos.evaluation.judgement import Judgement
from loopos.evaluation.outputs import Meaning

MeaningOf: TypeAlias = Callable[[Sequence[Labelled], Sequence[Target]], Meaning]
"""Says what a model's outputs for examples mean; their encoded labels are not for it to look at."""


class TaskModel(Protocol):
    """What a `Predictor` and an `EnsemblePredictor` have in common. `tokens`: the account of the last call."""

    description: Mapping[str, Any]
    space: LabelSpace
    columns: dict[str, str | None]
    tokens: TokenReport

    def meaning_of(self, examples: Sequence[Labelled], targets: Sequence[Target]) -> Meaning: ...


def judge_file(
    model: TaskModel,
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    rules: TextRules = PLAIN_RULES,
    meaning_of: MeaningOf | None = None,
) -> Judgement:
    """What the model predicts for the rows of a labelled data file, held against their labels. Raises `DataError`.

    Args:
        columns: role → column, before those that the run was trained with.
        meaning_of: takes the place of the model's own.
    """
    reader = rows.read(source, on_bad_row=on_bad_row, rules=rules)
    read, report = read_labelled(reader, columns or {}, remembered=model.columns)
    examples, targets, report = encode_all(model.space, read, report, on_bad_row=on_bad_row)
    meaning = (meaning_of or model.meaning_of)(examples, targets)
    threshold = model.description["threshold"]
    return Judgement(model.space, examples, targets, meaning, report, model.tokens, threshold)
