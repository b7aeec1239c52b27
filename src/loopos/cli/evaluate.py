"""`loopos evaluate`: evaluates a trained model on data; each kind of model has its own module `evaluate_*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loopos.cli import evaluate_heads, evaluate_language, evaluate_tasks, evaluate_text
from loopos.cli.columns import parse_columns, text_rules
from loopos.cli.evaluate_language import LanguageOptions
from loopos.cli.evaluate_tasks import TaskOptions
from loopos.cli.opened_models import is_task_model, refuse_reward_model
from loopos.cli.sampling_options import refuse
from loopos.config.diagnostics import UserError
from loopos.data.decoding import TextRules
from loopos.models.resolve import ModelRef, resolve_trained


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """The options of `loopos evaluate`; `language`: those for language models."""

    columns: tuple[str, ...] = ()
    encoding: str | None = None
    report: Path | None = None
    skip_bad_rows: bool = False
    device: str = "auto"
    json: bool = False
    verbose: bool = False
    language: LanguageOptions = field(default_factory=LanguageOptions)
    tasks: TaskOptions = field(default_factory=TaskOptions)


def run(location: str, source: str | None, options: EvaluateOptions) -> int:
    """Measures and prints. Raises `UserError`."""
    if options.tasks.names:
        return _run_tasks(location, source, options)
    refuse([f"{name}: only for tasks; add --tasks" for name in options.tasks.changed()])
    if source is None:
        raise UserError("got no data; expected a data file, or --tasks with names of lm-eval tasks")
    columns, rules = parse_columns(options.columns), text_rules(options.encoding)
    # A hub id is looked up once the options are known to be right.
    model = resolve_trained(location, looks_up=False)
    if not is_task_model(model):
        refuse(
            [f"--report: only for models with a head; {location} is a language model"] * (options.report is not None)
        )
        if options.language.reads_plain_text(source, rules):
            return _run_on_text(model, source, rules, options)
        return evaluate_language.run(
            model,
            source,
            columns,
            rules,
            options.language,
            skip_bad_rows=options.skip_bad_rows,
            device=options.device,
            as_json=options.json,
            verbose=options.verbose,
        )
    refuse_reward_model(model)
    diagnostics = [name for name in options.language.changed() if name != "--output"]
    refuse([f"{name}: only for language models; {location} is a model with a head" for name in diagnostics])
    return evaluate_heads.run(
        model,
        source,
        columns,
        rules,
        output=options.language.output,
        report=options.report,
        skip_bad_rows=options.skip_bad_rows,
        device=options.device,
        as_json=options.json,
        verbose=options.verbose,
    )


def _run_tasks(location: str, source: str | None, options: EvaluateOptions) -> int:
    """Evaluates on lm-eval tasks."""
    language, used = options.language, ("--limit", "--output", "--precision", "--seed")
    idle = [name for name in language.changed() if name not in used]
    idle += ["--columns"] * bool(options.columns) + ["--skip-bad-rows"] * options.skip_bad_rows
    idle += ["--encoding"] * (options.encoding is not None) + ["--report"] * (options.report is not None)
    diagnostics = [f"{name}: only for rows of data; an lm-eval task sets its own rows and prompts" for name in idle]
    if source is not None:
        diagnostics.append(f"{source} and --tasks: use only one of the two")
    refuse(diagnostics)
    return evaluate_tasks.run(
        location,
        options.tasks,
        limit=language.limit,
        seed=language.sampling.seed,
        output=language.output,
        device=options.device,
        precision=language.precision,
        as_json=options.json,
        verbose=options.verbose,
    )


def _run_on_text(model: ModelRef, source: str, rules: TextRules, options: EvaluateOptions) -> int:
    """Perplexity of running text."""
    language = options.language
    used = ("--window", "--stride", "--precision")
    refuse([f"{name}: only for rows; {source} is plain text" for name in language.changed() if name not in used])
    return evaluate_text.run(
        model,
        source,
        rules,
        window=language.window,
        stride=language.stride,
        device=options.device,
        precision=language.precision,
        as_json=options.json,
        verbose=options.verbose,
    )
