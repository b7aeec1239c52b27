"""A model measured on comparisons: metrics with their intervals, tables, and every pair, the largest errors first.

Enters: comparisons as tokens, with one number for every response, a reward model's score or a policy's implicit reward.
Leaves: what `loopos evaluate` prints and writes. The definitions are in `preference_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loopos.config.figures import figure
from loopos.data.preference_tokens import EncodedComparison
from loopos.data.preferences import Comparison, Pair
from loopos.data.prompts import PromptContent, prompt_text
from loopos.evaluation.blocks import Block, Grid, Heading
from loopos.evaluation.preference_metrics import brier_score
from loopos.evaluation.preference_report import bucket_tables, measured, preference_blocks

OfResponses = Sequence[Sequence[float]]
"""For every comparison a number for each of its responses."""


@dataclass(frozen=True)
class ComparisonJudgment:
    """`rows`: the comparisons that were measured, as tokens; their `index` is that in `examples`. `scores`: of their
    responses. `name`: what a score is called ("score", "reward"). `more`: further numbers of every response, for the
    records. `added`: further metrics. `dropped`: rows left out, by reason.
    """

    examples: Sequence[Comparison]
    rows: Sequence[EncodedComparison]
    scores: OfResponses
    name: str
    dropped: Mapping[str, int]
    more: Mapping[str, OfResponses] = field(default_factory=dict)
    added: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Those of `preference_metrics` (the gap of rewards as `reward_margin`), `brier`, and `ties`, the fraction of
        pairs with equal scores.
        """
        pairs = list(self._pairs())
        better, worse = ([scores[side(pair)] for _, pair, scores in pairs] for side in (_better, _worse))
        found = measured(self.rows, [[[score] for score in scores] for scores in self.scores])
        if self.name == "reward":
            found = {"reward_margin" if name == "score_gap" else name: value for name, value in found.items()}
        found["brier"] = brier_score(better, worse, [pair.probability for _, pair, _ in pairs])
        found["ties"] = sum(one == other for one, other in zip(better, worse, strict=True)) / len(pairs)
        return {**found, **self.added}

    @cached_property
    def tables(self) -> dict[str, Any]:
        """`by_margin` and `calibration`, as `preference_report.bucket_tables` gives them."""
        return bucket_tables(self.rows, [[[score] for score in scores] for scores in self.scores])

    def records(self) -> list[dict[str, Any]]:
        """One record per pair: from the most to the least confident error, then the correct ones from the least to the
        most confident. `gap`: how much higher the preferred response scores.
        """
        found = []
        for position, pair, scores in self._pairs():
            example = self.examples[self.rows[position].index]
            preferred, other = (pair.better, pair.worse) if pair.probability >= 0.5 else (pair.worse, pair.better)
            row = example.row
            record: dict[str, Any] = {"file": row.source}
            record |= {"line": row.line} if row.line is not None else {"row": row.index}
            record |= {
                "prompt": prompt_text(example.prompt),
                "preferred": _text(example.responses[preferred]),
                "other": _text(example.responses[other]),
                "gap": scores[preferred] - scores[other],
                "correct": scores[preferred] > scores[other],
            }
            for name, column in {self.name: self.scores, **self.more}.items():
                values = column[position]
                record |= {f"{name}_preferred": values[preferred], f"{name}_other": values[other]}
            if pair.probability != 1.0:
                record["probability"] = max(pair.probability, 1.0 - pair.probability)
            if pair.margin:
                record["margin"] = pair.margin
            found.append(record)
        return sorted(found, key=lambda record: float(record["gap"]))

    def blocks(self) -> list[Block]:
        """Metrics and tables for an HTML page."""
        rows = [(name, figure(value)) for name, value in self.metrics.items()]
        parts: list[Block] = [Heading("Metrics"), Grid(("metric", "value"), rows, numbers=(1,))]
        return [*parts, *preference_blocks([{"event": "preferences", "metrics": self.tables}])]

    def _pairs(self) -> Iterator[tuple[int, Pair, Sequence[float]]]:
        """Position of the comparison, the pair, and the scores of the comparison's responses."""
        for position, (row, scores) in enumerate(zip(self.rows, self.scores, strict=True)):
            yield from ((position, pair, scores) for pair in row.pairs)


def _better(pair: Pair) -> int:
    return pair.better


def _worse(pair: Pair) -> int:
    return pair.worse


def _text(response: PromptContent) -> str:
    return response if isinstance(response, str) else response[-1].content
