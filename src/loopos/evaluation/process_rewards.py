"""Scores of the steps of responses by a process reward model, and the score of a response that they give.

    prompt + steps → tokens → score s at the end of each step → p = σ(s) → product, minimum or last of all p

Letters: T tokens, M steps, k heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.preferences import Aggregation, ProcessSection
from loopos.data.batches import in_step
from loopos.data.prompts import PromptContent
from loopos.data.step_format import StepFormat, chosen_format
from loopos.data.stepwise_tokens import StepwiseRows
from loopos.evaluation.outputs import finite_scores
from loopos.functional.packing import PackedLayout

# Tokens of one forward pass.
_TOKENS = 2048


class StepScorer(Protocol):
    """ids `[T]`, layout, positions `[M]` → raw scores `[M, k]`."""

    def __call__(self, ids: Tensor, layout: PackedLayout, *, positions: Tensor) -> Tensor: ...


class ChainText(NamedTuple):
    """A response as a model that reasons wrote it: its text, its steps, and its answer with the marker before it, empty
    where there is none yet.
    """

    prompt: PromptContent
    text: str
    steps: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Process:
    """How a process reward model reads responses: `reward.process` of its config, as its folder describes it.
    `step_format`: None where texts are split at `step_separator`.
    """

    step_separator: str
    aggregation: Aggregation
    step_format: StepFormat | None
    answer_is_step: bool

    @classmethod
    def of(cls, section: ProcessSection) -> Process:
        """The process of a config."""
        form = None if section.step_format is None else chosen_format(section.step_format)
        return cls(section.step_separator, section.aggregation, form, section.answer_is_step)

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> Process | None:
        """The process in a model folder's description; None for a model that scores whole responses."""
        found = description.get("process")
        if found is None:
            return None
        form = found["step_format"]
        return cls(**{**found, "step_format": None if form is None else StepFormat(**form)})

    def description(self) -> dict[str, Any]:
        """What a model folder records."""
        return asdict(self)

    def steps_of(self, text: str) -> tuple[str, ...]:
        """The steps of a whole response. A text without any is one step."""
        if self.step_format is None:
            steps = tuple(part for part in text.split(self.step_separator) if part.strip())
        else:
            parsed = self.step_format.parse(text)
            chain = ChainText("", text, parsed.steps, parsed.answer and self.step_format.answer_marker + parsed.answer)
            steps = self.steps_of_chain(chain)
        return steps or (text,)

    def steps_of_chain(self, chain: ChainText) -> tuple[str, ...]:
        """The steps of a chain, and its answer as the last one where that is a step; the whole text without any."""
        answers = (chain.answer,) if self.answer_is_step and chain.answer.strip() else ()
        return (*chain.steps, *answers) or (chain.text,)

    def score(self, scores: Sequence[float]) -> float:
        """Scores of the steps of a response → a probability, by the aggregation."""
        return aggregated(scores, self.aggregation)


def process_of(description: Mapping[str, Any], aggregation: Aggregation | None = None) -> Process | None:
    """The process in a model folder's description, with another aggregation where one is given. Raises `UserError` for
    an aggregation of a model that scores whole responses.
    """
    found = Process.read(description)
    if found is None and aggregation is not None:
        raise UserError(
            f"aggregation {aggregation}: the model scores whole responses; only the scores of a process reward model "
            "are aggregated"
        )
    return found if found is None or aggregation is None else replace(found, aggregation=aggregation)


def probabilities(scores: Sequence[float]) -> list[float]:
    """σ(s) of each score."""
    found: list[float] = torch.sigmoid(torch.tensor(list(scores), dtype=torch.float64)).tolist()
    return found


def aggregated(scores: Sequence[float], aggregation: Aggregation) -> float:
    """The product, minimum or last of the probabilities p = σ(s) of steps with the scores s. Raises ValueError without
    a step.
    """
    if not scores:
        raise ValueError("scores: got no step; expected at least one")
    logs = F.logsigmoid(torch.tensor(list(scores), dtype=torch.float64))
    chosen = {"product": logs.sum(), "min": logs.min(), "last": logs[-1]}[aggregation]
    return math.exp(float(chosen))


@torch.no_grad()
def step_scores(
    model: StepScorer, rows: StepwiseRows, *, rank: int = 0, world: int = 1
) -> dict[int, list[list[float]]]:
    """Index of each answer of this rank → raw scores of its steps, a list of k each. Raises `NonFiniteOutputs`."""
    found: dict[int, list[list[float]]] = {}
    for batch, counts in in_step(rows, tokens=_TOKENS, rank=rank, world=world):
        scores = model(batch.ids, batch.layout, positions=batch.ends).float().cpu()
        if counts:
            found.update(zip(batch.rows, _parts(finite_scores(scores, "steps"), batch.counts), strict=True))
    return found


def _parts(scores: Tensor, counts: Sequence[int]) -> list[list[list[float]]]:
    """The scores `[M, k]` of each answer."""
    flat = iter(scores.tolist())
    return [[next(flat) for _ in range(count)] for count in counts]
