"""`loopos evaluate`: a trained model measured on labelled data.

Enters: a run and a data file. Leaves: one JSON object, or a table of metrics and the confusion table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loopos.cli.answers import confusion_table, say, say_json, table
from loopos.cli.columns import parse_columns
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """The options of `loopos evaluate`."""

    columns: tuple[str, ...] = ()
    skip_bad_rows: bool = False
    device: str = "auto"
    json: bool = False
    verbose: bool = False


def run(place: Path, source: str, options: EvaluateOptions) -> int:
    """Measures and prints. Raises `UserError`."""
    columns = parse_columns(options.columns)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.evaluation.predictor import Predictor
    from loopos.training.precision import pick_device

    predictor = Predictor.open(place, device=pick_device(options.device).type)
    metrics = predictor.evaluate_file(source, columns, on_bad_row="skip" if options.skip_bad_rows else "error")
    if options.json:
        say_json(metrics)
        return 0
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in metrics.get("dropped", {}).items())
    say(f"{source}: {metrics['rows']:,} rows{dropped}")
    say(table([(name, value) for name, value in metrics.items() if isinstance(value, float)]))
    if "confusion" in metrics:
        say(confusion_table(metrics["class_names"], metrics["confusion"]))
    return 0
