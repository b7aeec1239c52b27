"""Combines several models into one folder that opens as a single model, with report.md and recipe.json.

In: names of classifiers or regressors, whose outputs are combined (`evaluation.combining`), or of language models,
which sample from their mixed distributions or vote on answers. Out: running the ensemble; `models.resolve` reads its
recipe back.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy

from loopos.config.diagnostics import UserError
from loopos.config.paths import MODEL_DESCRIPTION, RECIPE, expanded
from loopos.data.rows import is_plain_text, read_plain_text
from loopos.evaluation.blocks import shown, table
from loopos.evaluation.combining import Floats, log_loss_weights, squared_error_weights
from loopos.evaluation.perplexity import text_loss
from loopos.evaluation.predictor import EnsemblePredictor
from loopos.evaluation.progress import OnProgress, silent
from loopos.evaluation.quality import DROPPED, dropped_summary, row_metrics
from loopos.models.description import ENSEMBLE, FORMAT, LANGUAGE_ENSEMBLE
from loopos.models.folders import open_generation_model
from loopos.models.language_ensemble import check_one_vocabulary
from loopos.models.load import load_config
from loopos.models.resolve import (
    HEAD_METHODS,
    LANGUAGE_METHODS,
    VOTE,
    EnsembleRecipe,
    ModelRef,
    described_members,
    resolve_trained,
)
from loopos.models.tokenizers import open_tokenizer
from loopos.storage.json_files import save_json
from loopos.storage.manifest import check_manifest
from loopos.storage.output_folder import REPORT, open_output_folder, require_new_folder

_OF_VALUES = ("mean", "weighted")
# A majority's probabilities are made so that 0.5 is the threshold.
_MAJORITY_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """method: one of `HEAD_METHODS`, for language models of `LANGUAGE_METHODS`. test: a file to measure on. copy:
    whether members in folders are copied.

    For models with a head, fit: labeled rows for the weights of "weighted"; columns: role → column of both files. For
    language models, weights: a non-negative number for each member, in proportion; empty: equal.
    """

    method: str = "mean"
    weights: tuple[float, ...] = ()
    fit: str | None = None
    test: str | None = None
    copy: bool = False
    columns: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Measured:
    """Results on one file: the metrics of each member, and of the ensemble."""

    source: str
    by_member: list[dict[str, float]]
    together: dict[str, Any]

    @property
    def mean(self) -> dict[str, float]:
        """The mean of each metric that every member and the ensemble have."""
        names = [name for name in self.by_member[0] if all(name in each for each in [*self.by_member, self.together])]
        return {name: sum(each[name] for each in self.by_member) / len(self.by_member) for name in names}

    @property
    def ensemble(self) -> dict[str, float]:
        """The ensemble's figures."""
        return {name: self.together[name] for name in [*self.mean, DROPPED] if name in self.together}


@dataclass(frozen=True)
class EnsembleResult:
    """What an ensemble wrote and measured.

    Attributes:
        folder: The ensemble.
        weights: Of the members; they sum to 1.
        measured: Results on `fit` and on `test`.
        notes: Differences between the members, and rows left out.
    """

    folder: Path
    weights: list[float]
    measured: list[Measured]
    notes: list[str]


@dataclass(frozen=True)
class _Run:
    """What the steps of one combination share."""

    members: Sequence[ModelRef]
    settings: EnsembleSettings
    device: str
    on_progress: OnProgress


_Paths: TypeAlias = Sequence[str | None]


@dataclass(frozen=True)
class _Kind:
    """What differs between kinds of models. own: the settings that only this
    kind has. check: raises `UserError` for members or settings that do not fit, and returns notes. description: of the
    folder, from the run, the weights, and the members' paths (None: by name). measure: an ensemble that is written.
    """

    methods: tuple[str, ...]
    own: tuple[str, ...]
    title: str
    check: Callable[[_Run], list[str]]
    weights: Callable[[_Run], list[float]]
    description: Callable[[_Run, Sequence[float], _Paths], dict[str, Any]]
    measure: Callable[[_Run, str, ModelRef], Measured]


