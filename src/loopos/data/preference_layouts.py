"""Layouts of preference data whose columns are not a prompt and its responses as such: those of OpenAI, ms-swift,
UltraFeedback, SHP, Nectar, HelpSteer and SafeRLHF.

A layout is found by its columns. Its function takes the values of a row (by column, in lower case) and returns those of
the roles of a format of `preference_formats`, which reads them as it reads any other; the row itself keeps its columns.
Data whose columns are a prompt and its responses under other names needs no layout: see `preference_formats`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loopos.data.record import is_number, structure_of

Kind: TypeAlias = Literal["pairs", "groups", "judged pairs", "implicit pairs", "implicit judged pairs", "prompts"]
Values: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Layout:
    """`kind`: the format that its rows have. `needed`: columns by which it is found, `without`: those that other
    formats have. `columns`: role → where a row has it, as messages name it. `read`: values of a row → value by role.
    """

    name: str
    kind: Kind
    needed: frozenset[str]
    columns: Mapping[str, str]
    read: Callable[[Values], Values]
    without: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Misfit:
    """A value that says no preference, and what the layout has there."""

    value: object
    expected: str


def _structure(value: object) -> Any:
    """A list or an object, also where a cell has it as text; any other value unchanged."""
    return structure_of(value) or value if isinstance(value, str) else value


def _object(value: object) -> Mapping[str, Any]:
    found = _structure(value)
    return found if isinstance(found, dict) else {}


def _objects(value: object) -> list[Mapping[str, Any]] | None:
    """A list of objects; None for any other value."""
    found = _structure(value)
    return list(found) if isinstance(found, list) and all(isinstance(each, dict) for each in found) else None


def _number(value: object) -> float | None:
    """A number, also as text; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", value):
        return float(value)
    return float(value) if is_number(value) and isinstance(value, int | float) else None


def _either(value: object, sides: Mapping[float, str], expected: str) -> object:
    """The side that a number names."""
    number = _number(value)
    return Misfit(value, expected) if number is None or number not in sides else sides[number]


def openai(values: Values) -> Values:
    """OpenAI's preference fine-tuning (API reference, fine-tuning, "preference" method)."""
    request = _structure(values["input"])
    parts = _object(request)
    return {
        "prompt": parts.get("messages") if parts else request,
        "tools": parts.get("tools"),
        "chosen": values["preferred_output"],
        "rejected": values["non_preferred_output"],
    }


def swift_response(values: Values) -> Values:
    """ms-swift's `rejected_response`: an answer in place of the last message (Custom dataset, RLHF)."""
    messages = _structure(values["messages"])
    is_list = isinstance(messages, list) and bool(messages)
    return {
        "prompt": messages[:-1] if is_list else messages,
        "chosen": messages[-1] if is_list else None,
        "rejected": values["rejected_response"],
    }


def swift_messages(values: Values) -> Values:
    """ms-swift's `rejected_messages`: a whole conversation beside the good one (Custom dataset, RLHF)."""
    return {"chosen": values["messages"], "rejected": values["rejected_messages"]}


def ultrafeedback(values: Values) -> Values:
    """UltraFeedback as published (Cui et al. 2023): completions with the judge's `overall_score`, else the mean of its
    ratings of the four aspects.
    """
    completions = _objects(values.get("completions"))
    if completions is None:
        return {"prompt": values.get("instruction"), "responses": values.get("completions"), "scores": None}
    scores: list[object] = []
    for each in completions:
        rated = [_number(_object(aspect).get("Rating")) for aspect in _object(each.get("annotations")).values()]
        numbers = [rating for rating in rated if rating is not None]
        mean = sum(numbers) / len(numbers) if numbers else None
        scores.append(mean if each.get("overall_score") is None else each["overall_score"])
    responses = [each.get("response") for each in completions]
    return {"prompt": values.get("instruction"), "responses": responses, "scores": scores}


def shp(values: Values) -> Values:
    """Stanford Human Preferences (Ethayarajh et al. 2022): label 1 prefers A, 0 prefers B."""
    label = values["labels"]
    return {
        "prompt": values["history"],
        "response_1": values["human_ref_a"],
        "response_2": values["human_ref_b"],
        "preference": _either(label, {1.0: "first", 0.0: "second"}, "1 for A, or 0 for B"),
    }


def nectar(values: Values) -> Values:
    """Nectar (Zhu et al. 2023), Axolotl's zephyr.nectar: answers with ranks, 1 the best, to a dialogue as text."""
    answers = _objects(values.get("answers"))
    prompt = values.get("prompt")
    ranks = [_number(each.get("rank")) for each in answers or ()]
    return {
        "prompt": _dialogue(prompt) if isinstance(prompt, str) else prompt,
        "responses": values.get("answers") if answers is None else [each.get("answer") for each in answers],
        "scores": [None if rank is None else -rank for rank in ranks] or None,
    }


