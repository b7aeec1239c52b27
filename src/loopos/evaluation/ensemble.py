"""An ensemble's folder, opened to predict and to be judged as a single model is.

Enters: a folder that `loopos ensemble` wrote, and texts or a data file. Leaves: a prediction a row with what the
members disagree by, and metrics. Members are opened one after another over all rows, so that memory does not grow with
their number. Left out: making such a folder (`deploy.ensemble`), sums (`combining.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.faults import UserError
from loopos.data import rows
from loopos.data.formats import Labelled, read_labelled
from loopos.data.labelled import Target, encode_all
from loopos.data.tokens import TokenReport
from loopos.evaluation.combining import METHODS, Combined, Tally, in_order, tied
from loopos.evaluation.judging import judge_file
from loopos.evaluation.outputs import Meaning, measure
from loopos.evaluation.predictor import Predictor, answers_of, examples_of, space_of
from loopos.evaluation.progress import Tell, silent
from loopos.models.model_folder import ENSEMBLE, model_folder, read_description

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
        tell: Tell | None = None,
    ) -> None:
        """tell: is told of members done, members in all, and the one that is next, whenever they run over rows."""
        self.folder, self.description, self.device, self.precision = folder, description, device, precision
        self.tell = tell or silent
        self.tokens = TokenReport()
        self.space = space_of(description)
        self.columns: dict[str, str | None] = dict(description.get("columns", {}))
        told = description[ENSEMBLE]
        self.method = str(told["method"])
        self.places = [folder / place for place in told["members"]]
        self.weights = [float(weight) for weight in told["weights"]]

    @classmethod
    def open(cls, place: str | Path, *, device: str = "cpu", precision: str | None = None) -> EnsemblePredictor:
        """place: an ensemble's folder. precision: as `Predictor.open`, of every member. Raises `UserError` for another
        folder, or where a member is gone.
        """
        folder = model_folder(place)
        description = read_description(folder)
        told = description.get(ENSEMBLE)
        if not isinstance(told, dict) or told.get("method") not in METHODS:
            raise UserError(f"{place}: no ensemble; make one: loopos ensemble A B -o OUT")
        if len(told["members"]) != len(told["weights"]):
            raise UserError(f"{place}: broken: {len(told['members'])} members and {len(told['weights'])} weights")
        opened = cls(folder, description, device=device, precision=precision)
        for member in opened.places:
            if not member.is_dir():
                raise UserError(
                    f"{place}: its member {member} is gone; put it back, or make the ensemble again with --copy"
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
        said: list[Meaning] = []
        self.combined(examples, lambda meaning, _: said.append(meaning))
        return said, targets

    def combined(self, examples: Sequence[Labelled], visit: Visit | None = None) -> Combined:
        """What the members say together. visit: is shown the meaning of each member in turn, classes in this
        ensemble's order.
        """
        tally = Tally(self.space.task, self.method)
        for number, (place, weight) in enumerate(zip(self.places, self.weights, strict=True)):
            self.tell(number, len(self.places), str(place))
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
        self.tell(len(self.places), len(self.places), "")
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
    place: str | Path, *, device: str = "cpu", precision: str | None = None
) -> Predictor | EnsemblePredictor:
    """A task model, or an ensemble of them. Raises `UserError`."""
    if ENSEMBLE in read_description(model_folder(place)):
        return EnsemblePredictor.open(place, device=device, precision=precision)
    return Predictor.open(place, device=device, precision=precision)