def combine(
    members: Sequence[str],
    out: Path,
    settings: EnsembleSettings,
    *,
    device: str = "cpu",
    on_progress: OnProgress = silent,
) -> EnsembleResult:
    """Writes the ensemble `out` of the models in `members`. on_progress: called for each member.

    Raises `UserError` for fewer than two members, members that do not fit together, an unsuitable method; `DataError`
    for bad rows; `DiskFull`. Nothing is left under the name `out` then.
    """
    if len(members) < 2:
        raise UserError(f"got {len(members)} model{'' if members else 's'}; expected two or more to combine")
    run = _Run([resolve_trained(member) for member in members], settings, device, on_progress)
    for member in run.members:
        if member.is_ensemble:
            raise UserError(f"{member.name}: already an ensemble; expected single models: name its members")
    kind = _LANGUAGE if all(member.kind == "language" for member in run.members) else _HEADS
    if settings.method not in kind.methods:
        raise UserError(f"--method: got {settings.method}; expected one of {', '.join(kind.methods)} for {kind.title}")
    require_new_folder(out)
    if len({_identity(member) for member in run.members}) < len(run.members):
        hint = ", or other --weight values" if kind is _LANGUAGE else ""
        raise UserError(f"the same model occurs twice; use different models{hint}: it would only count twice")
    notes = kind.check(run)
    weights = kind.weights(run)
    tested = [each for each in (settings.fit, settings.test) if each is not None]
    needed = sum(map(_bytes, run.members)) if settings.copy else 0
    with open_output_folder(out, needed, "the ensemble") as partial:
        paths = [_path(member, number, partial, out, settings.copy) for number, member in enumerate(run.members, 1)]
        save_json(partial / MODEL_DESCRIPTION, {"format": FORMAT, **kind.description(run, weights, paths)})
        # The partial folder is beside the final one, so that the members' relative paths are valid here too.
        written = resolve_trained(partial) if tested else None
        measured = [kind.measure(run, source, written) for source in dict.fromkeys(tested) if written is not None]
        for each in measured:
            by_name = {**dict(zip(members, each.by_member, strict=True)), "the ensemble": each.together}
            notes += dropped_summary(each.source, by_name)
        own = (*kind.own, "method", "test", "copy")
        chosen = {name: value for name, value in asdict(settings).items() if name in own}
        recipe = {"command": "ensemble", "members": list(members), **chosen, "weights": weights}
        save_json(partial / RECIPE, recipe)
        result = EnsembleResult(out, weights, measured, notes)
        (partial / REPORT).write_text(_report(members, settings, result), encoding="utf-8")
    return result


def _identity(member: ModelRef) -> str:
    return str(member.path.resolve()) if member.path is not None else member.name


def _has_path(member: ModelRef) -> bool:
    """Whether the member is given by a path, and not as the embedded model or a hub id."""
    return member.path is not None and Path(expanded(member.name)).exists()


def _bytes(member: ModelRef) -> int:
    if not _has_path(member) or member.path is None or not member.path.is_dir():
        return 0
    return sum(file.stat().st_size for file in member.path.rglob("*") if file.is_file())


def _path(member: ModelRef, number: int, partial: Path, out: Path, copy: bool) -> str | None:
    """The path of a member, relative to the ensemble's folder, so that both can move together; None for one without a
    path. copy: it is copied there.
    """
    if not _has_path(member):
        return None
    assert member.path is not None
    if not copy:
        return os.path.relpath(member.path.resolve(), out.absolute())
    check_manifest(member.path)
    path = f"members/{number}"
    shutil.copytree(member.path, partial / path)
    return path


