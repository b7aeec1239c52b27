"""A trained task model, opened to predict and to be judged.

Enters: a run's folder, and texts or a data file. Leaves: a prediction a row, in order, and metrics. Left out: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.data import rows
from loopos.data.formats import Labelled, read_labelled
from loopos.data.labelled import Target
from loopos.data.labels import LabelSpace
from loopos.data.rows import Row
from loopos.data.tokens import TokenReport, encode_labelled
from loopos.evaluation.judging import judge_file
from loopos.evaluation.outputs import Meaning, interpret, outputs_of
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, cast_parameters
from loopos.models.model_folder import remembered_columns
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
        self.space = space_of(description)
        self.columns: dict[str, str | None] = dict(description.get("columns", {}))

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
        description = {**description, "columns": remembered_columns(place)}
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
    return LabelSpace(**{**space, "class_names": tuple(space["class_names"]), "keys": tuple(space["keys"])})


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
