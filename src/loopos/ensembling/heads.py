"""Combines classifiers or regressors into one model folder, with report.md and recipe.json.

`loopos.load`, `loopos predict` and `loopos evaluate` open the folder as one model. The combination itself is in
`evaluation.combining`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from loopos.config.diagnostics import UserError
from loopos.config.paths import MODEL_DESCRIPTION, RECIPE
from loopos.evaluation.blocks import shown, table
from loopos.evaluation.combining import METHODS, Floats, log_loss_weights, squared_error_weights
from loopos.evaluation.predictor import EnsemblePredictor
from loopos.evaluation.progress import OnProgress
from loopos.models.model_folder import ENSEMBLE, FORMAT, kind_of, model_folder, read_description
from loopos.storage.json_files import save_json
from loopos.storage.output_folder import REPORT, open_output_folder, require_new_folder

_OF_VALUES = ("mean", "weighted")
# A majority's probabilities are made so that 0.5 is the threshold.
_MAJORITY_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """method: one of `METHODS`. fit: labeled rows for the weights of "weighted". test: labeled rows to measure on.
    copy: whether the members are copied. columns: role → column of both files.
    """

    method: str = "mean"
    fit: str | None = None
    test: str | None = None
    copy: bool = False
    columns: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Measured:
    """Results on one file: the metrics of each member, of the ensemble, and the mean of the members'."""

    source: str
    by_member: list[dict[str, float]]
    together: dict[str, Any]

    @property
    def mean(self) -> dict[str, float]:
        """The mean of each metric that every member has."""
        shared = [name for name in self.by_member[0] if all(name in each for each in self.by_member)]
        return {name: sum(each[name] for each in self.by_member) / len(self.by_member) for name in shared}


@dataclass(frozen=True)
class EnsembleResult:
    """What an ensemble of classifiers or regressors wrote and measured.

    Attributes:
        folder: The ensemble.
        weights: Of the members.
        measured: Results on the rows of `fit` and of `test`.
    """

    folder: Path
    weights: list[float]
    measured: list[Measured]


def combine(
    members: Sequence[str],
    out: Path,
    settings: EnsembleSettings,
    *,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
) -> EnsembleResult:
    """Writes the ensemble `out` of the models in `members`. on_progress: called for each member.

    Raises `UserError` before anything is written: for fewer than two members, members of other tasks or labels, an
    unsuitable method; `DataError` for bad rows; `DiskFull`.
    """
    _check(members, settings)
    require_new_folder(out)
    folders = [model_folder(member) for member in members]
    descriptions = [read_description(folder) for folder in folders]
    _check_members(members, folders, descriptions, settings)
    weights = [1.0 / len(folders)] * len(folders)
    paths = [str(folder.resolve()) for folder in folders]
    if settings.fit is not None:
        equal = _description(descriptions, paths, weights, "mean")
        opened = EnsemblePredictor(Path(), equal, device=device, on_progress=on_progress)
        weights = fitted_weights(opened, settings.fit, settings.columns)
    description = _description(descriptions, paths, weights, settings.method)
    opened = EnsemblePredictor(Path(), description, device=device, on_progress=on_progress)
    measured = []
    for source in dict.fromkeys(each for each in (settings.fit, settings.test) if each is not None):
        measured.append(Measured(source, *opened.judge(source, settings.columns)))
    copied = folders if settings.copy else []
    needed = sum(file.stat().st_size for folder in copied for file in folder.iterdir())
    with open_output_folder(out, needed, "the ensemble") as partial:
        if settings.copy:
            paths = _copied(folders, partial)
        else:
            # Relative paths, so that members and ensemble can move together.
            paths = [os.path.relpath(path, out.absolute()) for path in paths]
        save_json(partial / MODEL_DESCRIPTION, _description(descriptions, paths, weights, settings.method))
        recipe = {"command": "ensemble", "members": list(members), **asdict(settings), "weights": weights}
        save_json(partial / RECIPE, recipe)
        report = _report(out.name, members, weights, settings, measured)
        (partial / REPORT).write_text(report, encoding="utf-8")
    return EnsembleResult(out, weights, measured)


def fitted_weights(ensemble: EnsemblePredictor, source: str, columns: Mapping[str, str] | None) -> list[float]:
    """Weights of the members that minimize the mixture's loss on labeled rows: log-loss in nats (for each label
    separately if there may be several), or squared error. Raises `DataError` for bad rows.
    """
    summary, targets = ensemble.truths(source, columns)
    if ensemble.space.task == "regression":
        found: Floats = squared_error_weights(numpy.stack(summary, axis=1), numpy.asarray(targets, dtype=numpy.float64))
        return [float(weight) for weight in found]
    if ensemble.space.task == "classification":
        rows = numpy.arange(len(targets))
        truths = [meaning[rows, numpy.asarray(targets, dtype=numpy.int64)] for meaning in summary]
    else:
        labels = numpy.asarray(targets, dtype=bool)
        truths = [numpy.where(labels, meaning, 1.0 - meaning).ravel() for meaning in summary]
    return [float(weight) for weight in log_loss_weights(numpy.stack(truths, axis=1))]


