"""`loopos evaluate` for language models: accuracy of answers to problems, and the loss of rows.

Prints a table or one JSON object; with -o writes one record per problem; progress goes to standard error. Rows that
exceed the model's positions are dropped and counted by reason; a row that one metric cannot use can still count for
another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.cli.answers import json_lines, say, say_json, table
from loopos.cli.opened_models import open_reasoner, require_language_model
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.row_files import refuse_unwritable, write_whole
from loopos.cli.sampling_options import (
    SamplingOptions,
    StepOptions,
    chain_diagnostics,
    option,
    parsed_strategy,
    place_diagnostics,
    refuse,
)
from loopos.config.figures import as_time
from loopos.config.keys import Strategy
from loopos.data.decoding import TextRules
from loopos.data.row_check import check_supervised
from loopos.data.rows import is_plain_text
from loopos.models.resolve import ModelRef

if TYPE_CHECKING:
    from loopos.cli.language_report import LanguageReport

METRICS = ("accuracy", "loss", "perplexity")
OF_TEXT = ("window", "stride")
"""Options that apply only to plain text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageOptions:
    """The options of `loopos evaluate` that only language models have."""

    metrics: tuple[str, ...] = ()
    strategy: str = "single"
    samples: int = 1
    pass_k: tuple[int, ...] = ()
    checker: str = "auto"
    limit: int | None = None
    output: Path | None = None
    precision: str = "auto"
    window: int | None = None
    stride: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    limits: StepOptions = field(default_factory=StepOptions)

    def changed(self) -> list[str]:
        """The options that differ from their defaults, as written on the command line."""
        names = {"metrics": "--metric", "output": "--output"}
        plain = ("metrics", "strategy", "samples", "pass_k", "checker", "limit", "output", "precision", *OF_TEXT)
        default = LanguageOptions()
        own = [names.get(name, option(name)) for name in plain if getattr(self, name) != getattr(default, name)]
        return own + [option(name) for name in (*self.sampling.changed(), *self.limits.changed())]

    def reads_plain_text(self, source: str, rules: TextRules) -> bool:
        """Whether a source is running text: by its content, or because an option for text was used."""
        return any(getattr(self, name) is not None for name in OF_TEXT) or is_plain_text(source, rules)


def checked(options: LanguageOptions, device: str) -> Strategy:
    """The strategy; --samples without --strategy is a majority vote. Raises `UserError` with all problems at once."""
    diagnostics = [*options.sampling.diagnostics(), *options.limits.diagnostics(options.sampling.max_new_tokens)]
    strategy = parsed_strategy(options.strategy, diagnostics)
    diagnostics += place_diagnostics(device, options.precision)
    diagnostics += chain_diagnostics(
        strategy, options.strategy, samples=options.samples, temperature=options.sampling.temperature
    )
    if strategy.kind == "single" and options.samples > 1:
        strategy = Strategy("self_consistency", options.samples)
    if options.limit is not None and options.limit < 1:
        diagnostics.append(f"--limit: got {options.limit}; expected 1 or more")
    diagnostics += [
        f"--metric: got {name}; expected one of {', '.join(METRICS)}" for name in options.metrics if name not in METRICS
    ]
    most = strategy.chains if strategy.kind == "self_consistency" else 1
    diagnostics += [
        f"--pass-k: got {k}; expected 1 to the number of chains sampled per problem ({most}): raise --samples"
        for k in options.pass_k
        if not 1 <= k <= most
    ]
    if options.metrics and "accuracy" not in options.metrics:
        diagnostics += [
            f"{name} without --metric accuracy: it applies only to generated answers" for name in _of_answers(options)
        ]
    refuse(diagnostics)
    return strategy


def _of_answers(options: LanguageOptions) -> Iterator[str]:
    return (name for name in options.changed() if name not in ("--metric", "--limit", "--precision"))


def run(
    model: ModelRef,
    source: str,
    columns: Mapping[str, str],
    rules: TextRules,
    options: LanguageOptions,
    *,
    skip_bad_rows: bool,
    device: str,
    as_json: bool,
    verbose: bool,
) -> int:
    """Measures and prints. Raises `UserError`."""
    strategy = checked(options, device)
    from loopos.evaluation.checkers import checker

    found_checker = checker(options.checker)
    if options.output is not None:
        refuse_unwritable(options.output, source=source)
    require_language_model(model)
    remembered = model.columns
    check_supervised(source, columns, remembered=remembered, rules=rules)
    restart_with_settings()
    for sentence in options.sampling.notes():
        note(sentence)
    hush_libraries(verbose=verbose)

    from loopos.cli.language_report import Evaluation, Plan

    plan = Plan(
        metrics=options.metrics,
        strategy=strategy,
        ks=options.pass_k,
        checker=found_checker,
        settings=options.sampling.settings(),
        limits=options.limits.limits(),
    )
    reasoner = open_reasoner(model, device=device, precision=options.precision, may_vote=True)
    evaluation = Evaluation(reasoner, plan, note=note)
    evaluation.read(
        source,
        columns,
        remembered=remembered,
        rules=rules,
        max_rows=options.limit,
        on_bad_row="skip" if skip_bad_rows else "error",
    )
    report = evaluation.measure()
    if options.output is not None:
        _write(options.output, report)
    if as_json:
        say_json({"model": model.name, "data": source, **report.to_dict()})
    else:
        _describe(model.name, source, report)
    return 0


def _write(file: Path, report: LanguageReport) -> None:
    write_whole(file, json_lines(report.records))
    note(f"{file}: {len(report.records)} answers")


def _describe(location: str, source: str, report: LanguageReport) -> None:
    result: dict[str, Any] = report.to_dict()
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in result["dropped"].items())
    say(f"{location} on {source}: {result['rows']:,} rows{dropped}")
    say(table(list(result["metrics"].items())))
    rate = result["tokens_per_second"]
    generated = f"; {result['tokens_generated']:,} tokens generated, {rate:,.0f} per second" if rate is not None else ""
    say(f"  {as_time(result['seconds'])}{generated}")
