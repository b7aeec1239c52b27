"""`loopos evaluate`: evaluates a trained model on data, running text or lm-eval tasks.

Prints tables or one JSON object; progress goes to standard error. A model with a head: metrics, figures of each class,
and with -o every row, most confident mistakes first. A language model on rows: accuracy of answers to problems, and the
loss of rows, measured by `language_report`; with -o one record per problem. Comparisons, and reward models, are left to
`evaluate_comparisons`. Rows that exceed the model's positions are
dropped and counted by reason; a row that one metric cannot use can still count for another.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.cli import evaluate_comparisons
from loopos.cli.answers import (
    confusion_table,
    json_lines,
    output_format,
    refuse_unwritable,
    rendered,
    say,
    say_json,
    table,
    write_whole,
)
from loopos.cli.evaluate_options import OF_TASKS, OF_TEXT, Data, EvaluateOptions, Model
from loopos.cli.options import (
    device_diagnostics,
    parse_columns,
    refuse,
    text_rules,
)
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.cli.sampling_options import (
    chain_diagnostics,
    parsed_strategy,
    ranker_of,
    ranking_diagnostics,
    require_ranking_model,
)
from loopos.config.diagnostics import MissingRequirement, UserError, printable_json
from loopos.config.figures import as_time

if TYPE_CHECKING:
    from loopos.config.keys import Strategy
    from loopos.data.decoding import TextRules
    from loopos.evaluation.judgment import Judgment
    from loopos.models.resolve import ModelRef

METRICS = ("accuracy", "loss", "perplexity")
_LINE_EVERY_SECONDS = 10.0
_MOST_CLASSES_ON_SCREEN = 30
_MOST_CONFUSIONS_ON_SCREEN = 10
_TASK_PACKAGE = "lm_eval"
_DEFAULT_FILTER = "none"
# lm-eval's fields beside the metrics of a task.
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


def run(location: Model, options: EvaluateOptions, source: Data = None) -> int:
    """Measures and prints. Raises `UserError`."""
    if options.tasks:
        return _run_tasks(location, source, options)
    refuse([f"{name}: only for tasks; add --tasks" for name in options.changed(OF_TASKS)])
    if source is None:
        raise UserError("got no data; expected a data file, or --tasks with names of lm-eval tasks")
    from loopos.cli.opened_models import is_task_model
    from loopos.data.rows import is_plain_text
    from loopos.models.resolve import resolve_trained

    columns, rules = parse_columns(options.columns), text_rules(options.encoding)
    # A hub id is looked up once the options are known to be right.
    model = resolve_trained(location, looks_up=False)
    if model.kind == "reward":
        return evaluate_comparisons.run(model, source, columns, rules, options.of_comparisons())
    if not is_task_model(model):
        # Running text, by its content or because an option for text was used.
        is_text = bool(options.changed(OF_TEXT)) or is_plain_text(source, rules)
        if not is_text and evaluate_comparisons.applies_to(source, columns, rules, options.of_comparisons()):
            return evaluate_comparisons.run(model, source, columns, rules, options.of_comparisons())
        problem = f"--report: only for models with a head and for comparisons; {location} is a language model"
        refuse([problem] * bool(options.report))
        if is_text:
            return _run_on_text(model, source, rules, options)
        return _run_on_language_rows(model, source, columns, rules, options)
    idle = [name for name in options.language() if name != "--output"]
    refuse([f"{name}: only for language models; {location} is a model with a head" for name in idle])
    return _run_on_head(model, source, columns, rules, options)


def _run_on_head(
    model: ModelRef, source: str, columns: Mapping[str, str], rules: TextRules, options: EvaluateOptions
) -> int:
    """Metrics of a model with a head."""
    file_format = output_format(options.output, None)
    for name, file in (("--output", options.output), ("--report", options.report)):
        if file is not None:
            refuse_unwritable(file, name, source=source)
    report = options.report
    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report: got {report}; expected a file that ends in .html")
    from loopos.data.row_check import check_labeled

    check_labeled(source, columns, require_label=True, remembered=model.columns, rules=rules)
    prepare_to_compute(verbose=options.verbose)
    from loopos.evaluation.predictor import judge_file, open_predictor
    from loopos.training.precision import pick_device

    predictor = open_predictor(model, device=pick_device(options.device).type)
    judgment = judge_file(
        predictor, source, columns, on_bad_row="skip" if options.skip_bad_rows else "error", rules=rules
    )
    if options.json:
        say_json(judgment.metrics)
    else:
        _describe_head(source, judgment)
    if options.output is not None:
        write_whole(options.output, rendered(judgment.rows(), file_format))
        first = "largest errors" if judgment.space.task == "regression" else "most confident mistakes"
        note(f"{options.output}: {judgment.metrics['rows']:,} rows, {first} first")
    if report is not None:
        from loopos.evaluation.blocks import as_html

        write_whole(report, as_html(f"{model.name} on {source}", judgment.blocks()), "--report")
        note(f"{report}: report")
    return 0


def _describe_head(source: str, judgment: Judgment) -> None:
    from loopos.evaluation.task_report import largest_confusions

    metrics: dict[str, Any] = judgment.metrics
    say(f"{source}: {metrics['rows']:,} rows{_dropped(metrics.get('dropped', {}))}")
    say(table([(name, value) for name, value in metrics.items() if isinstance(value, float)]))
    classes = judgment.classes()
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
    head = ("class" if judgment.space.task == "classification" else "label", "precision", "recall", "F1", "support")
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


def _dropped(reasons: Mapping[str, int]) -> str:
    return "".join(f", {count} dropped ({reason})" for reason, count in reasons.items())


def _checked_strategy(options: EvaluateOptions) -> Strategy:
    """The strategy; --samples without --strategy is a majority vote. Raises `UserError` with all problems at once."""
    from loopos.config.keys import Strategy

    diagnostics = [*options.sampling.diagnostics(), *options.limits.diagnostics(options.sampling.max_new_tokens)]
    strategy = parsed_strategy(options.strategy, diagnostics)
    diagnostics += device_diagnostics(options.device, options.precision)
    diagnostics += chain_diagnostics(
        strategy, options.strategy, samples=options.samples, temperature=options.sampling.temperature
    )
    diagnostics += ranking_diagnostics(strategy, options.reward_model, options.aggregation)
    if strategy.kind == "single" and options.samples > 1:
        strategy = Strategy("self_consistency", options.samples)
    diagnostics += _limit_diagnostics(options)
    diagnostics += [
        f"--metric: got {name}; expected one of {', '.join(METRICS)}" for name in options.metric if name not in METRICS
    ]
    most = strategy.chains if strategy.kind == "self_consistency" else 1
    diagnostics += [
        f"--pass-k: got {k}; expected 1 to the number of chains sampled per problem ({most}): raise --samples"
        for k in options.pass_k
        if not 1 <= k <= most
    ]
    if options.metric and "accuracy" not in options.metric:
        of_answers = [name for name in options.language() if name not in ("--metric", "--limit", "--precision")]
        diagnostics += [
            f"{name} without --metric accuracy: it applies only to generated answers" for name in of_answers
        ]
    refuse(diagnostics)
    return strategy


def _limit_diagnostics(options: EvaluateOptions) -> Iterator[str]:
    if options.limit is not None and options.limit < 1:
        yield f"--limit: got {options.limit}; expected 1 or more"


def _run_on_language_rows(
    model: ModelRef, source: str, columns: Mapping[str, str], rules: TextRules, options: EvaluateOptions
) -> int:
    """Answers and loss of a language model."""
    strategy = _checked_strategy(options)
    from loopos.cli.opened_models import open_reasoner, require_language_model
    from loopos.data.row_check import check_supervised
    from loopos.evaluation.checkers import checker

    found_checker = checker(options.checker)
    if options.output is not None:
        refuse_unwritable(options.output, source=source)
    require_language_model(model)
    reward_model = require_ranking_model(strategy, options.reward_model, options.aggregation)
    remembered = model.columns
    check_supervised(source, columns, remembered=remembered, rules=rules)
    prepare_to_compute(verbose=options.verbose)
    for sentence in options.sampling.notes():
        note(sentence)
    from loopos.cli.language_report import Evaluation, Plan

    plan = Plan(
        metrics=options.metric,
        strategy=strategy,
        ks=options.pass_k,
        checker=found_checker,
        settings=options.sampling.settings(),
        limits=options.limits.limits(),
        ranker=ranker_of(reward_model, options.aggregation, options.device),
    )
    reasoner = open_reasoner(model, device=options.device, precision=options.precision, may_vote=True)
    evaluation = Evaluation(reasoner, plan, note=note)
    evaluation.read(
        source,
        columns,
        remembered=remembered,
        rules=rules,
        max_rows=options.limit,
        on_bad_row="skip" if options.skip_bad_rows else "error",
    )
    report = evaluation.measure()
    if options.output is not None:
        write_whole(options.output, json_lines(report.records))
        note(f"{options.output}: {len(report.records)} answers")
    if options.json:
        say_json({"model": model.name, "data": source, **report.to_dict()})
    else:
        _describe_language(model.name, source, report.to_dict())
    return 0


def _describe_language(name: str, source: str, result: Mapping[str, Any]) -> None:
    say(f"{name} on {source}: {result['rows']:,} rows{_dropped(result['dropped'])}")
    say(table(list(result["metrics"].items())))
    rate = result["tokens_per_second"]
    generated = f"; {result['tokens_generated']:,} tokens generated, {rate:,.0f} per second" if rate is not None else ""
    say(f"  {as_time(result['seconds'])}{generated}")


def _run_on_text(model: ModelRef, source: str, rules: TextRules, options: EvaluateOptions) -> int:
    """Perplexity and bits per byte of running text."""
    used = ("--window", "--stride", "--precision")
    refuse([f"{name}: only for rows; {source} is plain text" for name in options.language() if name not in used])
    refuse(list(device_diagnostics(options.device, options.precision)))
    from loopos.cli.opened_models import require_language_model
    from loopos.data.rows import read_plain_text

    text = read_plain_text(source, rules)
    require_language_model(model)
    prepare_to_compute(verbose=options.verbose)
    from loopos.evaluation.perplexity import text_loss
    from loopos.models.folders import open_generation_model
    from loopos.training.precision import pick_device

    chosen = None if options.precision == "auto" else options.precision
    opened = open_generation_model(model, device=pick_device(options.device).type, precision=chosen)
    began = last_line = time.monotonic()

    def progress(completed: int, total: int) -> None:
        nonlocal last_line
        if (now := time.monotonic()) - last_line > _LINE_EVERY_SECONDS:
            last_line = now
            note(f"{completed:,} of {total:,} tokens · {completed / (now - began):,.0f} tokens/s")

    window, stride = options.window, options.stride
    found = text_loss(opened.model, opened.tokenizer, text, window=window, stride=stride, note=progress)
    seconds = time.monotonic() - began
    if options.json:
        say_json({"model": model.name, "data": source, "metrics": found.to_dict(), "seconds": seconds})
    else:
        say(f"{model.name} on {source}: {found.tokens:,} tokens, windows of {found.window} in steps of {found.stride}")
        say(table([(name, found.to_dict()[name]) for name in ("perplexity", "loss", "bits_per_byte")]))
        say(f"  {as_time(seconds)}")
    return 0


def _check_tasks(source: str | None, options: EvaluateOptions) -> None:
    """Raises `UserError` for options that do not go with tasks, and for values out of range."""
    idle = [name for name in options.language() if name not in ("--limit", "--output", "--precision", "--seed")]
    idle += options.changed(("columns", "skip_bad_rows", "encoding", "report"))
    diagnostics = [f"{name}: only for rows of data; an lm-eval task sets its own rows and prompts" for name in idle]
    if source is not None:
        diagnostics.append(f"{source} and --tasks: use only one of the two")
    refuse(diagnostics)
    diagnostics = [*device_diagnostics(options.device, options.precision), *_limit_diagnostics(options)]
    if options.num_fewshot is not None and options.num_fewshot < 0:
        diagnostics.append(f"--num-fewshot: got {options.num_fewshot}; expected 0 or more")
    folder = options.task_folder
    if folder is not None and not folder.is_dir():
        diagnostics.append(f"--task-folder: {folder} is not a folder; expected one with task files (.yaml)")
    refuse(diagnostics)


def _run_tasks(location: str, source: str | None, options: EvaluateOptions) -> int:
    """Evaluates a language model or an ensemble on lm-eval tasks."""
    from loopos.cli.opened_models import open_reasoner, require_language_model
    from loopos.config.extras import install_command

    _check_tasks(source, options)
    if options.output is not None:
        refuse_unwritable(options.output)
    opened = require_language_model(location)
    if importlib.util.find_spec(_TASK_PACKAGE) is None:
        raise MissingRequirement(f"--tasks needs lm_eval; run\n  {install_command('eval')}")
    prepare_to_compute(verbose=options.verbose)
    reasoner = open_reasoner(opened, device=options.device, precision=options.precision)
    from loopos.evaluation.harness import EngineModel, run_tasks

    model, began = EngineModel(reasoner, seed=options.sampling.seed, note=note), time.monotonic()
    found = run_tasks(
        model,
        [name.strip() for each in options.tasks for name in each.split(",") if name.strip()],
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        folder=options.task_folder,
        chat=options.chat,
    )
    seconds = time.monotonic() - began
    if options.output is not None:
        _write_documents(options.output, found["samples"])
    tasks = {name: _task_metrics(results) for name, results in found["results"].items()}
    if options.json:
        version = importlib.metadata.version(_TASK_PACKAGE)
        say_json({"model": location, "tasks": tasks, "seconds": seconds, "lm_eval": version})
        return 0
    rows = [(name, metric, value) for name, metrics in tasks.items() for metric, value in metrics.items()]
    say(table(rows, head=("task", "metric", "value")))
    say(f"  {as_time(seconds)}")
    return 0


def _task_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Metric → value. lm-eval's keys are "metric,filter"; the filter is dropped unless the task has one."""
    found = {}
    for key, value in results.items():
        metric, _, filter_name = key.partition(",")
        if key in _NOT_METRICS or isinstance(value, bool | str) or value is None or metric.endswith("_stderr"):
            continue
        found[metric if filter_name in ("", _DEFAULT_FILTER) else key] = float(value)
    return found


def _write_documents(file: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    lines = [
        printable_json(json.dumps({"task": name, **sample}, ensure_ascii=False, default=str)) + "\n"
        for name, each in samples.items()
        for sample in each
    ]
    write_whole(file, "".join(lines))
    note(f"{file}: {len(lines)} documents")
