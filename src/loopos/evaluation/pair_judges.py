"""Which of two answers is better: a reward model, or a user's function that is asked in both orders.

Enters: pairs of answers to one prompt each. Leaves: a `Ruling` a pair, None for one that a reward model has no room
for. Left out: the answers, and what all rulings say together (`winrate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loopos.data.prompts import Words, told
from loopos.data.record import shown
from loopos.evaluation.own_code import OwnFunction, called_for, number_of, own_function, plain
from loopos.evaluation.reward_predictor import RewardPredictor, judged_words

Winner: TypeAlias = Literal["a", "b", "tie"]

PLACES: tuple[str, ...] = ("first", "second", "tie")
"""What a judge function may say."""


@dataclass(frozen=True, slots=True)
class Contest:
    """One prompt and the answers of A and of B. `prompt`: messages, or a text that was continued as it is."""

    prompt: Words
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Ruling:
    """`winner`: "tie" where the judge contradicts itself. `orders`: the winner with A's answer first, and with B's
    first; None where answers are scored one by one, so that there is no order. `scores`: of A and of B, None where
    there are none; means over both orders.
    """

    winner: Winner
    orders: tuple[Winner, Winner] | None = None
    scores: tuple[float, float] | None = None


PairJudge: TypeAlias = Callable[[Sequence[Contest]], list[Ruling | None]]


def by_reward(predictor: RewardPredictor) -> PairJudge:
    """The higher score of a reward model wins."""
    as_text = bool(predictor.opened.description["text"])

    def judge(contests: Sequence[Contest]) -> list[Ruling | None]:
        asked = [judged_words(each.prompt, answer, as_text=as_text) for each in contests for answer in (each.a, each.b)]
        scores = [None if found is None else found.score for found in predictor.judge_what_fits(asked)]
        return [
            None if a is None or b is None else Ruling(_higher(a, b, "a", "b"), scores=(a, b))
            for a, b in zip(scores[::2], scores[1::2], strict=True)
        ]

    return judge


def by_function(name: str) -> PairJudge:
    """A user's `function(prompt, first, second)`, all texts, by its name "module:function". It says "first", "second"
    or "tie", or gives two scores. It is asked twice, the second time with the answers in the other order: what wins
    once alone is a tie (Zheng et al. 2023, Judging LLM-as-a-Judge, section 3.4). Raises `UserError` for a function that
    is not there, and for anything else that it says.
    """
    function = own_function(name, "judge")

    def judge(contests: Sequence[Contest]) -> list[Ruling | None]:
        found: list[Ruling | None] = []
        for each in contests:
            asked = told(each.prompt)
            about = called_for(asked)
            place, scores = _ruling(function, function(asked, each.a, each.b, about=about), about)
            swapped, scores_swapped = _ruling(function, function(asked, each.b, each.a, about=about), about)
            orders = (_winner(place, "a", "b"), _winner(swapped, "b", "a"))
            winner = orders[0] if orders[0] == orders[1] else "tie"
            mean = None
            if scores is not None and scores_swapped is not None:
                mean = ((scores[0] + scores_swapped[1]) / 2, (scores[1] + scores_swapped[0]) / 2)
            found.append(Ruling(winner, orders, mean))
        return found

    return judge


def _ruling(function: OwnFunction, returned: Any, about: str) -> tuple[str, tuple[float, float] | None]:
    """The place of the better answer, and the scores if it gave some. Raises `UserError`."""
    found = plain(returned)
    if isinstance(found, str):
        if found in PLACES:
            return str(found), None
    elif isinstance(found, Sequence):
        scores = [number_of(score) for score in found]
        if len(scores) == 2 and scores[0] is not None and scores[1] is not None:
            return _higher(scores[0], scores[1], "first", "second"), (scores[0], scores[1])
    raise function.error(
        f'returned {shown(returned)}; expected "first", "second", "tie", or two finite numbers\n    for {about}'
    )


def _higher(one: float, other: float, name: str, other_name: str) -> Any:
    return name if one > other else other_name if other > one else "tie"


def _winner(place: str, first: Winner, second: Winner) -> Winner:
    return {"first": first, "second": second}.get(place, "tie")
