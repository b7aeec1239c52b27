"""`loopos score`: scores responses with a reward model, and measures its agreement with people.

Reads comparisons, prompts with one or several responses, output of `loopos generate`, and conversations. Prints scores
as JSON Lines and metrics to standard error; with `--json` only the metrics, as one object.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loopos.cli.answers import json_lines, say_json, table, write
from loopos.cli.columns import parse_columns, text_rules
from loopos.cli.opened_models import require_reward_model
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.row_files import refuse_unwritable, write_whole
from loopos.data.row_check import check_responses


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """The options of `loopos score`."""

    output: Path | None = None
    columns: tuple[str, ...] = ()
    encoding: str | None = None
    skip_bad_rows: bool = False
    ensemble_penalty: float = 0.0
    device: str = "auto"
    json: bool = False
    verbose: bool = False


def run(location: str, source: str, options: ScoreOptions) -> int:
    """Scores and writes. Raises `UserError`."""
    columns, rules = parse_columns(options.columns), text_rules(options.encoding)
    if options.output is not None:
        refuse_unwritable(options.output, source=source)
    model = require_reward_model(location)
    check_responses(source, columns, rules)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.training.precision import pick_device

    predictor = RewardPredictor.open(
        model, device=pick_device(options.device).type, ensemble_penalty=options.ensemble_penalty
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
