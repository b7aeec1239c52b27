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
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries


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
    """Combines the models and prints the result. Raises `UserError`."""
    columns = parse_columns(options.columns)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.ensembling.ensemble import EnsembleSettings, combine
    from loopos.training.precision import pick_device

    settings = EnsembleSettings(
        method=options.method,
        weights=options.weights,
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