def helpsteer(question: str, one: str, other: str, strength: str) -> Callable[[Values], Values]:
    """HelpSteer 2 and 3 (Wang et al. 2024, 2025): a strength from -3, the first response, to 3, the second."""

    def read(values: Values) -> Values:
        number = _number(values[strength])
        side: object = Misfit(values[strength], "a number from -3, the first response, to 3, the second")
        if number is not None and -3 <= number <= 3:
            side = "first" if number < 0 else "second" if number > 0 else "tie"
        found = {"prompt": values[question], "response_1": values[one], "response_2": values[other]}
        return {**found, "preference": side, "margin": None if number is None else abs(number)}

    return read


def safe_rlhf(values: Values) -> Values:
    """PKU-SafeRLHF (Ji et al. 2024): the index, 0 or 1, of the more helpful response."""
    index = values["better_response_id"]
    return {
        "prompt": values["prompt"],
        "response_1": values["response_0"],
        "response_2": values["response_1"],
        "preference": _either(index, {0.0: "first", 1.0: "second"}, "0 or 1"),
    }


_SPEAKERS: Mapping[str, str] = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")


def _dialogue(text: str) -> object:
    """The messages of a dialogue as hh-rlhf writes it, without an empty last turn; other text unchanged."""
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        return text
    spoken = [(_SPEAKERS[who], words.strip()) for who, words in zip(turns[::2], turns[1::2], strict=True)]
    spoken = spoken[:-1] if spoken[-1] == ("assistant", "") else spoken
    return [{"role": role, "content": words} for role, words in spoken]


_JUDGED = ("prompt", "response_1", "response_2", "preference")
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "OpenAI's preferences",
        "pairs",
        frozenset({"input", "preferred_output", "non_preferred_output"}),
        {
            "prompt": "input.messages",
            "tools": "input.tools",
            "chosen": "preferred_output",
            "rejected": "non_preferred_output",
        },
        openai,
    ),
    Layout(
        "ms-swift's messages",
        "implicit pairs",
        frozenset({"messages", "rejected_messages"}),
        {"chosen": "messages", "rejected": "rejected_messages"},
        swift_messages,
        frozenset({"chosen", "rejected"}),
    ),
    Layout(
        "ms-swift's messages",
        "pairs",
        frozenset({"messages", "rejected_response"}),
        {"prompt": "messages", "chosen": "messages[-1]", "rejected": "rejected_response"},
        swift_response,
        frozenset({"chosen", "rejected", "chosen_response", "prompt", "instruction", "question"}),
    ),
    Layout(
        "UltraFeedback's completions",
        "groups",
        frozenset({"instruction", "completions", "models"}),
        {"prompt": "instruction", "responses": "completions", "scores": "completions[].overall_score"},
        ultrafeedback,
    ),
    Layout(
        "SHP",
        "judged pairs",
        frozenset({"history", "human_ref_a", "human_ref_b", "labels"}),
        dict(zip(_JUDGED, ("history", "human_ref_A", "human_ref_B", "labels"), strict=True)),
        shp,
    ),
    Layout(
        "Nectar's answers",
        "groups",
        frozenset({"prompt", "answers", "num_responses"}),
        {"prompt": "prompt", "responses": "answers", "scores": "answers[].rank"},
        nectar,
    ),
    Layout(
        "HelpSteer2's preferences",
        "judged pairs",
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        {
            **dict(zip(_JUDGED, ("prompt", "response_1", "response_2", "preference_strength"), strict=True)),
            "margin": "|preference_strength|",
        },
        helpsteer("prompt", "response_1", "response_2", "preference_strength"),
        frozenset({"preference"}),
    ),
    Layout(
        "HelpSteer3's preferences",
        "judged pairs",
        frozenset({"context", "response1", "response2", "overall_preference"}),
        {
            **dict(zip(_JUDGED, ("context", "response1", "response2", "overall_preference"), strict=True)),
            "margin": "|overall_preference|",
        },
        helpsteer("context", "response1", "response2", "overall_preference"),
        frozenset({"preference"}),
    ),
    Layout(
        "SafeRLHF's preferences",
        "judged pairs",
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        dict(zip(_JUDGED, ("prompt", "response_0", "response_1", "better_response_id"), strict=True)),
        safe_rlhf,
    ),
)


def layout_of(columns: Sequence[str]) -> Layout | None:
    """The layout of rows with these columns (in lower case); None where there is none."""
    names = set(columns)
    found = (layout for layout in LAYOUTS if layout.needed <= names and not layout.without & names)
    return next(found, None)
