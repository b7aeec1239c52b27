"""A trained task model, opened to predict and to be judged.

Enters: a run's folder, and texts or a data file. Leaves: a prediction a row, in order, and metrics. Left out: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.data import rows
from loopos.data.formats import Labelled, read_labelled
from loopos.data.labelled import encode_all
from loopos.data.labels import LabelSpace
from loopos.data.rows import Row
from loopos.data.tokens import TokenReport, encode_labelled
from loopos.evaluation.outputs import Meaning, confusion, interpret, measure, outputs_of
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, cast_parameters
from loopos.models.task_folder import open_task_model


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
        space = description["label_space"]
        self.space = LabelSpace(**{**space, "class_names": tuple(space["class_names"]), "keys": tuple(space["keys"])})

    @classmethod
    def open(cls, place: str | Path, *, device: str = "cpu", precision: str | None = None) -> Predictor:
        """place: a run's output folder or its model folder. precision: fp32, bf16 or fp16; that of the training
        when absent. Raises `UserError`, for a reward model too: its scores mean no labels.
        """
        model, tokenizer, description = open_task_model(place)
        if "label_space" not in description:
            raise UserError(f"{place}: a reward model, which scores responses; use it with: loopos score {place} FILE")
        chosen = precision or description["precision"]
        if chosen not in NUMBER_FORMATS:
            raise UserError(f"precision: given {chosen}, wanted one of {', '.join(NUMBER_FORMATS)}")
        cast_parameters(model.backbone.model, NUMBER_FORMATS[chosen])
        return cls(model.to(device), tokenizer, description, torch.device(device))

    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """One prediction a text or text pair, in order: {"label", "probabilities"}, {"labels", "probabilities"} or
        {"value"}.
        """
        examples = [
            Labelled(
                text if isinstance(text, str) else text[0],
                None if isinstance(text, str) else text[1],
                None,
                Row({}, "texts", None, i),
            )
            for i, text in enumerate(texts)
        ]
        return self._predictions(examples)

    def predict_file(self, source: str, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """One prediction a row of a data file, in its order. Raises `DataError` for a row without text: none is
        skipped.
        """
        examples, _ = read_labelled(rows.read(source), columns or {}, require_label=False)
        return self._predictions(examples)

    def evaluate_file(
        self, source: str, columns: Mapping[str, str] | None = None, *, on_bad_row: Literal["error", "skip"] = "error"
    ) -> dict[str, Any]:
        """Metrics on a labelled data file, with "rows" and, for classification, "confusion"."""
        read, report = read_labelled(rows.read(source, on_bad_row=on_bad_row), columns or {})
        examples, targets, report = encode_all(self.space, read, report, on_bad_row=on_bad_row)
        meaning = self._meaning(examples)
        threshold = self.description["threshold"]
        metrics: dict[str, Any] = dict(measure(self.space.task, meaning, targets, threshold=threshold))
        metrics["rows"] = report.used
        if report.dropped:
            metrics["dropped"] = dict(report.dropped)
        if self.tokens.truncated:
            metrics["truncated"] = self.tokens.truncated
        if self.space.task == "classification":
            places = [target for target in targets if isinstance(target, int)]
            metrics["class_names"], metrics["confusion"] = list(self.space.class_names), confusion(meaning, places)
        return metrics

    def _meaning(self, examples: Sequence[Labelled]) -> Meaning:
        encoded, self.tokens = encode_labelled(self.tokenizer, examples, max_length=self.description["max_length"])
        outputs = outputs_of(self.model, encoded, self.device)
        return interpret(
            self.space.task,
            outputs,
            target_mean=self.description["target_mean"],
            target_std=self.description["target_std"],
        )

    def _predictions(self, examples: Sequence[Labelled]) -> list[dict[str, Any]]:
        meaning = self._meaning(examples)
        if self.space.task == "regression":
            return [{"value": float(value)} for value in meaning]
        names = self.space.class_names
        answers: list[dict[str, Any]] = []
        for row in meaning:
            told: dict[str, Any] = {"probabilities": {name: float(p) for name, p in zip(names, row, strict=True)}}
            if self.space.task == "classification":
                answers.append({"label": self.space.decode(int(row.argmax())), **told})
            else:
                answers.append(
                    {"labels": self.space.decode([int(p >= self.description["threshold"]) for p in row]), **told}
                )
        return answers
