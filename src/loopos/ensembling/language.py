"""Combines language models into one that samples from their mixed distributions, or answers by a vote.

Writes a folder, with report.md and recipe.json, that generate, chat, evaluate and serve open as one model.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loopos.config.diagnostics import UserError
from loopos.config.paths import MODEL_DESCRIPTION, RECIPE, expanded
from loopos.data.rows import is_plain_text, read_plain_text
from loopos.evaluation.blocks import shown, table
from loopos.evaluation.perplexity import text_loss
from loopos.evaluation.progress import OnProgress
from loopos.evaluation.quality import dropped_summary, row_metrics
from loopos.models.ensemble_recipe import LANGUAGE_METHODS, VOTE, described_members, read_ensemble
from loopos.models.language_ensemble import check_one_vocabulary
from loopos.models.load import load_config
from loopos.models.model_folder import FORMAT, LANGUAGE_ENSEMBLE
from loopos.models.opened import open_generation_model
from loopos.models.resolve import WeightsSource, weights_source
from loopos.models.tokenizers import open_tokenizer
from loopos.storage.json_files import save_json
from loopos.storage.manifest import check_manifest
from loopos.storage.output_folder import REPORT, open_output_folder, require_new_folder


@dataclass(frozen=True, kw_only=True)
class LanguageEnsembleSettings:
    """method: one of `LANGUAGE_METHODS`. weights: a non-negative number for each member, in proportion; empty: equal.
    test: a file to measure on. copy: whether members in folders are copied.
    """

    method: str = "mean"
    weights: tuple[float, ...] = ()
    test: str | None = None
    copy: bool = False


@dataclass(frozen=True)
class LanguageEnsembleResult:
    """What an ensemble of language models wrote and measured.

    Attributes:
        folder: The ensemble.
        weights: Of the members; they sum to 1.
        by_member: Metrics of each member on the test.
        together: Metrics of the ensemble on the test.
        notes: Differences between the members, and rows left out.
    """

    folder: Path
    weights: tuple[float, ...]
    by_member: list[dict[str, float]]
    together: dict[str, float]
    notes: list[str]


def combine_language(
    members: Sequence[str],
    out: Path,
    settings: LanguageEnsembleSettings,
    *,
    device: str = "cpu",
    on_progress: OnProgress = lambda done, total, name: None,
) -> LanguageEnsembleResult:
    """Writes the ensemble `out` of the language models in `members`. on_progress: called for each model.

    Raises `UserError` before anything is written: for fewer than two members, a member that occurs twice, unsuitable
    weights, members with other tokens if distributions are mixed; `DiskFull`.
    """
    _check(members, settings)
    require_new_folder(out)
    sources = [_source(member, copy=settings.copy) for member in members]
    if len({_identity(source) for source in sources}) < len(sources):
        raise UserError(
            "the same model occurs twice; use different models, or other --weight values: it would only count twice"
        )
    tokenizers = [open_tokenizer(source) for source in sources]
    if settings.method != VOTE:
        sizes = [int(load_config(member).get_text_config().vocab_size) for member in members]
        check_one_vocabulary(members, tokenizers, sizes)
    weights = _weights(settings.weights, len(members))
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in tokenizers]
    notes = [
        f"{member}: another chat template than {members[0]}, whose template the ensemble uses"
        for member, template in zip(members[1:], templates[1:], strict=True)
        if settings.method != VOTE and template != templates[0]
    ]
    by_member: list[dict[str, float]] = []
    together: dict[str, float] = {}
    total = len(members) + 1
    for number, member in enumerate(members if settings.test is not None else ()):
        on_progress(number, total, member)
        by_member.append(_measured(member, str(settings.test), device))
    needed = sum(_bytes(source) for source in sources) if settings.copy else 0
    with open_output_folder(out, needed, "the ensemble") as partial:
        paths = [_path(source, number, partial, out, copy=settings.copy) for number, source in enumerate(sources, 1)]
        description = {
            "method": settings.method,
            "members": described_members(members, paths),
            "weights": list(weights),
        }
        save_json(partial / MODEL_DESCRIPTION, {"format": FORMAT, "method": "ensemble", LANGUAGE_ENSEMBLE: description})
        if settings.test is not None:
            on_progress(len(members), total, out.name)
            # The partial folder is beside the final one, so that relative paths are valid here too.
            together = _measured(str(partial), settings.test, device)
            both = {**dict(zip(members, by_member, strict=True)), "the ensemble": together}
            notes += dropped_summary(settings.test, both)
        recipe = {"command": "ensemble", "members": list(members), **asdict(settings), "weights": list(weights)}
        save_json(partial / RECIPE, recipe)
        result = LanguageEnsembleResult(out, weights, by_member, together, notes)
        (partial / REPORT).write_text(_report(members, settings, result), encoding="utf-8")
    on_progress(total, total, "")
    return result


def _check(members: Sequence[str], settings: LanguageEnsembleSettings) -> None:
    if settings.method not in LANGUAGE_METHODS:
        raise UserError(
            f"--method: got {settings.method}; expected one of {', '.join(LANGUAGE_METHODS)} for language models"
        )
    if len(members) < 2:
        raise UserError(f"got {len(members)} model; expected two or more to combine")
    for member in members:
        if read_ensemble(member) is not None:
            raise UserError(f"{member}: already an ensemble; expected single models: name its members")
    if settings.weights and settings.method == VOTE:
        raise UserError("--weight: under --method vote every chain has one vote; use --method mean or logits")
    if settings.weights and len(settings.weights) != len(members):
        raise UserError(f"--weight: got {len(settings.weights)} for {len(members)} models; expected one per model")


def _weights(actual: Sequence[float], number: int) -> tuple[float, ...]:
    if not actual:
        return (1.0 / number,) * number
    total = math.fsum(actual)
    if not (all(weight >= 0 for weight in actual) and 0 < total < math.inf):
        raise UserError(f"--weight: got {', '.join(f'{each:g}' for each in actual)}; expected non-negative numbers, "
                        "at least one above 0")  # fmt: skip
    return tuple(weight / total for weight in actual)


def _source(member: str, *, copy: bool) -> WeightsSource:
    source = weights_source(member)
    if source.kind == "new":
        raise UserError('got "new", an untrained model; expected trained models')
    if copy and _has_path(source) and source.kind != "folder":
        what = "an adapter" if source.kind == "adapter" else "a file"
        raise UserError(f"--copy: {member} is {what}; expected a model folder, for example from loopos export")
    return source


def _identity(source: WeightsSource) -> str:
    return str(source.path.resolve()) if source.path is not None else source.name


def _has_path(source: WeightsSource) -> bool:
    """Whether the member is given by a path, and not as the embedded model or a hub id."""
    return source.path is not None and Path(expanded(source.name)).exists()


def _bytes(source: WeightsSource) -> int:
    if not _has_path(source) or source.path is None or not source.path.is_dir():
        return 0
    return sum(file.stat().st_size for file in source.path.rglob("*") if file.is_file())


def _path(source: WeightsSource, number: int, partial: Path, out: Path, *, copy: bool) -> str | None:
    """The path of a member, relative to the ensemble's folder; None for one without a path. copy: it is copied
    there.
    """
    if not _has_path(source):
        return None
    assert source.path is not None
    if not copy:
        return os.path.relpath(source.path.resolve(), out.absolute())
    if source.path.is_dir():
        check_manifest(source.path)
    path = f"members/{number}"
    shutil.copytree(source.path, partial / path)
    return path


def _measured(location: str, source: str, device: str) -> dict[str, float]:
    """Perplexity on running text, or the metrics of rows."""
    if not is_plain_text(source):
        return row_metrics(location, source, device=device)
    recipe = read_ensemble(location)
    if recipe is not None and recipe.votes:
        raise UserError(
            f"--test: {source} is running text, but a vote answers problems; expected problems with answers"
        )
    opened = open_generation_model(location, device=device)
    found = text_loss(opened.model, opened.tokenizer, read_plain_text(source))
    return {"perplexity": found.perplexity, "loss": found.loss, "bits_per_byte": found.bits_per_byte}


def _report(members: Sequence[str], settings: LanguageEnsembleSettings, result: LanguageEnsembleResult) -> str:
    """report.md: the members with their weights, and the metrics of each and of the ensemble."""
    how = "a vote over answers" if settings.method == VOTE else f"the {settings.method} of their distributions"
    weights = [[f"`{member}`", shown(weight)] for member, weight in zip(members, result.weights, strict=True)]
    parts = [f"# Ensemble {result.folder.name}", f"{len(members)} language models, combined by {how}."]
    parts.append(table(["member", "weight"], weights))
    parts += result.notes
    if settings.test is None:
        return "\n\n".join([*parts, "Not measured: no test file (`--test`)."]) + "\n"
    names = list(result.together)
    rows = [[f"`{member}`", *(shown(metrics[name]) for name in names)]
            for member, metrics in zip(members, result.by_member, strict=True)]  # fmt: skip
    rows.append(["**ensemble**", *(shown(result.together[name]) for name in names)])
    return "\n\n".join([*parts, f"## On `{os.path.basename(settings.test)}`", table(["", *names], rows)]) + "\n"
