"""`loopos score`: scores responses with a reward model, and measures its agreement with people.

Reads comparisons, prompts with one or several responses, output of `loopos generate`, and conversations. Prints scores
as JSON Lines and metrics to standard error; with `--json` only the metrics, as one object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

import typer

from loopos.cli.answers import json_lines, refuse_unwritable, say_json, table, write, write_whole
from loopos.cli.options import (
    Columns,
    Device,
    Encoding,
    Json,
    OutputFile,
    Verbose,
    argument,
    parse_columns,
    refuse,
    text_rules,
)
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.cli.sampling_options import AggregationName, aggregation_diagnostics

if TYPE_CHECKING:
    from loopos.config.preferences import Aggregation

RewardModel = Annotated[
    str,
    argument("MODEL", "Output folder of a reward_model run, or its model/ folder."),
]
Comparisons = Annotated[
    str,
    argument("FILE", "File, folder or glob of comparisons."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """The options of `loopos score`."""

    output: OutputFile = None
    columns: Columns = ()
    encoding: Encoding = None
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip rows that cannot be used.")] = False
    ensemble_penalty: Annotated[
        float,
        typer.Option("--ensemble-penalty", min=0, help="Standard deviations of the heads to subtract from their mean."),
    ] = 0.0
    aggregation: AggregationName = None
    device: Device = "auto"
    json: Json = False
    verbose: Verbose = False


def run(location: RewardModel, source: Comparisons, options: ScoreOptions) -> int:
    """Scores and writes. Raises `UserError`."""
    from loopos.cli.opened_models import require_reward_model
    from loopos.data.row_check import check_responses

    columns, rules = parse_columns(options.columns), text_rules(options.encoding)
    refuse(list(aggregation_diagnostics(options.aggregation)))
    if options.output is not None:
        refuse_unwritable(options.output, source=source)
    model = require_reward_model(location)
    check_responses(source, columns, rules)
    prepare_to_compute(verbose=options.verbose)
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.training.precision import pick_device

    predictor = RewardPredictor.open(
        model,
        device=pick_device(options.device).type,
        ensemble_penalty=options.ensemble_penalty,
        aggregation=cast("Aggregation | None", options.aggregation),
    )
    scored = predictor.score_file(source, columns, on_bad_row="skip" if options.skip_bad_rows else "error", rules=rules)
    if options.json:
        say_json({"rows": len(scored.rows), **scored.metrics})
        return 0
    written = json_lines(scored.rows)
    if options.output is None:
        write(written)
    else:
        write_whole(options.output, written)
        note(f"{options.output}: {len(scored.rows)} rows")
    if scored.metrics:
        note(table(list(scored.metrics.items())))
    return 0
