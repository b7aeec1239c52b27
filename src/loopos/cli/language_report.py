"""A language model measured on rows: answers to problems, and the loss of the tokens that training would learn. Apart
from `evaluate`, which starts without torch.

A row too long for one metric is counted with the reason, and still measured by the others.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from loopos.config.diagnostics import UserError
from loopos.config.keys import Strategy
from loopos.data import rows
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.demonstrations import Demonstration
from loopos.data.reading import left_out
from loopos.data.supervised_rows import Example, read_supervised
from loopos.data.supervised_tokens import OVER_LENGTH, RowPolicy, encode_supervised
from loopos.evaluation.answer_check import judge_all, problem_metrics, record
from loopos.evaluation.checkers import Checker, Verdict, answer_metrics
from loopos.evaluation.reasoning import Answered, Ranker, Reasoner
from loopos.generation.settings import SamplingParams
from loopos.generation.steps import StepLimits
from loopos.models.language_ensemble import next_token_loss
from loopos.training.distributed import World
from loopos.training.objectives import NextToken, mean_loss

# Problems answered between two lines of progress: enough that refilled places hide the end of each group.
_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; `metrics` may be empty: accuracy then where rows are problems with answers, else the loss."""

    metrics: Sequence[str]
    strategy: Strategy
    ks: Sequence[int]
    checker: Checker
    settings: SamplingParams
    limits: StepLimits
    ranker: Ranker | None = None


@dataclass
class LanguageReport:
    """What was found. `rows`: those that at least one metric is of; `dropped`: rows left out, by reason; `records`: one
    a problem.
    """

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens_generated: int = 0
    seconds_generating: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All but the records, as one JSON object. tokens_per_second: generated tokens a second, None without any."""
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
    """Reads the rows, then measures."""

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
        """Reads the rows. Raises `DataError`; and `UserError` where accuracy is expected of rows without answers."""
        self.source, self.on_bad_row = source, on_bad_row
        reader = rows.read(source, max_rows=max_rows, on_bad_row=on_bad_row, rules=rules)
        self.examples, found = read_supervised(
            reader, columns, step_format=self.reasoner.step_format, remembered=remembered
        )
        self.report.dropped.update(found.dropped)
        for sentence in (*found.notes, *left_out(found)):
            self.note(sentence)
        problems = sum(isinstance(example, Demonstration) for example in self.examples)
        self.metrics = tuple(self.plan.metrics) or (("accuracy",) if problems else ("loss", "perplexity"))
        if "accuracy" in self.metrics and not problems:
            raise UserError(
                f"--metric accuracy: no row of {source} is a problem with an answer ({found.notes[-1]}); expected "
                "rows with problem and answer, or --metric loss"
            )

    def measure(self) -> LanguageReport:
        """All metrics that are expected. Raises `UserError` where no row is left to measure."""
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
        """Measures accuracy and what belongs to it; the indices of the rows that were measured."""
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
            answered += self.reasoner.answer(
                group, plan.settings, strategy=plan.strategy, limits=plan.limits, ranker=plan.ranker
            )
            spent = time.monotonic() - began
            self.report.tokens_generated = sum(len(c.token_ids) - len(c.forced) for a in answered for c in a.chains)
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
        """Mean loss (nats a trained token, weighted as in training) and perplexity = exp(loss)."""
        reasoner = self.reasoner
        if reasoner.voters:
            raise UserError(
                "--metric loss: an ensemble that votes over answers gives no distribution over tokens; expected "
                "--metric accuracy, or one of method mean or logits"
            )
        positions = reasoner.engine.max_positions
        encoded, found = encode_supervised(
            reasoner.tokenizer,
            self.examples,
            step_format=reasoner.step_format,
            max_length=positions,
            policy=RowPolicy(max_dropped_share=1.0, on_bad_row=self.on_bad_row),
            template=reasoner.template,
        )
        for reason, count in found.dropped.items():
            self.report.dropped[_over(positions, "the row") if reason == OVER_LENGTH else reason] += count
        self.note(f"loss of {found.trained_tokens:,} trained tokens in {found.used:,} rows")
        model = next_token_loss(reasoner.model)
        usable = [row.encoded() for row in encoded]
        loss = mean_loss(NextToken(model), usable, device=reasoner.model.device, world=World())
        expected = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        self.report.metrics |= {name: value for name, value in expected.items() if name in self.metrics}
        return {row.index for row in encoded}


def _over(positions: int | None, what: str) -> str:
    return f"{what} is over the model's {positions} positions"
