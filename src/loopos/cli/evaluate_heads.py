"""`loopos evaluate` for models with a head: metrics, per-class figures, and mistakes.

Prints one JSON object or tables; with -o writes every row, most confident mistakes first; with --report an HTML page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.cli.answers import confusion_table, say, say_json, table
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.row_files import output_format, refuse_unwritable, rendered, write_whole
from loopos.config.diagnostics import UserError
from loopos.data.decoding import TextRules
from loopos.data.row_check import check_labeled
from loopos.models.resolve import ModelRef

if TYPE_CHECKING:
    from loopos.evaluation.judgement import Judgement

_MOST_CLASSES_ON_SCREEN = 30
_MOST_CONFUSIONS_ON_SCREEN = 10


def run(
    model: ModelRef,
    source: str,
    columns: Mapping[str, str],
    rules: TextRules,
    *,
    output: Path | None,
    report: Path | None,
    skip_bad_rows: bool,
    device: str,
    as_json: bool,
    verbose: bool,
) -> int:
    """Measures, writes and prints. Raises `UserError`."""
    file_format = output_format(output, None)
    for option, file in (("--output", output), ("--report", report)):
        if file is not None:
            refuse_unwritable(file, option, source=source)
    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report: got {report}; expected a file that ends in .html")
    check_labeled(source, columns, require_label=True, remembered=model.columns, rules=rules)
    restart_with_settings()
    hush_libraries(verbose=verbose)
    from loopos.evaluation.predictor import judge_file, open_predictor
    from loopos.training.precision import pick_device

    predictor = open_predictor(model, device=pick_device(device).type)
    judgement = judge_file(predictor, source, columns, on_bad_row="skip" if skip_bad_rows else "error", rules=rules)
    if as_json:
        say_json(judgement.metrics)
    else:
        _describe(source, judgement)
    if output is not None:
        write_whole(output, rendered(judgement.rows(), file_format))
        note(f"{output}: {judgement.metrics['rows']:,} rows, {_order(judgement)} first")
    if report is not None:
        from loopos.evaluation.blocks import as_html

        write_whole(report, as_html(f"{model.name} on {source}", judgement.blocks()), "--report")
        note(f"{report}: report")
    return 0


def _order(judgement: Judgement) -> str:
    return "largest errors" if judgement.space.task == "regression" else "most confident mistakes"


def _describe(source: str, judgement: Judgement) -> None:
    from loopos.evaluation.task_report import largest_confusions

    metrics: dict[str, Any] = judgement.metrics
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in metrics.get("dropped", {}).items())
    say(f"{source}: {metrics['rows']:,} rows{dropped}")
    say(table([(name, value) for name, value in metrics.items() if isinstance(value, float)]))
    classes = judgement.classes()
    if not classes:
        return
    worst = sorted(classes, key=lambda each: -1.0 if each.f1 is None else each.f1)
    is_long = len(classes) > _MOST_CLASSES_ON_SCREEN
    if is_long:
        say(f"{len(classes)} classes; the {_MOST_CLASSES_ON_SCREEN} with the lowest F1 (all with --json or --report)")
    figures = [
        (each.name, each.precision, each.recall, each.f1, each.rows)
        for each in (worst[:_MOST_CLASSES_ON_SCREEN] if is_long else classes)
    ]
    head = ("class" if judgement.space.task == "classification" else "label", "precision", "recall", "F1", "support")
    say(table(figures, head=head))
    if "confusion" not in metrics:
        return
    names = metrics["class_names"]
    if not is_long:
        say(confusion_table(names, metrics["confusion"]))
        return
    largest, _ = largest_confusions(metrics["confusion"], _MOST_CONFUSIONS_ON_SCREEN)
    if largest:
        confused = [(names[true], names[predicted], count) for count, true, predicted in largest]
        say(table(confused, head=("true class", "predicted class", "rows")))
