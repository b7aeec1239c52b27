"""`loopos ensemble`: combines classifiers, regressors or language models into one model.

Prints the metrics of each member and of the ensemble. The work is in `loopos.ensembling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import typer

from loopos.cli.answers import say, say_json, table
from loopos.cli.options import Columns, Device, Json, NewFolder, Verbose, argument, parse_columns, refuse
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded

Members = Annotated[
    tuple[str, ...],
    argument("MODEL...", "Runs or model folders of one task, or language models."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleOptions:
    """The options of `loopos ensemble`."""

    output: NewFolder
    method: str = field(
        default="mean",
        metadata={"help": "mean, logits, weighted or majority; for language models also vote."},
    )
    weight: tuple[float, ...] = field(
        default=(), metadata={"help": "Weight of each language model, in order; repeatable."}
    )
    fit: Annotated[
        str | None,
        typer.Option("--fit", metavar="DATA", help="Labeled rows to fit the weights on.", parser=expanded),
    ] = None
    test: Annotated[
        str | None,
        typer.Option(
            "--test", metavar="DATA", help="Rows or text to evaluate members and ensemble on.", parser=expanded
        ),
    ] = None
    copy: bool = field(
        default=False, metadata={"help": "Copy the members into the folder instead of storing their paths."}
    )
    columns: Columns = ()
    device: Device = "auto"
    json: Json = False
    verbose: Verbose = False


def run(members: Members, options: EnsembleOptions) -> int:
    """Combines classifiers or regressors and prints the result. Raises `UserError`."""
    from loopos.cli.opened_models import is_task_model

    columns = parse_columns(options.columns)
    if members and not any(is_task_model(member) for member in members):
        return _run_language(members, options)
    if options.weight:
        raise UserError("--weight: only for language models; use --method weighted, which fits the weights on --fit")
    prepare_to_compute(verbose=options.verbose)
    from loopos.cli.bar import Bar
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
    prepare_to_compute(verbose=options.verbose)
    from loopos.cli.bar import Bar
    from loopos.ensembling.language import LanguageEnsembleSettings, combine_language
    from loopos.training.precision import pick_device

    settings = LanguageEnsembleSettings(
        method=options.method, weights=options.weight, test=options.test, copy=options.copy
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