def _report(members: Sequence[str], settings: EnsembleSettings, result: EnsembleResult) -> str:
    """report.md: the members with their weights, and the metrics of each, their mean, and the ensemble's."""
    parts = [
        f"# Ensemble {result.folder.name}",
        f"{len(members)} members, combined by {settings.method}.",
        table(["member", "weight"], [[f"`{each}`", shown(w)] for each, w in zip(members, result.weights, strict=True)]),
        *result.notes,
    ]
    for each in result.measured:
        names = list(each.mean)
        rows = [[f"`{member}`", *(shown(metrics[metric]) for metric in names)]
                for member, metrics in zip(members, each.by_member, strict=True)]  # fmt: skip
        rows.append(["mean of the members", *(shown(each.mean[metric]) for metric in names)])
        rows.append(["**ensemble**", *(shown(each.together[metric]) for metric in names)])
        parts.append(f"## On `{os.path.basename(each.source)}`")
        if "rows" in each.together:
            parts.append(f"{each.together['rows']:,} rows.")
        if each.source == settings.fit:
            parts.append("The weights were fitted on these rows, so the ensemble's figures are optimistic.")
        parts.append(table(["", *names], rows))
    if not result.measured:
        parts.append("Not measured: no test file (`--test`).")
    return "\n\n".join(parts) + "\n"


def _check_heads(run: _Run) -> list[str]:
    """Raises `UserError` for members that are not all classifiers of the same labels, or all regressors."""
    settings = run.settings
    if settings.weights:
        raise UserError("--weight: only for language models; use --method weighted, which fits the weights on --fit")
    if settings.method == "weighted" and settings.fit is None:
        raise UserError("--method weighted: got no rows to fit the weights on; add --fit DATA with labeled rows that "
                        "the members were not trained on")  # fmt: skip
    if settings.method != "weighted" and settings.fit is not None:
        raise UserError(f"--fit: fits weights, but --method {settings.method} has none; use --method weighted, or "
                        "--test to only measure")  # fmt: skip
    for member in run.members:
        if member.kind == "reward":
            raise UserError(
                f"{member.name}: a reward model; reward models are combined where they are used: list them under "
                "data.reward_model of a ppo config. Expected classifiers or regressors"
            )
        if member.kind == "language":
            raise UserError(f"{member.name}: a language model, which has no labels; expected classifiers or regressors")
    first, *others = run.members
    for member in others:
        if member.description["task"] != first.description["task"]:
            raise UserError(
                f"{member.name}: a model of task {member.description['task']}, {first.name} of task "
                f"{first.description['task']}; expected members of one task"
            )
        expected, actual = _classes(first), _classes(member)
        if expected != actual:
            raise UserError(
                f"{member.name}: other labels than {first.name}: {_listed(actual, expected)} only here, "
                f"{_listed(expected, actual)} only there; expected members with the same labels"
            )
    if first.description["task"] == "regression" and settings.method not in _OF_VALUES:
        raise UserError(
            f"--method: got {settings.method}, but the members are regressors; expected one of {', '.join(_OF_VALUES)}"
        )
    return []


def _classes(member: ModelRef) -> dict[str, str]:
    """Key of a class → its name."""
    space = member.description["label_space"]
    return dict(zip(space["keys"], space["class_names"], strict=True))


def _listed(classes: Mapping[str, str], others: Mapping[str, str]) -> str:
    """The classes that are not among the others."""
    surplus = sorted(classes.items() - others.items())
    return ", ".join(f"{key} ({name})" if key != name else key for key, name in surplus) or "none"


def _head_weights(run: _Run) -> list[float]:
    """Equal weights, or fitted ones."""
    equal = [1.0 / len(run.members)] * len(run.members)
    if run.settings.fit is None:
        return equal
    paths = [str(member.path.resolve()) for member in run.members if member.path is not None]
    recipe = EnsembleRecipe("mean", tuple(paths), tuple(equal))
    description = _head_description(run, equal, paths)
    ensemble = EnsemblePredictor(recipe, description, device=run.device, on_progress=run.on_progress)
    return fitted_weights(ensemble, run.settings.fit, run.settings.columns)


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


def _head_description(run: _Run, weights: Sequence[float], paths: _Paths) -> dict[str, Any]:
    """The first member's labels, and the members."""
    descriptions = [member.description for member in run.members]
    first, threshold = descriptions[0], _MAJORITY_THRESHOLD
    if run.settings.method != "majority":
        threshold = sum(w * each["threshold"] for w, each in zip(weights, descriptions, strict=True))
    return {
        "method": "ensemble",
        "task": first["task"],
        "class_names": list(first["class_names"]),
        "label_space": dict(first["label_space"]),
        "threshold": threshold,
        "columns": dict(first.get("columns", {})),
        ENSEMBLE: {"method": run.settings.method, "members": list(paths), "weights": list(weights)},
    }


