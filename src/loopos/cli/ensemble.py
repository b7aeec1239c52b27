"""`loopos ensemble`: several classifiers or regressors as one model.

Enters: MODELs, a method, labelled rows. Leaves: the ensemble's folder, and on standard output the metrics of each
member, their mean and the ensemble's. Left out: the work itself (`deploy.ensemble`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loopos.cli.answers import say, say_json, table
from loopos.cli.bar import Bar
from loopos.cli.columns import parse_columns
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries


@dataclass(frozen=True, slots=True)
class EnsembleOptions:
    """The options of `loopos ensemble`."""

    output: Path
    method: str = "mean"
    fit: str | None = None
    test: str | None = None
    copy: bool = False
    columns: tuple[str, ...] = ()
    device: str = "auto"
    json: bool = False
    verbose: bool = False


def run(members: Sequence[str], options: EnsembleOptions) -> int:
    """Joins and tells. Raises `UserError`."""
    columns = parse_columns(options.columns)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.deploy.ensemble import EnsembleSettings, join
    from loopos.training.precision import pick_device

    settings = EnsembleSettings(
        method=options.method, fit=options.fit, test=options.test, copy=options.copy, columns=columns
    )
    with Bar("members") as bar:
        joined = join(members, options.output, settings, device=pick_device(options.device).type, tell=bar.progress)
    if options.json:
        say_json(
            {
                "folder": str(joined.folder),
                "method": options.method,
                "weights": dict(zip(members, joined.weights, strict=True)),
                "measured": [
                    {
                        "source": each.source,
                        "members": dict(zip(members, each.alone, strict=True)),
                        "mean": each.mean,
                        "ensemble": {name: each.together[name] for name in each.mean},
                        "rows": each.together["rows"],
                    }
                    for each in joined.measured
                ],
            }
        )
        return 0
    say(f"{joined.folder}: {len(members)} members joined by {options.method}")
    say(table(list(zip(members, joined.weights, strict=True)), head=("member", "weight")))
    for each in joined.measured:
        names = list(each.mean)
        rows: list[list[object]] = [
            [member, *(alone[name] for name in names)] for member, alone in zip(members, each.alone, strict=True)
        ]
        rows += [["mean", *each.mean.values()], ["ensemble", *(each.together[name] for name in names)]]
        say(f"{each.source}: {each.together['rows']:,} rows")
        say(table(rows, head=("", *names)))
    return 0
