"""Grades of responses by a judge model: a language model that is asked for a grade, without sampling or parsing.

The score is the expectation of the grade under the model's next tokens, as G-Eval has it (Liu et al. 2023, section 2):

    score = Σ_g value(g) · p(g) / Σ_g p(g),    p(g) = Σ over the spellings of g

With the grades yes (1) and no (0) it is p(yes) / (p(yes) + p(no)). The same response always gets the same score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loopos.config.diagnostics import UserError
from loopos.data.batches import in_packs
from loopos.data.digest import text_digest
from loopos.evaluation.grading_prompt import GradingPrompt
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.reasoning import Reasoner
from loopos.functional.packing import PackedLayout
from loopos.models.language_ensemble import TokenScores, members_of
from loopos.models.load import fingerprint

# Tokens of one forward pass.
_TOKENS = 2048


class Grader:
    """Grades with one judge model. `mass`: mean probability of all grades together, over the responses so far."""

    def __init__(self, reasoner: Reasoner, prompt: GradingPrompt) -> None:
        """Raises `UserError` for grades that the tokens do not tell apart, and for a model whose tokens cannot be
        scored.
        """
        self.reasoner, self.prompt = reasoner, prompt
        self._scores = TokenScores(reasoner.model)
        self._spellings = _spellings(reasoner, prompt)
        # The last token of a spelling is never an input, so that spellings of one token need no row of their own.
        self._begins = sorted({spelling[:-1] for spelling, _ in self._spellings})
        self._graded, self._mass = 0, 0.0

    @property
    def mass(self) -> float | None:
        return self._mass / self._graded if self._graded else None

    @property
    def identity(self) -> dict[str, Any]:
        """What the grades depend on."""
        models = [fingerprint(member) for member in members_of(self.reasoner.model)]
        return {
            "model": models,
            "dtype": str(members_of(self.reasoner.model)[0].dtype),
            "grading_prompt": text_digest(self.prompt.text),
            "grades": dict(self.prompt.values),
        }

    def grade(self, responses: Sequence[Mapping[str, object]]) -> list[float | None]:
        """The score of each response, given by the fields of the prompt; None where it is longer than the judge's
        positions. Raises `UserError` as `GradingPrompt.filled`, `NonFiniteOutputs`.
        """
        prompts = [self.reasoner.prompt(self.prompt.filled(fields)) for fields in responses]
        longest, most = max(map(len, self._begins)), self.reasoner.engine.max_positions
        fits = [index for index, ids in enumerate(prompts) if most is None or len(ids) + longest <= most]
        logprobs = self._logprobs([prompts[index] for index in fits])
        found: list[float | None] = [None] * len(prompts)
        for index, each in zip(fits, logprobs, strict=True):
            found[index] = self._score(each)
        return found

    def _score(self, logprobs: Sequence[float]) -> float:
        """The expected grade of log p of the spellings."""
        if not all(map(math.isfinite, logprobs)):
            raise NonFiniteOutputs("the judge model's log-probabilities are not finite; use precision fp32")
        most = max(logprobs)
        weights = [math.exp(each - most) for each in logprobs]
        total = math.fsum(weights)
        self._graded += 1
        self._mass += min(1.0, math.exp(most) * total)
        values = (value for _, value in self._spellings)
        return math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / total

    def _logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p of every spelling after every prompt."""
        rows = [(number, begin) for number in range(len(prompts)) for begin in self._begins]
        found: dict[tuple[int, int], float] = {(n, s): 0.0 for n in range(len(prompts)) for s in range(self._num)}
        device = self.reasoner.model.device
        for pack in in_packs([len(prompts[number]) + len(begin) for number, begin in rows], tokens=_TOKENS):
            ids: list[int] = []
            lengths: list[int] = []
            positions: list[int] = []
            chosen: list[int] = []
            owners: list[tuple[int, int]] = []
            for number, begin in (rows[index] for index in pack):
                first = len(ids) + len(prompts[number]) - 1
                ids += [*prompts[number], *begin]
                lengths.append(len(prompts[number]) + len(begin))
                for spelling, (tokens, _) in enumerate(self._spellings):
                    if tokens[:-1] == begin:
                        positions += range(first, first + len(tokens))
                        chosen += tokens
                        owners += [(number, spelling)] * len(tokens)
            layout = PackedLayout(tuple(lengths), device)
            where, what = torch.tensor(positions, device=device), torch.tensor(chosen, device=device)
            logprobs, _ = self._scores.of(torch.tensor(ids, device=device), layout, where, what)
            for owner, logprob in zip(owners, logprobs.tolist(), strict=True):
                found[owner] += logprob
        return [[found[number, spelling] for spelling in range(self._num)] for number in range(len(prompts))]

    @property
    def _num(self) -> int:
        return len(self._spellings)


def _spellings(reasoner: Reasoner, prompt: GradingPrompt) -> list[tuple[tuple[int, ...], float]]:
    """Tokens and value of each grade, as it is written and capitalized, with and without a space before it. Raises
    `UserError` where the tokens of one grade begin with those of another: its probability would count for both.
    """
    found: list[tuple[tuple[int, ...], str]] = []
    for grade in prompt.values:
        texts = dict.fromkeys(space + word for word in (grade, grade.capitalize()) for space in ("", " "))
        spelled = [tuple(reasoner.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        found += [(ids, grade) for ids in dict.fromkeys(spelled) if ids]
    for ids, grade in found:
        for other, longer in found:
            if grade != longer and other[: len(ids)] == ids:
                raise UserError(
                    f"grades: the tokens of {longer} begin with those of {grade} in this model's tokenizer; "
                    "use grades that begin differently, for example 1 to 5"
                )
    return [(ids, prompt.values[grade]) for ids, grade in found]
