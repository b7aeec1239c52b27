"""Single answers with a thumb as packed batches, and the mismatched pairs that KTO estimates its baseline from.

Letters: T tokens of a packed row, N answers, M tokens of answers that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from loopos.data.preference_tokens import counted
from loopos.functional.packing import PackedLayout


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """A prompt and one answer as tokens. `desirable`: the thumb. `mismatched`: the answer to another prompt. `mask`,
    `mismatched_mask`: which of their tokens count, see `EncodedComparison`.
    """

    prompt: list[int]
    response: list[int]
    desirable: bool
    index: int
    mismatched: list[int] = field(default_factory=list)
    mask: list[bool] | None = None
    mismatched_mask: list[bool] | None = None


def with_mismatched(answers: Sequence[EncodedAnswer], *, seed: int) -> list[EncodedAnswer]:
    """Gives every prompt an answer to another one: that of the next answer in an order drawn from the seed whose prompt
    differs. Where all prompts are equal it is the next answer.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(answers)).tolist()
    found = list(answers)
    for position, index in enumerate(order):
        following = (order[(position + step) % len(order)] for step in range(1, len(order) + 1))
        own = answers[index].prompt
        other = next((each for each in following if answers[each].prompt != own), order[(position + 1) % len(order)])
        found[index] = replace(answers[index], mismatched=answers[other].response, mismatched_mask=answers[other].mask)
    return found


@dataclass(frozen=True)
class AnswerBatch:
    """Answers of one forward pass.

    `ids` `[T]`; `positions` `[M]`: positions whose hidden states predict the tokens `targets` `[M]`; `answer` `[M]`:
    the index among the N answers of each of these tokens; `desirable` `[N]` bool. `reference` `[M]` fp32:
    log-probabilities of the reference, None where it is computed beside the policy's. `baseline`: the estimate of
    KL(π ‖ ρ) of the step, nats. `is_first`: no step has changed the weights yet, so the policy is the reference.
    """

    ids: Tensor
    layout: PackedLayout
    positions: Tensor
    targets: Tensor
    answer: Tensor
    desirable: Tensor
    rows: tuple[int, ...]
    reference: Tensor | None = None
    baseline: float = 0.0
    is_first: bool = False

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, `[N]` fp32."""
        return self.per_answer(torch.ones(len(self.targets), device=self.ids.device))

    def per_answer(self, values: Tensor) -> Tensor:
        """Sums of values `[M]` by answer, `[N]` fp32."""
        total = torch.zeros(len(self.rows), dtype=torch.float32, device=values.device)
        return total.index_add(0, self.answer, values)


@dataclass(frozen=True)
class AnswerRows:
    """Answers as rows of `AnswerBatch`es. `mismatched`: the batches hold the mismatched answers instead. `reference`:
    log-probabilities of each answer's tokens.
    """

    answers: Sequence[EncodedAnswer]
    device: torch.device
    mismatched: bool = False
    reference: Sequence[Tensor] | None = None

    def response(self, row: int) -> list[int]:
        """The tokens of a row's answer."""
        each = self.answers[row]
        return each.mismatched if self.mismatched else each.response

    def counted(self, row: int) -> Sequence[int]:
        """The indices of those that count."""
        each = self.answers[row]
        return counted(self.response(row), each.mismatched_mask if self.mismatched else each.mask)

    @cached_property
    def lengths(self) -> list[int]:
        return [len(each.prompt) + len(self.response(row)) for row, each in enumerate(self.answers)]

    def __call__(self, rows: Sequence[int]) -> AnswerBatch:
        ids: list[int] = []
        positions: list[int] = []
        answer: list[int] = []
        for number, row in enumerate(rows):
            prompt, response, own = self.answers[row].prompt, self.response(row), self.counted(row)
            positions += [len(ids) + len(prompt) - 1 + token for token in own]
            answer += [number] * len(own)
            ids += [*prompt, *response]
        flat, before = torch.tensor(ids, device=self.device), torch.tensor(positions, device=self.device)
        reference = None if self.reference is None else torch.cat([self.reference[row] for row in rows])
        return AnswerBatch(
            ids=flat,
            layout=PackedLayout(tuple(self.lengths[row] for row in rows), self.device),
            positions=before,
            targets=flat[before + 1],
            answer=torch.tensor(answer, device=self.device),
            desirable=torch.tensor([self.answers[row].desirable for row in rows], device=self.device),
            rows=tuple(rows),
            reference=None if reference is None else reference.to(self.device),
        )
