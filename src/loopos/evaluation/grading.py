"""Grades of responses by a judge model: a language model that is asked for a grade, without sampling or parsing.

The score is the expectation of the grade under the model's next tokens, as G-Eval has it (Liu et al. 2023, section 2):

    score = Σ_g value(g) · p(g) / Σ_g p(g),    p(g) = Σ over the spellings of g

With the grades yes (1) and no (0) it is p(yes) / (p(yes) + p(no)). The same response always gets the same score.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loopos.config.diagnostics import UserError
from loopos.data.batches import in_packs
from loopos.data.digest import text_digest
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.reasoning import Reasoner
from loopos.functional.packing import PackedLayout
from loopos.models.language_ensemble import TokenScores, members_of
from loopos.models.load import fingerprint

GRADING_PROMPT = """\
You grade the answer of an assistant.

[Question]
{prompt}

[Answer]
{response}

Is the answer correct, complete and helpful? Reply with one word: yes or no."""
YES_OR_NO = ("yes", "no")

_FIELD = re.compile(r"\{(\w+)\}")
# Tokens of one forward pass.
_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class GradingPrompt:
    """The question to the judge: `text` with {prompt}, {response} and names of columns in braces; `values`: grade →
    its number.
    """

    text: str
    values: Mapping[str, float]

    @classmethod
    def of(cls, text: str, grades: Sequence[str]) -> GradingPrompt:
        """grades: a good and a bad word (1 and 0), or two and more numbers. Raises `UserError` for other grades, and
        for a text without {response}.
        """
        if "{response}" not in text:
            raise UserError("the grading prompt has no {response}; expected a text with {prompt} and {response}")
        words = [grade.strip() for grade in grades]
        numbers = [_number(word) for word in words]
        known = [number for number in numbers if number is not None]
        if len(set(words)) == len(words) > 1 and len(known) == len(words):
            return cls(text, dict(zip(words, known, strict=True)))
        if len(words) == 2 and not known and all(words) and words[0].lower() != words[1].lower():
            return cls(text, {words[0]: 1.0, words[1]: 0.0})
        raise UserError(
            f"grades: got {', '.join(words)}; expected a good and a bad word such as yes,no, or numbers such as 1,2,3"
        )

    @property
    def is_probability(self) -> bool:
        """Whether a score is the probability of the good word."""
        return len(self.values) == 2 and set(self.values.values()) == {0.0, 1.0}

    def filled(self, fields: Mapping[str, object]) -> str:
        """The question about one response. Raises `UserError` for a name in braces that is no field."""

        def value_of(found: re.Match[str]) -> str:
            if found[1] not in fields:
                known = ", ".join(fields)
                raise UserError(f"the grading prompt names {found[0]}, but the row has no such column (known: {known})")
            value = fields[found[1]]
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

        return _FIELD.sub(value_of, self.text)


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


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
