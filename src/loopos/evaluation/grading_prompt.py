"""The question to a judge about a response: a text with names of fields in braces. torch is not imported."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loopos.config.diagnostics import UserError

GRADING_PROMPT = """\
You grade the answer of an assistant.

[Question]
{prompt}

[Answer]
{response}

Is the answer correct, complete and helpful? Reply with one word: yes or no."""
YES_OR_NO = ("yes", "no")

_FIELD = re.compile(r"\{(\w+)\}")


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
        return filled(self.text, fields)


def filled(text: str, fields: Mapping[str, object]) -> str:
    """`text` with the values of `fields` for their names in braces; what is not a text stands as JSON. Raises
    `UserError` for a name in braces that is no field.
    """

    def value_of(found: re.Match[str]) -> str:
        if found[1] not in fields:
            known = ", ".join(fields)
            raise UserError(f"the grading prompt names {found[0]}, but the row has no such column (known: {known})")
        value = fields[found[1]]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return _FIELD.sub(value_of, text)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
