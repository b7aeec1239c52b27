"""`loopos evaluate` for language models: accuracy of answers to problems, and the loss of rows.

Prints a table or one JSON object; with -o writes one record per problem; progress goes to standard error. Rows that
exceed the model's positions are dropped and counted by reason; a row that one metric cannot use can still count for
another.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
from loopos.config.diagnostics import UserError
from loopos.config.figures import as_time
from loopos.config.keys import Strategy
from loopos.data import rows
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.demonstrations import Demonstration
from loopos.data.reading import left_out
from loopos.data.row_check import check_supervised
from loopos.data.rows import is_plain_text
from loopos.data.supervised_rows import Example, read_supervised
from loopos.data.supervised_tokens import OVER_LENGTH, encode_supervised
from loopos.evaluation.answer_check import judge_all, problem_metrics, record
from loopos.evaluation.checkers import Checker, Verdict, answer_metrics
from loopos.evaluation.reasoning import Answered, Reasoner
from loopos.generation.settings import SamplingSettings
from loopos.generation.steps import StepLimits
from loopos.models.language_ensemble import next_token_loss
from loopos.models.model_folder import remembered_columns
from loopos.training.distributed import World
from loopos.training.objectives import NextToken, mean_loss

# Problems answered between two lines of progress: enough that refilled slots hide the end of each group.
_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure. Empty `metrics`: accuracy if rows are problems with answers, else loss and perplexity."""

    metrics: Sequence[str]
    strategy: Strategy
    ks: Sequence[int]
    checker: Checker
    settings: SamplingSettings
    limits: StepLimits


