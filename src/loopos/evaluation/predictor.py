"""Opens a trained task model, or an ensemble of them, to predict and to be evaluated.

The members of an ensemble are opened one after another over all rows, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data import rows
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.formats import Labeled, read_labeled
from loopos.data.label_space import LabelSpace, label_space_of
from loopos.data.labeled import Target, encode_all
from loopos.data.reading import DataReport
from loopos.data.rows import Row
from loopos.data.tokens import encode_labeled
from loopos.evaluation.combining import Combined, Tally, in_order, tied
from loopos.evaluation.judgment import Judgment
from loopos.evaluation.outputs import Meaning, interpret, measure, outputs_of
from loopos.evaluation.progress import OnProgress, silent
from loopos.models.folders import open_task_model
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, cast_parameters
from loopos.models.resolve import EnsembleRecipe, ModelRef, resolve_trained


class Predictor:
    """Opens the result of `FineTuner`: `loopos.load("outputs/run").predict(["some text"])`.

    `tokens` reports on the last call: how many examples were cut at the length that the model was trained with.
    """

    def __init__(
        self,
        model: PooledModel,
        tokenizer: PreTrainedTokenizerBase,
        description: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.model, self.tokenizer, self.description, self.device = model.eval(), tokenizer, description, device
        self.tokens = DataReport()
        self.space = space_of(description)
        self.columns: dict[str, str | None] = dict(description.get("columns", {}))

    @classmethod
    def open(cls, source: str | Path | ModelRef, *, device: str = "cpu", precision: str | None = None) -> Predictor:
        """source: a run's output folder or its model folder. precision: fp32, bf16 or fp16; default: that of the
        training. Raises `UserError`, also for a reward model, whose scores are no labels.
        """
        ref = resolve_trained(source)
        if ref.kind == "reward":
            raise UserError(
                f"{ref.name}: a reward model, which scores responses; use it with: loopos score {ref.name} FILE"
            )
        model, tokenizer, description = open_task_model(ref)
        chosen = precision or description["precision"]
        if chosen not in NUMBER_FORMATS:
            raise UserError(f"precision: got {chosen}, expected one of {', '.join(NUMBER_FORMATS)}")
        cast_parameters(model.backbone.model, NUMBER_FORMATS[chosen])
        description = {**description, "columns": ref.columns}
        return cls(model.to(device), tokenizer, description, torch.device(device))

    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """One prediction per text or text pair, in order: {"label", "probabilities"}, {"labels", "probabilities"} or
        {"value"}.
        """
        return self.predict_examples(examples_of(texts))

    def predict_file(self, source: str, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """One prediction per row of a data file, in order. Raises `DataError` for a row without text: none is
        skipped.
        """
        examples, _ = read_labeled(rows.read(source), columns or {}, require_label=False, remembered=self.columns)
        return self.predict_examples(examples)

    def evaluate_file(
        self, source: str, columns: Mapping[str, str] | None = None, *, on_bad_row: Literal["error", "skip"] = "error"
    ) -> dict[str, Any]:
        """`Judgment.metrics` of a labeled data file."""
        return judge_file(self, source, columns, on_bad_row=on_bad_row).metrics

    def meaning_of(self, examples: Sequence[Labeled], targets: Sequence[Target] = ()) -> Meaning:
        """The meaning of the outputs for examples; ignores their labels."""
        return self.meaning(self.outputs(examples))

    def outputs(self, examples: Sequence[Labeled]) -> Tensor:
        """Outputs `[N, C]` of the head, in the examples' order."""
        encoded, self.tokens = encode_labeled(self.tokenizer, examples, max_length=self.description["max_length"])
        return outputs_of(self.model, encoded, self.device)

    def meaning(self, outputs: Tensor) -> Meaning:
        """The meaning of outputs `[N, C]` of this model."""
        return interpret(
            self.space.task,
            outputs,
            target_mean=self.description["target_mean"],
            target_std=self.description["target_std"],
        )

    def predict_examples(self, examples: Sequence[Labeled]) -> list[dict[str, Any]]:
        """As `predict`, for examples; ignores their labels."""
        return answers_of(self.space, self.meaning_of(examples), threshold=self.description["threshold"])


def space_of(description: Mapping[str, Any]) -> LabelSpace:
    """The label space in a model's description."""
    space = description["label_space"]
    return label_space_of(space)