def _measure_heads(run: _Run, source: str, ensemble: ModelRef) -> Measured:
    """All members in one pass over the rows."""
    opened = EnsemblePredictor.open(ensemble, device=run.device, on_progress=run.on_progress)
    return Measured(source, *opened.judge(source, run.settings.columns))


def _check_language(run: _Run) -> list[str]:
    """Raises `UserError` for members whose distributions cannot be mixed; notes where their templates differ."""
    settings, members = run.settings, run.members
    if settings.fit is not None or settings.columns:
        option = "--fit" if settings.fit is not None else "--columns"
        raise UserError(f"{option}: only for classifiers and regressors; {members[0].name} is a language model")
    if settings.weights and settings.method == VOTE:
        raise UserError("--weight: under --method vote every chain has one vote; use --method mean or logits")
    if settings.weights and len(settings.weights) != len(members):
        raise UserError(f"--weight: got {len(settings.weights)} for {len(members)} models; expected one per model")
    if not all(weight >= 0 for weight in settings.weights) or not 0 < math.fsum(settings.weights or [1]) < math.inf:
        raise UserError(f"--weight: got {', '.join(f'{each:g}' for each in settings.weights)}; expected non-negative "
                        "numbers, at least one above 0")  # fmt: skip
    for member in members if settings.copy else ():
        if _has_path(member) and member.storage != "folder":
            what = "an adapter" if member.storage == "adapter" else "a file"
            raise UserError(f"--copy: {member.name} is {what}; expected a model folder, for example from loopos export")
    if settings.method == VOTE:
        return []
    tokenizers = [open_tokenizer(member) for member in members]
    sizes = [int(load_config(member).get_text_config().vocab_size) for member in members]
    check_one_vocabulary([member.name for member in members], tokenizers, sizes)
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in tokenizers]
    return [
        f"{member.name}: another chat template than {members[0].name}, whose template the ensemble uses"
        for member, template in zip(members[1:], templates[1:], strict=True)
        if template != templates[0]
    ]


def _language_weights(run: _Run) -> list[float]:
    actual = run.settings.weights or (1.0,) * len(run.members)
    total = math.fsum(actual)
    return [weight / total for weight in actual]


def _language_description(run: _Run, weights: Sequence[float], paths: _Paths) -> dict[str, Any]:
    members = described_members([member.name for member in run.members], paths)
    return {
        "method": "ensemble",
        LANGUAGE_ENSEMBLE: {"method": run.settings.method, "members": members, "weights": list(weights)},
    }


def _measure_language(run: _Run, source: str, ensemble: ModelRef) -> Measured:
    """Perplexity on running text, or the metrics of rows; each member and the ensemble in turn."""
    if is_plain_text(source) and run.settings.method == VOTE:
        raise UserError(
            f"--test: {source} is running text, but a vote answers problems; expected problems with answers"
        )
    found: list[dict[str, float]] = []
    models = [*run.members, ensemble]
    for number, model in enumerate(models):
        run.on_progress(number, len(models), model.title)
        if not is_plain_text(source):
            found.append(row_metrics(model, source, device=run.device))
            continue
        opened = open_generation_model(model, device=run.device)
        loss = text_loss(opened.model, opened.tokenizer, read_plain_text(source))
        found.append({"perplexity": loss.perplexity, "loss": loss.loss, "bits_per_byte": loss.bits_per_byte})
    run.on_progress(len(models), len(models), "")
    return Measured(source, found[:-1], found[-1])


_HEADS = _Kind(
    methods=HEAD_METHODS,
    own=("fit", "columns"),
    title="classifiers and regressors",
    check=_check_heads,
    weights=_head_weights,
    description=_head_description,
    measure=_measure_heads,
)
_LANGUAGE = _Kind(
    methods=LANGUAGE_METHODS,
    own=(),
    title="language models",
    check=_check_language,
    weights=_language_weights,
    description=_language_description,
    measure=_measure_language,
)
