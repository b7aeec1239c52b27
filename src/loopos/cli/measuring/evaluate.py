"""`loopos evaluate`: a trained model measured on data.

Enters: a model and a data file. Leaves: one JSON object, or a table of metrics and, for classification, the confusion
table. Left out: how language models are measured (`evaluate_language`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loopos.cli.answers import confusion_table, say, say_json, table
from loopos.cli.columns import parse_columns
from loopos.cli.measuring import evaluate_language, evaluate_tasks, evaluate_text
from loopos.cli.measuring.evaluate_language import LanguageOptions
from loopos.cli.measuring.evaluate_tasks import TaskOptions
from loopos.cli.opened_models import is_task_model, refuse_reward_model
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.speaking.sampling_options import refuse
from loopos.config.faults import UserError
from loopos.data.column_check import check_labelled


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """The options of `loopos evaluate`; `language`: those for language models."""

    columns: tuple[str, ...] = ()
    skip_bad_rows: bool = False
    device: str = "auto"
    json: bool = False
    verbose: bool = False
    language: LanguageOptions = field(default_factory=LanguageOptions)
    tasks: TaskOptions = field(default_factory=TaskOptions)


def run(place: str, source: str | None, options: EvaluateOptions) -> int:
    """Measures and prints. Raises `UserError`."""
    if options.tasks.names:
        return _run_tasks(place, source, options)
    refuse([f"{name}: of tasks; wanted --tasks too" for name in options.tasks.changed()])
    if source is None:
        raise UserError("given no data; wanted a data file, or --tasks with names of lm-eval's tasks")
    columns = parse_columns(options.columns)
    if not is_task_model(place):
        if options.language.reads_plain_text(source):
            return _run_on_text(place, source, options)
        return evaluate_language.run(
            place,
            source,
            columns,
            options.language,
            skip_bad_rows=options.skip_bad_rows,
            device=options.device,
            as_json=options.json,
            verbose=options.verbose,
        )
    refuse_reward_model(place)
    refuse([f"{name}: for language models; {place} is a model with a head" for name in options.language.changed()])
    check_labelled(source, columns, require_label=True)
    restart_with_settings()
    hush_libraries(verbose=options.verbose)
    from loopos.evaluation.ensemble import open_predictor
    from loopos.training.precision import pick_device

    predictor = open_predictor(place, device=pick_device(options.device).type)
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


def _run_tasks(place: str, source: str | None, options: EvaluateOptions) -> int:
    """Tasks of lm-eval."""
    language, mine = options.language, ("--limit", "--output", "--precision", "--seed")
    idle = [name for name in language.changed() if name not in mine]
    idle += ["--columns"] * bool(options.columns) + ["--skip-bad-rows"] * options.skip_bad_rows
    faults = [f"{name}: for rows of data; a task of lm-eval says itself what is asked and how" for name in idle]
    if source is not None:
        faults.append(f"{source} and --tasks: wanted one of the two")
    refuse(faults)
    return evaluate_tasks.run(
        place,
        options.tasks,
        limit=language.limit,
        seed=language.sampling.seed,
        output=language.output,
        device=options.device,
        precision=language.precision,
        as_json=options.json,
        verbose=options.verbose,
    )


def _run_on_text(place: str, source: str, options: EvaluateOptions) -> int:
    """Perplexity of running text."""
    language = options.language
    mine = ("--window", "--stride", "--precision")
    refuse([f"{name}: for rows of data; {source} is plain text" for name in language.changed() if name not in mine])
    return evaluate_text.run(
        place,
        source,
        window=language.window,
        stride=language.stride,
        device=options.device,
        precision=language.precision,
        as_json=options.json,
        verbose=options.verbose,
    )