def examples_of(texts: Sequence[str | tuple[str, str]]) -> list[Labeled]:
    """Texts or text pairs as examples without labels. Raises `UserError` for a text alone, whose characters would be
    predicted one by one.
    """
    if isinstance(texts, str):
        raise UserError(f"texts: got the text {texts!r:.60}; expected a list of texts, such as [{texts!r:.60}]")
    return [
        Labeled(
            text if isinstance(text, str) else text[0],
            None if isinstance(text, str) else text[1],
            None,
            Row({}, "texts", None, i),
        )
        for i, text in enumerate(texts)
    ]


def answers_of(space: LabelSpace, meaning: Meaning, *, threshold: float) -> list[dict[str, Any]]:
    """One prediction per row. threshold: the probability from which a label is predicted."""
    if space.task == "regression":
        return [{"value": float(value)} for value in meaning]
    answers: list[dict[str, Any]] = []
    for row in meaning:
        probabilities: dict[str, Any] = {
            "probabilities": {name: float(p) for name, p in zip(space.class_names, row, strict=True)}
        }
        if space.task == "classification":
            answers.append({"label": space.decode(int(row.argmax())), **probabilities})
        else:
            answers.append({"labels": space.decode([int(p >= threshold) for p in row]), **probabilities})
    return answers


Visit: TypeAlias = Callable[[Meaning, float], None]
"""Receives the meaning of a member's outputs, and the member's threshold."""