@dataclass
class LanguageReport:
    """The result. `rows`: rows that count for at least one metric; `dropped`: rows left out, by reason; `records`: one
    per problem.
    """

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens_generated: int = 0
    seconds_generating: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything except the records. tokens_per_second: generated tokens per second; None without any."""
        rate = self.tokens_generated / self.seconds_generating if self.tokens_generated else None
        return {
            "rows": self.rows,
            "dropped": dict(self.dropped),
            "metrics": self.metrics,
            "seconds": self.seconds,
            "tokens_generated": self.tokens_generated,
            "tokens_per_second": rate,
        }


class Evaluation:
    """Reads rows, then measures."""

    def __init__(self, reasoner: Reasoner, plan: Plan, *, note: Callable[[str], None]) -> None:
        """note: takes a line of progress."""
        self.reasoner, self.plan, self.note = reasoner, plan, note
        self.report = LanguageReport()
        self.examples: list[Example] = []

    def read(
        self,
        source: str,
        columns: Mapping[str, str],
        *,
        remembered: Mapping[str, str | None] | None = None,
        rules: TextRules = PLAIN_RULES,
        max_rows: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
    ) -> None:
        """Reads the rows. Raises `DataError`; and `UserError` if accuracy is requested for rows without answers."""
        self.source, self.on_bad_row = source, on_bad_row
        reader = rows.read(source, max_rows=max_rows, on_bad_row=on_bad_row, rules=rules)
        self.examples, found = read_supervised(
            reader, columns, step_format=self.reasoner.step_format, remembered=remembered
        )
        self.report.dropped.update(found.dropped)
        for sentence in (*found.summary, *left_out(found)):
            self.note(sentence)
        problems = sum(isinstance(example, Demonstration) for example in self.examples)
        self.metrics = tuple(self.plan.metrics) or (("accuracy",) if problems else ("loss", "perplexity"))
        if "accuracy" in self.metrics and not problems:
            raise UserError(
                f"--metric accuracy: no row of {source} is a problem with an answer ({found.summary[-1]}); expected "
                "rows with problem and answer, or --metric loss"
            )

    def measure(self) -> LanguageReport:
        """All requested metrics. Raises `UserError` if no row is left to measure."""
        began = time.monotonic()
        used: set[int] = set()
        if "accuracy" in self.metrics:
            used |= self._answers()
        if {"loss", "perplexity"} & set(self.metrics):
            used |= self._loss()
        self.report.rows = len(used)
        self.report.seconds = time.monotonic() - began
        return self.report

    def _answers(self) -> set[int]:
        """Accuracy and related metrics; returns the indices of the rows used."""
        positions = self.reasoner.engine.max_positions
        indices, examples = [], []
        for index, example in enumerate(self.examples):
            assert isinstance(example, Demonstration), "a source holds rows of one format"
            # A prompt that fills all positions leaves none for an answer.
            if not self.reasoner.has_room(example):
                self.report.dropped[_over(positions, "the problem")] += 1
            else:
                indices.append(index)
                examples.append(example)
        if not examples:
            raise UserError(f"{self.source}: every problem is longer than the model's {positions} positions")
        plan, answered = self.plan, list[Answered]()
        began = time.monotonic()
        for first in range(0, len(examples), _GROUP):
            group: Sequence[Demonstration] = examples[first : first + _GROUP]
            answered += self.reasoner.answer(group, plan.settings, strategy=plan.strategy, limits=plan.limits)
            spent = time.monotonic() - began
            self.report.tokens_generated = sum(len(c.token_ids) - len(c.actual) for a in answered for c in a.chains)
            rate = self.report.tokens_generated / max(spent, 1e-9)
            self.note(f"answers {len(answered)}/{len(examples)} · {rate:,.0f} tokens/s · {spent:,.0f} s")
        self.report.seconds_generating = time.monotonic() - began
        verdicts = judge_all(answered, examples, step_format=self.reasoner.step_format, checker=plan.checker)
        self.report.metrics |= self._problem_metrics(answered, verdicts)
        self.report.records = [record(*each) for each in zip(answered, verdicts, examples, strict=True)]
        return set(indices)

    def _problem_metrics(self, answered: Sequence[Answered], verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
        voted = self.plan.strategy.kind in ("single", "self_consistency")
        metrics = problem_metrics(answered, verdicts, voted=voted)
        for name, value in answer_metrics(verdicts, ks=self.plan.ks).items() if self.plan.ks else ():
            metrics.setdefault(name, value)
        return metrics

    def _loss(self) -> set[int]:
        """Mean loss (nats per trained token, weighted as in training) and perplexity = exp(loss)."""
        reasoner = self.reasoner
        if reasoner.voters:
            raise UserError(
                "--metric loss: an ensemble that votes over answers has no distribution over tokens; use "
                "--metric accuracy, or an ensemble with method mean or logits"
            )
        positions = reasoner.engine.max_positions
        encoded, found = encode_supervised(
            reasoner.tokenizer,
            self.examples,
            step_format=reasoner.step_format,
            max_length=positions,
            over_length="drop",
            max_dropped_share=1.0,
            on_bad_row=self.on_bad_row,
            template=reasoner.template,
        )
        for reason, count in found.dropped.items():
            self.report.dropped[_over(positions, "the row") if reason == OVER_LENGTH else reason] += count
        self.note(f"loss of {found.trained_tokens:,} trained tokens in {found.used:,} rows")
        model = next_token_loss(reasoner.model)
        rows_encoded = [row.encoded() for row in encoded]
        loss = mean_loss(NextToken(model), rows_encoded, device=reasoner.model.device, world=World())
        expected = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        self.report.metrics |= {name: value for name, value in expected.items() if name in self.metrics}
        return {row.index for row in encoded}


def _over(positions: int | None, what: str) -> str:
    return f"{what} is over the model's {positions} positions"


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
    location: str,
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
    require_language_model(location)
    remembered = remembered_columns(location)
    check_supervised(source, columns, remembered=remembered, rules=rules)
    restart_with_settings()
    for sentence in options.sampling.notes():
        note(sentence)
    hush_libraries(verbose=verbose)

    plan = Plan(
        metrics=options.metrics,
        strategy=strategy,
        ks=options.pass_k,
        checker=found_checker,
        settings=options.sampling.settings(),
        limits=options.limits.limits(),
    )
    reasoner = open_reasoner(location, device=device, precision=options.precision, may_vote=True)
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
        say_json({"model": location, "data": source, **report.to_dict()})
    else:
        _describe(location, source, report)
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
