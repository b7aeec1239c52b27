"""`loopos ensemble`: combines classifiers, regressors or language models into one model.

Prints the metrics of each member and of the ensemble. The work is in `loopos.ensembling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loopos.cli.answers import say, say_json, table
from loopos.cli.bar import Bar
from loopos.cli.columns import parse_columns
from loopos.cli.opened_models import is_task_model
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.sampling_options import refuse
from loopos.config.diagnostics import UserError


@dataclass(frozen=True, slots=True)
class EnsembleOptions:
    """The options of `loopos ensemble`."""

    output: Path
    method: str = "mean"
    weights: tuple[float, ...] = ()
    fit: str | None = None
    test: str | None = None
    copy: bool = False
    columns: tuple[str, ...] = ()
    device: str = "auto"
    json: bool = False
    verbose: bool = False


def run(members: Sequence[str], options: EnsembleOptions) -> int:
    """Combines classifiers or regressors and prints the result. Raises `UserError`."""
    columns = parse_columns(options.columns)
    if members and not any(is_task_model(member) for member in members):
        return _run_language(members, options)
    if options.weights:
        raise UserError("--weight: only for language models; use --method weighted, which fits the weights on --fit")
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.ensembling.heads import EnsembleSettings, combine
    from loopos.training.precision import pick_device

    settings = EnsembleSettings(
        method=options.method, fit=options.fit, test=options.test, copy=options.copy, columns=columns
    )
    with Bar("members") as bar:
        ensemble = combine(
            members, options.output, settings, device=pick_device(options.device).type, on_progress=bar.progress
        )
    if options.json:
        say_json(
            {
                "folder": str(ensemble.folder),
                "method": options.method,
                "weights": dict(zip(members, ensemble.weights, strict=True)),
                "measured": [
                    {
                        "source": each.source,
                        "members": dict(zip(members, each.by_member, strict=True)),
                        "mean": each.mean,
                        "ensemble": {name: each.together[name] for name in each.mean},
                        "rows": each.together["rows"],
                    }
                    for each in ensemble.measured
                ],
            }
        )
        return 0
    say(f"{ensemble.folder}: {len(members)} members combined by {options.method}")
    say(table(list(zip(members, ensemble.weights, strict=True)), head=("member", "weight")))
    for each in ensemble.measured:
        names = list(each.mean)
        rows: list[list[object]] = [
            [member, *(metrics[name] for name in names)]
            for member, metrics in zip(members, each.by_member, strict=True)
        ]
        rows += [["mean", *each.mean.values()], ["ensemble", *(each.together[name] for name in names)]]
        say(f"{each.source}: {each.together['rows']:,} rows")
        say(table(rows, head=("", *names)))
    return 0


def _run_language(members: Sequence[str], options: EnsembleOptions) -> int:
    """Combines language models and prints the result. Raises `UserError`."""
    idle = (("--fit", options.fit is not None), ("--columns", bool(options.columns)))
    expected = f"only for classifiers and regressors; {members[0]} is a language model"
    refuse([f"{name}: {expected}" for name, actual in idle if actual])
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.ensembling.language import LanguageEnsembleSettings, combine_language
    from loopos.training.precision import pick_device

    settings = LanguageEnsembleSettings(
        method=options.method, weights=options.weights, test=options.test, copy=options.copy
    )
    with Bar("members") as bar:
        device = pick_device(options.device).type
        ensemble = combine_language(members, options.output, settings, device=device, on_progress=bar.progress)
    for sentence in ensemble.notes:
        note(f"note: {sentence}")
    weights = dict(zip(members, ensemble.weights, strict=True))
    if options.json:
        metrics = {"source": options.test, "members": dict(zip(members, ensemble.by_member, strict=False)),
                   "ensemble": ensemble.together}  # fmt: skip
        measured = [metrics] if options.test is not None else []
        say_json({"folder": str(ensemble.folder), "method": options.method, "weights": weights, "measured": measured})
        return 0
    say(f"{ensemble.folder}: {len(members)} language models combined by {options.method}")
    say(table(list(weights.items()), head=("member", "weight")))
    if options.test is not None:
        names = list(ensemble.together)
        rows: list[list[object]] = [
            [member, *(metrics[name] for name in names)]
            for member, metrics in zip(members, ensemble.by_member, strict=True)
        ]
        say(table([*rows, ["ensemble", *ensemble.together.values()]], head=("", *names)))
    return 0