def _check(members: Sequence[str], settings: EnsembleSettings) -> None:
    if settings.method not in METHODS:
        raise UserError(f"--method: got {settings.method}; expected one of {', '.join(METHODS)}")
    if len(members) < 2:
        raise UserError(f"got {len(members)} model, {members[0]}; expected two or more to combine" if members else
                        "got no model; expected two or more to combine")  # fmt: skip
    if settings.method == "weighted" and settings.fit is None:
        raise UserError("--method weighted: got no rows to fit the weights on; add --fit DATA with labeled rows that "
                        "the members were not trained on")  # fmt: skip
    if settings.method != "weighted" and settings.fit is not None:
        raise UserError(f"--fit: fits weights, but --method {settings.method} has none; use --method weighted, or "
                        "--test to only measure")  # fmt: skip


def _check_members(
    members: Sequence[str],
    folders: Sequence[Path],
    descriptions: Sequence[Mapping[str, Any]],
    settings: EnsembleSettings,
) -> None:
    """Raises `UserError` for members that cannot be combined."""
    for member, description in zip(members, descriptions, strict=True):
        kind = kind_of(description)
        if kind == "reward":
            raise UserError(
                f"{member}: a reward model; reward models are combined where they are used: list them under "
                "data.reward_model of a ppo config. Expected classifiers or regressors"
            )
        if kind == "ensemble":
            raise UserError(f"{member}: already an ensemble; expected single models: name its members")
        if kind == "language":
            raise UserError(f"{member}: a language model, which has no labels; expected classifiers or regressors")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same model occurs twice; expected different models")
    first, *others = descriptions
    for member, description in zip(members[1:], others, strict=True):
        if description["task"] != first["task"]:
            raise UserError(
                f"{member}: a model of task {description['task']}, {members[0]} of task {first['task']}; expected "
                "members of one task"
            )
        expected, actual = _classes(first), _classes(description)
        if expected != actual:
            surplus = ", ".join(
                f"{key} ({name})" if key != name else key for key, name in sorted(actual.items() - expected.items())
            )
            missing = ", ".join(
                f"{key} ({name})" if key != name else key for key, name in sorted(expected.items() - actual.items())
            )
            raise UserError(
                f"{member}: other labels than {members[0]}: {surplus or 'none'} only here, {missing or 'none'} only "
                "there; expected members with the same labels"
            )
    if first["task"] == "regression" and settings.method not in _OF_VALUES:
        raise UserError(
            f"--method: got {settings.method}, but the members are regressors; expected one of {', '.join(_OF_VALUES)}"
        )


def _classes(description: Mapping[str, Any]) -> dict[str, str]:
    """Key of a class → its name."""
    space = description["label_space"]
    return dict(zip(space["keys"], space["class_names"], strict=True))


def _description(
    descriptions: Sequence[Mapping[str, Any]], paths: Sequence[str], weights: Sequence[float], method: str
) -> dict[str, Any]:
    """The folder's description: the first member's labels, and the members."""
    first = descriptions[0]
    threshold = _MAJORITY_THRESHOLD
    if method != "majority":
        threshold = sum(w * each["threshold"] for w, each in zip(weights, descriptions, strict=True))
    return {
        "format": FORMAT,
        "method": "ensemble",
        "task": first["task"],
        "class_names": list(first["class_names"]),
        "label_space": dict(first["label_space"]),
        "threshold": threshold,
        "columns": dict(first.get("columns", {})),
        ENSEMBLE: {"method": method, "members": list(paths), "weights": list(weights)},
    }


def _copied(folders: Sequence[Path], partial: Path) -> list[str]:
    """The members' folders inside the ensemble's."""
    paths = []
    for number, folder in enumerate(folders, start=1):
        path = f"members/{number}"
        shutil.copytree(folder, partial / path)
        paths.append(path)
    return paths


def _report(
    name: str,
    members: Sequence[str],
    weights: Sequence[float],
    settings: EnsembleSettings,
    measured: Sequence[Measured],
) -> str:
    """report.md: the members with their weights, and the metrics of each, their mean, and the ensemble's."""
    parts = [
        f"# Ensemble {name}",
        f"{len(members)} members, combined by {settings.method}.",
        table(["member", "weight"], [[f"`{each}`", shown(w)] for each, w in zip(members, weights, strict=True)]),
    ]
    for each in measured:
        names = list(each.mean)
        rows = [[f"`{member}`", *(shown(metrics[metric]) for metric in names)]
                for member, metrics in zip(members, each.by_member, strict=True)]  # fmt: skip
        rows.append(["mean of the members", *(shown(each.mean[metric]) for metric in names)])
        rows.append(["**ensemble**", *(shown(each.together[metric]) for metric in names)])
        hint = (
            " The weights were fitted on these rows, so the ensemble's figures are optimistic."
            if each.source == settings.fit
            else ""
        )
        parts += [f"## On `{os.path.basename(each.source)}`", f"{each.together['rows']:,} rows.{hint}"]
        parts.append(table(["", *names], rows))
    if not measured:
        parts.append("Not measured: no labeled rows (`--test`).")
    return "\n\n".join(parts) + "\n"
