"""Which of two responses people prefer, as annotation tools write it → the share that prefers the first.

Enters: a row's fields, with the role `preference`. Leaves: a number from 0 to 1, 0.5 for a tie. Left out: the pair that
it makes (`preferences`).
"""

from __future__ import annotations

from collections.abc import Mapping

from loopos.data.record import shown
from loopos.data.row_fields import RowFields
from loopos.data.values import kind_name

_TIE = 0.5
_SIDES: Mapping[float, frozenset[str]] = {
    1.0: frozenset({"1", "first", "left", "a", "response1", "responsea", "modela", "answer1", "answera"}),
    0.0: frozenset({"2", "second", "right", "b", "response2", "responseb", "modelb", "answer2", "answerb"}),
    _TIE: frozenset({"tie", "tied", "same", "equal", "both", "draw", "tie(bothbad)", "bothbad", "neither"}),
}
"""How much an answer speaks for the first response → the words for it."""
_WANTED = "1 or 2, response1 or response2, A or B, left or right, or tie; or a list of these"


def share_of_votes(fields: RowFields) -> float:
    """The answer of one person, or the mean of several people's; what says nothing is noted in `fields.problems`."""
    value = fields.structure("preference")
    answers = value if isinstance(value, list) else [value]
    if not answers:
        fields.add("preference does not fit", fields.field("preference"), "an empty list", _WANTED)
        return _TIE
    return sum(_vote(fields, answer) for answer in answers) / len(answers)


def _vote(fields: RowFields, answer: object) -> float:
    """1 for the first response, 0 for the second, 0.5 for a tie."""
    value = answer.get("value") if isinstance(answer, dict) else answer
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = str(value).strip().lower()
    # Response 1, response_1 and response-1 are one; a sign before a number is none of these.
    word = word if word.startswith("-") else word.replace(" ", "").replace("_", "").replace("-", "")
    if isinstance(value, str | int) and not isinstance(value, bool):
        for side, words in _SIDES.items():
            if word in words:
                return side
    hint = "0 could mean the first response or a tie: write 1, 2 or tie" if word == "0" else ""
    given = f"{shown(answer)} ({kind_name(answer)})"
    fields.add("preference does not fit", fields.field("preference"), given, _WANTED, hint)
    return _TIE
