"""Classifiers or regressors, joined to one model.

Enters: folders of trained task models, a way to join them, and labelled rows. Leaves: a folder, whole or not at all,
that `loopos.load`, `loopos predict` and `loopos evaluate` open as one model, with report.md and recipe.json. Left out:
joining itself (`evaluation.combining`), reward models (`ppo` joins those).
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
from loopos.evaluation.progress import Tell
from loopos.models.model_folder import ENSEMBLE, FORMAT, kind_of, model_folder, read_description
from loopos.storage.json_files import save_json
from loopos.storage.output_folder import REPORT, open_output_folder, require_new_folder

_OF_VALUES = ("mean", "weighted")
# A majority's probabilities are made so that half marks the line.
_MAJORITY_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """method: one of `METHODS`. fit: labelled rows for the weights of "weighted". test: labelled rows to measure on.
    copy: whether the members are copied. columns: role → column of both files.
    """

    method: str = "mean"
    fit: str | None = None
    test: str | None = None
    copy: bool = False
    columns: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Measured:
    """On one file: the metrics of each member, of the ensemble, and the mean of the members'."""

    source: str
    alone: list[dict[str, float]]
    together: dict[str, Any]

    @property
    def mean(self) -> dict[str, float]:
        """Of the metrics that every member has."""
        shared = [name for name in self.alone[0] if all(name in each for each in self.alone)]
        return {name: sum(each[name] for each in self.alone) / len(self.alone) for name in shared}


@dataclass(frozen=True)
class Joined:
    """The folder, the weights of its members, and what was measured, on the rows of `fit` and of `test`."""

    folder: Path
    weights: list[float]
    measured: list[Measured]


def join(
    members: Sequence[str],
    out: Path,
    settings: EnsembleSettings,
    *,
    device: str = "cpu",
    tell: Tell | None = None,
) -> Joined:
    """Makes the ensemble `out` of the models in `members`. tell: is told of progress, member by member.

    Raises `UserError` before anything is written: for fewer than two members, members of other tasks or labels, a
    method that does not suit; `DataError` for bad rows; `DiskFull`.
    """
    _check(members, settings)
    require_new_folder(out)
    folders = [model_folder(member) for member in members]
    descriptions = [read_description(folder) for folder in folders]
    _check_members(members, folders, descriptions, settings)
    weights = [1.0 / len(folders)] * len(folders)
    places = [str(folder.resolve()) for folder in folders]
    if settings.fit is not None:
        equal = _description(descriptions, places, weights, "mean")
        opened = EnsemblePredictor(Path(), equal, device=device, tell=tell)
        weights = fitted_weights(opened, settings.fit, settings.columns)
    description = _description(descriptions, places, weights, settings.method)
    opened = EnsemblePredictor(Path(), description, device=device, tell=tell)
    measured = []
    for source in dict.fromkeys(each for each in (settings.fit, settings.test) if each is not None):
        measured.append(Measured(source, *opened.judge(source, settings.columns)))
    copied = folders if settings.copy else []
    needed = sum(file.stat().st_size for folder in copied for file in folder.iterdir())
    with open_output_folder(out, needed, "the ensemble") as partial:
        if settings.copy:
            places = _copied(folders, partial)
        else:
            # Beside each other they may move together.
            places = [os.path.relpath(place, out.absolute()) for place in places]
        save_json(partial / MODEL_DESCRIPTION, _description(descriptions, places, weights, settings.method))
        recipe = {"command": "ensemble", "members": list(members), **asdict(settings), "weights": weights}
        save_json(partial / RECIPE, recipe)
        report = _report(out.name, members, weights, settings, measured)
        (partial / REPORT).write_text(report, encoding="utf-8")
    return Joined(out, weights, measured)


