"""A trained task model, opened to predict and to be judged.

Enters: a run's folder, and texts or a data file. Leaves: a prediction a row, in order, and metrics. Left out: training.

An ensemble's folder, opened to predict and to be judged as a single model is.

Enters: a folder that `loopos ensemble` wrote, and texts or a data file. Leaves: a prediction a row with what the
members disagree by, and metrics. Members are opened one after another over all rows, so that memory does not grow with
their number. Left out: making such a folder (`deploy.ensemble`), sums (`combining.py`).

A labelled file, held against what a task model or an ensemble says of its rows.

Enters: a model, a file and the choice of columns. Leaves: a `Judgement`. Left out: running the model (`predictor`,
`ensemble`), metrics and reports (`judgement`).
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
from loopos.data.formats import Labelled, read_labelled
from loopos.data.label_space import LabelSpace, label_space_of
from loopos.data.labelled import Target, encode_all
from loopos.data.rows import Row
from loopos.data.tokens import TokenReport, encode_labelled
from loopos.evaluation.combining import METHODS, Combined, Tally, in_order, tied
from loopos.evaluation.judgement import Judgement
from loopos.evaluation.outputs import Meaning, interpret, measure, outputs_of
from loopos.evaluation.progress import OnProgress, silent
from loopos.models.folders import open_task_model
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, cast_parameters
from loopos.models.model_folder import ENSEMBLE, model_folder, read_description, remembered_columns


class Predictor:
    """Opens the result of `FineTuner`: `loopos.load("outputs/run").predict(["some text"])`.

    `tokens` is the account of the last call: how many examples were cut at the length that the model was trained with.
    """

    def __init__(
        self,
        model: PooledModel,
        tokenizer: PreTrainedTokenizerBase,
        description: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.model, self.tokenizer, self.description, self.device = model.eval(), tokenizer, description, device
        self.tokens = TokenReport()
        self.space = space_of(description)
        self.columns: dict[str, str | None] = dict(description.get("columns", {}))

    @classmethod
    def open(cls, source: str | Path, *, device: str = "cpu", precision: str | None = None) -> Predictor:
        """place: a run's output folder or its model folder. precision: fp32, bf16 or fp16; that of the training
        when absent. Raises `UserError`, for a reward model too: its scores mean no labels.
        """
        model, tokenizer, description = open_task_model(source)
        if "label_space" not in description:
            raise UserError(
                f"{source}: a reward model, which scores responses; use it with: loopos score {source} FILE"
            )
        chosen = precision or description["precision"]
        if chosen not in NUMBER_FORMATS:
            raise UserError(f"precision: got {chosen}, expected one of {', '.join(NUMBER_FORMATS)}")
        cast_parameters(model.backbone.model, NUMBER_FORMATS[chosen])
        description = {**description, "columns": remembered_columns(source)}
        return cls(model.to(device), tokenizer, description, torch.device(device))

    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """One prediction a text or text pair, in order: {"label", "probabilities"}, {"labels", "probabilities"} or
        {"value"}.
        """
        return self.predict_examples(examples_of(texts))

    def predict_file(self, source: str, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """One prediction a row of a data file, in its order. Raises `DataError` for a row without text: none is
        skipped.
        """
        examples, _ = read_labelled(rows.read(source), columns or {}, require_label=False, remembered=self.columns)
        return self.predict_examples(examples)

    def evaluate_file(
        self, source: str, columns: Mapping[str, str] | None = None, *, on_bad_row: Literal["error", "skip"] = "error"
    ) -> dict[str, Any]:
        """`Judgement.metrics` of a labelled data file."""
        return judge_file(self, source, columns, on_bad_row=on_bad_row).metrics

    def meaning_of(self, examples: Sequence[Labelled], targets: Sequence[Target] = ()) -> Meaning:
        """What the outputs for examples say; their labels are not looked at."""
        return self.meaning(self.outputs(examples))

    def outputs(self, examples: Sequence[Labelled]) -> Tensor:
        """Outputs `[N, C]` of the head, in the examples' order."""
        encoded, self.tokens = encode_labelled(self.tokenizer, examples, max_length=self.description["max_length"])
        return outputs_of(self.model, encoded, self.device)

    def meaning(self, outputs: Tensor) -> Meaning:
        """What outputs `[N, C]` of this model say."""
        return interpret(
            self.space.task,
            outputs,
            target_mean=self.description["target_mean"],
            target_std=self.description["target_std"],
        )

    def predict_examples(self, examples: Sequence[Labelled]) -> list[dict[str, Any]]:
        """As `predict`, of examples; their labels are not looked at."""
        return answers_of(self.space, self.meaning_of(examples), threshold=self.description["threshold"])


def space_of(description: Mapping[str, Any]) -> LabelSpace:
    """The label space that a model's description tells."""
    space = description["label_space"]
    return label_space_of(space)


def examples_of(texts: Sequence[str | tuple[str, str]]) -> list[Labelled]:
    """Texts or text pairs as examples without labels."""
    return [
        Labelled(
            text if isinstance(text, str) else text[0],
            None if isinstance(text, str) else text[1],
            None,
            Row({}, "texts", None, i),
        )
        for i, text in enumerate(texts)
    ]


def answers_of(space: LabelSpace, meaning: Meaning, *, threshold: float) -> list[dict[str, Any]]:
    """A prediction a row. threshold: the probability from which a label applies."""
    if space.task == "regression":
        return [{"value": float(value)} for value in meaning]
    answers: list[dict[str, Any]] = []
    for row in meaning:
        told: dict[str, Any] = {
            "probabilities": {name: float(p) for name, p in zip(space.class_names, row, strict=True)}
        }
        if space.task == "classification":
            answers.append({"label": space.decode(int(row.argmax())), **told})
        else:
            answers.append({"labels": space.decode([int(p >= threshold) for p in row]), **told})
    return answers