class EnsemblePredictor:
    """Several task models as one: `loopos.load("outputs/ensemble").predict(["some text"])`.

    `tokens` reports on the last call of the last member.
    """

    def __init__(
        self,
        recipe: EnsembleRecipe,
        description: Mapping[str, Any],
        *,
        device: str = "cpu",
        precision: str | None = None,
        on_progress: OnProgress = silent,
    ) -> None:
        """As `open`."""
        self.recipe, self.description, self.device, self.precision = recipe, description, device, precision
        self.on_progress = on_progress
        self.tokens = DataReport()
        self.space = space_of(description)
        self.columns: dict[str, str | None] = dict(description.get("columns", {}))
        self.members = [resolve_trained(member) for member in recipe.members]

    @classmethod
    def open(
        cls,
        source: str | Path | ModelRef,
        *,
        device: str = "cpu",
        precision: str | None = None,
        on_progress: OnProgress = silent,
    ) -> EnsemblePredictor:
        """source: an ensemble's folder. precision: as in `Predictor.open`, for every member. on_progress: called with
        the numbers of finished members and of all, and the name of the next. Raises `UserError` for other folders, and
        for a missing member.
        """
        ref = resolve_trained(source)
        if ref.kind != "ensemble" or ref.ensemble is None:
            raise UserError(f"{ref.name}: not an ensemble; make one: loopos ensemble A B -o OUT")
        return cls(ref.ensemble, ref.description, device=device, precision=precision, on_progress=on_progress)

    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """As `Predictor.predict`, with "variance", "entropy" and "mutual_information" for every row (for regressors
        "std"), for a majority also "votes" and "tied".
        """
        return self.predict_examples(examples_of(texts))

    def predict_file(self, source: str, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """As `Predictor.predict_file`."""
        examples, _ = read_labeled(rows.read(source), columns or {}, require_label=False, remembered=self.columns)
        return self.predict_examples(examples)

    def evaluate_file(
        self, source: str, columns: Mapping[str, str] | None = None, *, on_bad_row: Literal["error", "skip"] = "error"
    ) -> dict[str, Any]:
        """As `Predictor.evaluate_file`."""
        return judge_file(self, source, columns, on_bad_row=on_bad_row).metrics

    def judge(
        self, source: str, columns: Mapping[str, str] | None = None, *, on_bad_row: Literal["error", "skip"] = "error"
    ) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """The metrics of each member, and those of the ensemble, from one pass over the members."""
        by_member: list[dict[str, float]] = []

        def together(examples: Sequence[Labeled], targets: Sequence[Target]) -> Meaning:
            def visit(meaning: Meaning, threshold: float) -> None:
                by_member.append(measure(self.space.task, meaning, targets, threshold=threshold))

            return self.combined(examples, visit).meaning

        judgment = judge_file(self, source, columns, on_bad_row=on_bad_row, meaning_of=together)
        return by_member, judgment.metrics

    def meaning_of(self, examples: Sequence[Labeled], targets: Sequence[Target] = ()) -> Meaning:
        """As `Predictor.meaning_of`, of all members combined."""
        return self.combined(examples).meaning

    def truths(self, source: str, columns: Mapping[str, str] | None = None) -> tuple[list[Meaning], list[Target]]:
        """The predictions of every member for the rows of a labeled data file, and the encoded labels."""
        read, report = read_labeled(rows.read(source), columns or {}, remembered=self.columns)
        examples, targets, _ = encode_all(self.space, read, report, on_bad_row="error")
        summary: list[Meaning] = []
        self.combined(examples, lambda meaning, _: summary.append(meaning))
        return summary, targets

    def combined(self, examples: Sequence[Labeled], visit: Visit | None = None) -> Combined:
        """The combined prediction. visit: called with the meaning of each member in turn, classes in this ensemble's
        order.
        """
        tally = Tally(self.space.task, self.recipe.method)
        for number, (ref, weight) in enumerate(zip(self.members, self.recipe.weights, strict=True)):
            self.on_progress(number, len(self.members), ref.name)
            member = Predictor.open(ref, device=self.device, precision=self.precision)
            outputs = member.outputs(examples)
            if self.space.task != "regression":
                outputs = in_order(outputs, [member.space.keys.index(key) for key in self.space.keys])
            meaning = member.meaning(outputs)
            if visit is not None:
                visit(meaning, member.description["threshold"])
            tally.add(outputs, meaning, weight=weight, threshold=member.description["threshold"])
            self.tokens = member.tokens
            # Freed before the next one is opened.
            del member
        self.on_progress(len(self.members), len(self.members), "")
        return tally.result()

    def predict_examples(self, examples: Sequence[Labeled]) -> list[dict[str, Any]]:
        """As `predict`, for examples; ignores their labels."""
        found = self.combined(examples)
        answers = answers_of(self.space, found.meaning, threshold=self.description["threshold"])
        for name, values in found.uncertainty.items():
            for answer, value in zip(answers, values, strict=True):
                answer[name] = float(value)
        if found.votes is not None:
            names = self.space.class_names
            ties = tied(found.votes, len(self.members), task=self.space.task)
            for answer, votes, indices in zip(answers, found.votes, ties, strict=True):
                answer["votes"] = dict(zip(names, map(int, votes), strict=True))
                answer["tied"] = [names[index] for index in indices]
        return answers


def open_predictor(
    source: str | Path | ModelRef, *, device: str = "cpu", precision: str | None = None
) -> Predictor | EnsemblePredictor:
    """Opens a task model, or an ensemble of them. Raises `UserError`."""
    ref = resolve_trained(source)
    if ref.kind == "ensemble":
        return EnsemblePredictor.open(ref, device=device, precision=precision)
    return Predictor.open(ref, device=device, precision=precision)


MeaningOf: TypeAlias = Callable[[Sequence[Labeled], Sequence[Target]], Meaning]
"""Computes the meaning of a model's outputs for examples; must not use their encoded labels."""


class TaskModel(Protocol):
    """The common interface of `Predictor` and `EnsemblePredictor`. `tokens`: report on the last call."""

    description: Mapping[str, Any]
    space: LabelSpace
    columns: dict[str, str | None]
    tokens: DataReport

    def meaning_of(self, examples: Sequence[Labeled], targets: Sequence[Target]) -> Meaning: ...


def judge_file(
    model: TaskModel,
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    rules: TextRules = PLAIN_RULES,
    meaning_of: MeaningOf | None = None,
) -> Judgment:
    """Predictions for the rows of a labeled data file, compared with their labels. Raises `DataError`.

    Args:
        columns: role → column; takes precedence over those of the training.
        meaning_of: replaces the model's own.
    """
    reader = rows.read(source, on_bad_row=on_bad_row, rules=rules)
    read, report = read_labeled(reader, columns or {}, remembered=model.columns)
    examples, targets, report = encode_all(model.space, read, report, on_bad_row=on_bad_row)
    meaning = (meaning_of or model.meaning_of)(examples, targets)
    threshold = model.description["threshold"]
    return Judgment(model.space, examples, targets, meaning, report, model.tokens, threshold)