def fitted_weights(ensemble: EnsemblePredictor, source: str, columns: Mapping[str, str] | None) -> list[float]:
    """Weights of the members that make the mixture's loss on labelled rows least: log-loss in nats (of each label by
    itself where there may be several), or squared error. Raises `DataError` for bad rows.
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
        raise UserError(f"got {len(members)} model, {members[0]}; expected two or more to join" if members else
                        "got no model; expected two or more to join")  # fmt: skip
    if settings.method == "weighted" and settings.fit is None:
        raise UserError("--method weighted: got no rows to fit the weights on; expected --fit DATA, labelled rows that "
                        "the members were not trained on")  # fmt: skip
    if settings.method != "weighted" and settings.fit is not None:
        raise UserError(f"--fit: fits weights, and --method {settings.method} has none; expected --method weighted, or "
                        "--test to measure alone")  # fmt: skip


def _check_members(
    members: Sequence[str],
    folders: Sequence[Path],
    descriptions: Sequence[Mapping[str, Any]],
    settings: EnsembleSettings,
) -> None:
    """Raises `UserError` for members that cannot be joined."""
    for place, description in zip(members, descriptions, strict=True):
        kind = kind_of(description)
        if kind == "reward":
            raise UserError(
                f"{place}: a reward model; several of them are joined where they are used: list them under "
                "data.reward_model of a ppo config. Wanted classifiers or regressors"
            )
        if kind == "ensemble":
            raise UserError(f"{place}: an ensemble already; expected single models: name its members")
        if kind == "language":
            raise UserError(f"{place}: a language model, which has no labels; expected classifiers or regressors")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("one model is given twice; expected different ones: they would only agree")
    first, *others = descriptions
    for place, description in zip(members[1:], others, strict=True):
        if description["task"] != first["task"]:
            raise UserError(
                f"{place}: a model of task {description['task']}, {members[0]} of task {first['task']}; expected "
                "members of one task"
            )
        ours, theirs = _classes(first), _classes(description)
        if ours != theirs:
            here = ", ".join(
                f"{key} ({name})" if key != name else key for key, name in sorted(theirs.items() - ours.items())
            )
            there = ", ".join(
                f"{key} ({name})" if key != name else key for key, name in sorted(ours.items() - theirs.items())
            )
            raise UserError(
                f"{place}: other labels than {members[0]}: {here or 'none'} here alone, {there or 'none'} there alone; "
                "expected members with the same labels"
            )
    if first["task"] == "regression" and settings.method not in _OF_VALUES:
        raise UserError(
            f"--method: got {settings.method}, but these members give values; expected one of {', '.join(_OF_VALUES)}"
        )


def _classes(description: Mapping[str, Any]) -> dict[str, str]:
    """Key of a class → its name."""
    space = description["label_space"]
    return dict(zip(space["keys"], space["class_names"], strict=True))


def _description(
    descriptions: Sequence[Mapping[str, Any]], places: Sequence[str], weights: Sequence[float], method: str
) -> dict[str, Any]:
    """What the folder says of itself: the first member's labels, and the members."""
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
        ENSEMBLE: {"method": method, "members": list(places), "weights": list(weights)},
    }


def _copied(folders: Sequence[Path], partial: Path) -> list[str]:
    """The members' folders inside the ensemble's."""
    places = []
    for number, folder in enumerate(folders, start=1):
        place = f"members/{number}"
        shutil.copytree(folder, partial / place)
        places.append(place)
    return places


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
        f"{len(members)} members, joined by {settings.method}.",
        table(["member", "weight"], [[f"`{each}`", shown(w)] for each, w in zip(members, weights, strict=True)]),
    ]
    for each in measured:
        names = list(each.mean)
        rows = [[f"`{member}`", *(shown(alone[metric]) for metric in names)]
                for member, alone in zip(members, each.alone, strict=True)]  # fmt: skip
        rows.append(["mean of the members", *(shown(each.mean[metric]) for metric in names)])
        rows.append(["**ensemble**", *(shown(each.together[metric]) for metric in names)])
        told = (
            " The weights were fitted on these rows, so its figure here flatters it."
            if each.source == settings.fit
            else ""
        )
        parts += [f"## On `{os.path.basename(each.source)}`", f"{each.together['rows']:,} rows.{told}"]
        parts.append(table(["", *names], rows))
    if not measured:
        parts.append("Not measured: no labelled rows were given (`--test`).")
    return "\n\n".join(parts) + "\n"