Visit: TypeAlias = Callable[[Meaning, float], None]
"""Is shown what a member says, and the probability from which it says that a label applies."""


class EnsemblePredictor:
    """Several task models as one: `loopos.load("outputs/ensemble").predict(["some text"])`.

    `tokens` is the account of the last member's last call.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        *,
        device: str = "cpu",
        precision: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """tell: is told of members done, members in all, and the one that is next, whenever they run over rows."""
        self.folder, self.description, self.device, self.precision = folder, description, device, precision
        self.on_progress = on_progress or silent
        self.tokens = TokenReport()
        self.space = space_of(description)
        self.columns: dict[str, str | None] = dict(description.get("columns", {}))
        told = description[ENSEMBLE]
        self.method = str(told["method"])
        self.places = [folder / place for place in told["members"]]
        self.weights = [float(weight) for weight in told["weights"]]

    @classmethod
    def open(cls, source: str | Path, *, device: str = "cpu", precision: str | None = None) -> EnsemblePredictor:
        """place: an ensemble's folder. precision: as `Predictor.open`, of every member. Raises `UserError` for another
        folder, or where a member is gone.
        """
        folder = model_folder(source)
        description = read_description(folder)
        told = description.get(ENSEMBLE)
        if not isinstance(told, dict) or told.get("method") not in METHODS:
            raise UserError(f"{source}: no ensemble; make one: loopos ensemble A B -o OUT")
        if len(told["members"]) != len(told["weights"]):
            raise UserError(f"{source}: broken: {len(told['members'])} members and {len(told['weights'])} weights")
        opened = cls(folder, description, device=device, precision=precision)
        for member in opened.places:
            if not member.is_dir():
                raise UserError(
                    f"{source}: its member {member} is gone; put it back, or make the ensemble again with --copy"
                )
        return opened

    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """As `Predictor.predict`, and of every row "variance", "entropy" and "mutual_information" (of regressors
        "std"), of a majority "votes" and "tied" too.
        """
        return self.predict_examples(examples_of(texts))

    def predict_file(self, source: str, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """As `Predictor.predict_file`."""
        examples, _ = read_labelled(rows.read(source), columns or {}, require_label=False, remembered=self.columns)
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
        alone: list[dict[str, float]] = []

        def together(examples: Sequence[Labelled], targets: Sequence[Target]) -> Meaning:
            def visit(meaning: Meaning, threshold: float) -> None:
                alone.append(measure(self.space.task, meaning, targets, threshold=threshold))

            return self.combined(examples, visit).meaning

        judgement = judge_file(self, source, columns, on_bad_row=on_bad_row, meaning_of=together)
        return alone, judgement.metrics

    def meaning_of(self, examples: Sequence[Labelled], targets: Sequence[Target] = ()) -> Meaning:
        """As `Predictor.meaning_of`, of all members together."""
        return self.combined(examples).meaning

    def truths(self, source: str, columns: Mapping[str, str] | None = None) -> tuple[list[Meaning], list[Target]]:
        """What every member says of the rows of a labelled file, and their encoded labels."""
        read, report = read_labelled(rows.read(source), columns or {}, remembered=self.columns)
        examples, targets, _ = encode_all(self.space, read, report, on_bad_row="error")
        summary: list[Meaning] = []
        self.combined(examples, lambda meaning, _: summary.append(meaning))
        return summary, targets

    def combined(self, examples: Sequence[Labelled], visit: Visit | None = None) -> Combined:
        """What the members say together. visit: is shown the meaning of each member in turn, classes in this
        ensemble's order.
        """
        tally = Tally(self.space.task, self.method)
        for number, (place, weight) in enumerate(zip(self.places, self.weights, strict=True)):
            self.on_progress(number, len(self.places), str(place))
            member = Predictor.open(place, device=self.device, precision=self.precision)
            outputs = member.outputs(examples)
            if self.space.task != "regression":
                outputs = in_order(outputs, [member.space.keys.index(key) for key in self.space.keys])
            meaning = member.meaning(outputs)
            if visit is not None:
                visit(meaning, member.description["threshold"])
            tally.add(outputs, meaning, weight=weight, threshold=member.description["threshold"])
            self.tokens = member.tokens
            # Let go before the next one is opened.
            del member
        self.on_progress(len(self.places), len(self.places), "")
        return tally.result()

    def predict_examples(self, examples: Sequence[Labelled]) -> list[dict[str, Any]]:
        """As `predict`, of examples; their labels are not looked at."""
        found = self.combined(examples)
        answers = answers_of(self.space, found.meaning, threshold=self.description["threshold"])
        for name, values in found.uncertainty.items():
            for answer, value in zip(answers, values, strict=True):
                answer[name] = float(value)
        if found.votes is not None:
            names = self.space.class_names
            ties = tied(found.votes, len(self.places), task=self.space.task)
            for answer, votes, places in zip(answers, found.votes, ties, strict=True):
                answer["votes"] = dict(zip(names, map(int, votes), strict=True))
                answer["tied"] = [names[place] for place in places]
        return answers


def open_predictor(
    source: str | Path, *, device: str = "cpu", precision: str | None = None
) -> Predictor | EnsemblePredictor:
    """A task model, or an ensemble of them. Raises `UserError`."""
    if ENSEMBLE in read_description(model_folder(source)):
        return EnsemblePredictor.open(source, device=device, precision=precision)
    return Predictor.open(source, device=device, precision=precision)


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
