"""`loopos ensemble`: combines classifiers, regressors or language models into one model.

Prints the metrics of each member and of the ensemble. The work is in `loopos.ensembling`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from loopos.cli.answers import say, say_json, table
from loopos.cli.options import Columns, Device, Json, NewFolder, Verbose, argument, parse_columns
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
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
    """Combines the models and prints the result. Raises `UserError`."""
    columns = parse_columns(options.columns)
    prepare_to_compute(verbose=options.verbose)
    from loopos.cli.bar import Bar
    from loopos.ensembling.ensemble import EnsembleSettings, combine
    from loopos.training.precision import pick_device

    settings = EnsembleSettings(
        method=options.method,
        weights=options.weight,
        fit=options.fit,
        test=options.test,
        copy=options.copy,
        columns=columns or None,
    )
    with Bar("members") as bar:
        ensemble = combine(
            members, options.output, settings, device=pick_device(options.device).type, on_progress=bar.progress
        )
    for sentence in ensemble.notes:
        note(f"note: {sentence}")
    if options.json:
        measured = [
            {
                "source": each.source,
                "members": dict(zip(members, each.by_member, strict=True)),
                "mean": each.mean,
                "ensemble": each.ensemble,
                **({"rows": each.together["rows"]} if "rows" in each.together else {}),
            }
            for each in ensemble.measured
        ]
        weights = dict(zip(members, ensemble.weights, strict=True))
        say_json({"folder": str(ensemble.folder), "method": options.method, "weights": weights, "measured": measured})
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
        say(f"{each.source}: {each.together['rows']:,} rows" if "rows" in each.together else each.source)
        say(table(rows, head=("", *names)))
    return 0
