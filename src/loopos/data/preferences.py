"""Read comparisons: a prompt, two or more responses, and which of them people preferred.

Formats: prompt, chosen and rejected (texts, messages or one message each); chosen and rejected that both start with the
prompt, as in Anthropic's hh-rlhf; a prompt with many responses and their scores or ranking, where every two are a pair
(Ouyang et al. 2022, section 3.5); two responses with the votes of annotators. The report states read = used + dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loopos.data.annotation_exports import submitted
from loopos.data.columns import Overrides
from loopos.data.conversations import ASSISTANT, Message, message_of
from loopos.data.preference_formats import PreferenceFormat, detect
from loopos.data.preference_layouts import Misfit
from loopos.data.prompts import (
    IMPLICIT,
    PromptContent,
    add_identical,
    check_response,
    implied,
    is_answer,
    is_same,
    read_prompt,
    untemplated_note,
)
from loopos.data.reading import DataReport, Unusable, read_examples
from loopos.data.record import is_number, kind_name, shown
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.tool_schemas import Tool, check_no_tools, tools_of

_TIE = 0.5
_SIDES: Mapping[float, frozenset[str]] = {
    1.0: frozenset({"1", "first", "left", "a", "response1", "responsea", "modela", "answer1", "answera"}),
    0.0: frozenset({"2", "second", "right", "b", "response2", "responseb", "modelb", "answer2", "answerb"}),
    _TIE: frozenset({"tie", "tied", "same", "equal", "both", "draw", "tie(bothbad)", "bothbad", "neither"}),
}
"""Preference for the first response (1, 0, or 0.5 for a tie) → spellings of it."""
_EXPECTED = "1 or 2, response1 or response2, A or B, left or right, or tie; or a list of these"


def preference_of_votes(fields: RowFields) -> float:
    """Preference for the first response (0 to 1): one vote, or the mean. Problems go to `fields.problems`."""
    value = fields.structure("preference")
    answers = submitted(value) if isinstance(value, list) else [value]
    if not answers:
        actual = "an empty list" if value == [] else "a list of answers that nobody submitted"
        fields.add("preference does not fit", fields.field("preference"), actual, _EXPECTED)
        return _TIE
    return sum(_vote(fields, answer) for answer in answers) / len(answers)


def _vote(fields: RowFields, answer: object) -> float:
    """1 for the first response, 0 for the second, 0.5 for a tie."""
    value = _side_of(answer)
    if isinstance(value, Misfit):
        actual = f"{shown(value.value)} ({kind_name(value.value)})"
        fields.add("preference does not fit", fields.field("preference"), actual, value.expected)
        return _TIE
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    spelling = str(value).strip().lower()
    # Response 1, response_1 and response-1 are equal; a minus sign before a number is not a dash.
    spelling = spelling if spelling.startswith("-") else spelling.replace(" ", "").replace("_", "").replace("-", "")
    if isinstance(value, str | int) and not isinstance(value, bool):
        for side, spellings in _SIDES.items():
            if spelling in spellings:
                return side
    hint = "0 could mean the first response or a tie: write 1, 2 or tie" if spelling == "0" else ""
    actual = f"{shown(answer)} ({kind_name(answer)})"
    fields.add("preference does not fit", fields.field("preference"), actual, _EXPECTED, hint)
    return _TIE


def _side_of(answer: object) -> object:
    """What an answer names first: Argilla's `value`, Label Studio's `selected`, or the best of a ranking: a list from
    best to worst, or of values with ranks.
    """
    if isinstance(answer, dict):
        named = next((key for key in ("value", "selected") if key in answer), None)
        ranks, values = answer.get("rank"), answer.get("value")
        if isinstance(ranks, list) and isinstance(values, list) and len(ranks) == len(values):
            return _side_of([{"rank": rank, "value": value} for rank, value in zip(ranks, values, strict=True)])
        return answer if named is None else _side_of(answer[named])
    if not isinstance(answer, list) or not answer:
        return answer
    ranked: list[Any] = [each.get("rank") for each in answer if isinstance(each, dict)]
    if len(ranked) < len(answer) or not all(is_number(rank) for rank in ranked):
        return answer[0] if all(isinstance(each, str) for each in answer) else answer
    best = [each for each, rank in zip(answer, ranked, strict=True) if rank == min(ranked)]
    return "tie" if len(best) > 1 else _side_of(best[0])


_TRUTHS: Mapping[object, bool] = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses of a comparison by index: `better` beats `worse` with `probability` (1 = certain, 0.5 = a tie), by
    `margin` (>= 0, in the unit of the reward).
    """

    better: int
    worse: int
    probability: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt with two or more responses, and the preferred one of each pair.

    Prompt and responses are either all messages for the chat template, or all texts without a template.
    """

    prompt: PromptContent
    responses: tuple[PromptContent, ...]
    pairs: tuple[Pair, ...]
    row: Row
    tools: tuple[Tool, ...] = ()


def read_comparisons(
    reader: RowReader, overrides: Overrides, *, as_text: bool = False
) -> tuple[list[Comparison], DataReport]:
    """Read a source into comparisons of one format, in order.

    Args:
        overrides: role to column, from `data.columns`.
        as_text: keep prompt and responses as text if all are strings, instead of making messages.
    Raises:
        DataError: like `rows.read` and `preference_formats.detect`; bad rows by the reader's policy.
    """

    def from_row(row: Row, form: PreferenceFormat) -> Comparison | Unusable:
        fields = form.fields(row)
        example = comparison_of(fields, form, as_text=as_text)
        return example if example is not None else Unusable(fields.problems[0][0], [f for _, f in fields.problems])

    found: tuple[list[Comparison], PreferenceFormat, DataReport]
    found = read_examples(reader, lambda columns, source: detect(columns, overrides, source=source), from_row)
    examples, _, report = found
    note = untemplated_note([example.prompt for example in examples])
    return examples, replace(report, notes=(*report.notes, *note))


def comparison_of(fields: RowFields, form: PreferenceFormat, *, as_text: bool) -> Comparison | None:
    """The comparison of a row; None, with `fields.problems` filled, if there is none."""
    match form.kind:
        case "pairs":
            found = _pair(fields, as_text)
        case "groups":
            found = _group(fields, as_text)
        case "judged pairs":
            found = _pair(fields, as_text, ("response_1", "response_2"))
        case _:
            split, judged = implied(fields, IMPLICIT[form.kind]), _judged_pair(fields)
            found = None if split is None else Comparison(split[0], split[1], (judged,), fields.row)
    fields.check_no_media()
    tools = tools_of(fields)
    if found is not None and isinstance(found.prompt, str):
        check_no_tools(fields, tools)
    return None if fields.problems or found is None else replace(found, tools=tools)


def _pair(fields: RowFields, as_text: bool, roles: tuple[str, str] = ("chosen", "rejected")) -> Comparison | None:
    """A prompt and two responses, each a text or messages."""
    values = {role: fields.content(role) for role in roles}
    as_text = as_text and all(isinstance(value, str) for value in (fields.content("prompt"), *values.values()))
    prompt = read_prompt(fields, as_text=as_text)
    responses = [
        _response_messages(fields, fields.field(role), value)
        if isinstance(value, list | dict)
        else _text_response(fields.text(role), as_text)
        for role, value in values.items()
    ]
    return _comparison(fields, prompt, responses, list(map(fields.field, values)), [_judged_pair(fields)])


def _judged_pair(fields: RowFields) -> Pair:
    return _voted_pair(fields) if fields.has("preference") else _chosen_pair(fields)


def _group(fields: RowFields, as_text: bool) -> Comparison | None:
    """A prompt with many responses, each a text or messages, and their scores or ranking."""
    listed = fields.listed_values("responses", "a list of two or more responses")
    locations = [f"{fields.field('responses')}[{number}]" for number in range(len(listed))]
    values = [fields.content_value(location, value) for location, value in zip(locations, listed, strict=True)]
    if len(values) == 1:
        fields.add("only one response", fields.field("responses"), "1 response", "two or more responses")
    as_text = as_text and all(isinstance(value, str) for value in (fields.content("prompt"), *values))
    prompt = read_prompt(fields, as_text=as_text)
    responses = [
        _response_messages(fields, location, value)
        if isinstance(value, list | dict)
        else _text_response(fields.checked("response", location, value), as_text)
        for location, value in zip(locations, values, strict=True)
    ]
    pairs = _ranked(fields, len(values)) if fields.has("ranking") else _scored(fields, len(values))
    return _comparison(fields, prompt, responses, locations, pairs)


def _text_response(text: str, as_text: bool) -> PromptContent:
    return text if as_text else (Message(ASSISTANT, text),)


def _response_messages(fields: RowFields, source: str, value: list[object] | dict[str, object]) -> PromptContent:
    """The messages of a response: a list of them, or a single one."""
    if isinstance(value, dict):
        message = message_of(fields, source, value)
        return () if message is None else (message,)
    if not value:
        fields.add("response is empty", source, "an empty list", "a text, or a list of messages")
    read = [message_of(fields, f"{source}[{number}]", item) for number, item in enumerate(value)]
    return tuple(message for message in read if message is not None)


def _comparison(
    fields: RowFields,
    prompt: PromptContent,
    responses: Sequence[PromptContent],
    locations: Sequence[str],
    pairs: Sequence[Pair],
) -> Comparison | None:
    """Build the comparison and check its content."""
    if fields.problems:
        return None
    if not isinstance(prompt, str):
        if prompt[-1].role == ASSISTANT:
            hint = "leave the assistant's last message to the responses"
            actual = f"messages of {', '.join(message.role for message in prompt)}"
            expected = "a message to answer at the end"
            fields.add("prompt is already answered", fields.field("prompt"), actual, expected, hint)
        prompt, responses = _split_at_difference(prompt, [_without_prompt(prompt, each) for each in responses])
        for location, response in zip(locations, responses, strict=True):
            assert not isinstance(response, str), "a prompt of messages has responses of messages"
            check_response(fields, response, location)
    for (_, one), (location, other) in itertools.combinations(zip(locations, responses, strict=True), 2):
        if is_same(one, other):
            add_identical(fields, location, other)
            break
    return Comparison(prompt, tuple(responses), tuple(pairs), fields.row)


def _without_prompt(prompt: tuple[Message, ...], response: PromptContent) -> PromptContent:
    """The response without the prompt's messages, if it repeats them (UltraFeedback's binarized pairs); without those
    after the system's, if these are in a column of their own.
    """
    spoken = tuple(message for message in prompt if message.role not in ("system", "developer"))
    repeated = next((each for each in (prompt, spoken) if each and is_same(each, response[: len(each)])), ())
    return response[len(repeated) :]


def _split_at_difference(
    prompt: tuple[Message, ...], responses: Sequence[PromptContent]
) -> tuple[tuple[Message, ...], list[PromptContent]]:
    """Prompt and responses with the turns that all responses begin with in the prompt, as long as the assistant speaks
    first in each of what is left.
    """
    first, shortest = responses[0], min(map(len, responses))
    border = next(
        (
            turn
            for turn in range(shortest)
            if not all(is_same(first[turn : turn + 1], r[turn : turn + 1]) for r in responses)
        ),
        shortest,
    )
    while border and not all(is_answer(response[border:]) for response in responses):
        border -= 1
    shared = first[:border]
    assert not isinstance(shared, str), "messages go with messages"
    return (*prompt, *shared), [response[border:] for response in responses]


def _chosen_pair(fields: RowFields) -> Pair:
    """The pair of a row with chosen and rejected, with its probability and margin."""
    margin, probability = _number(fields, "margin", math.inf), _number(fields, "p_human", 1.0)
    if _is_tie(fields):
        if probability is not None:
            actual = f"{probability:g}, but {shown(fields.field('tie'))} marks the row as a tie"
            fields.add("p_human of a tie", fields.field("p_human"), actual, "one of the two")
        if margin:
            actual = f"{margin:g}, but {shown(fields.field('tie'))} marks the row as a tie"
            fields.add("margin of a tie", fields.field("margin"), actual, "no margin, or 0")
        probability = _TIE
    return Pair(0, 1, 1.0 if probability is None else probability, margin or 0.0)


def _voted_pair(fields: RowFields) -> Pair:
    """The pair of a row with votes on two responses."""
    preference, margin = preference_of_votes(fields), _number(fields, "margin", math.inf)
    better = 0 if preference >= _TIE else 1
    if preference == _TIE and margin:
        fields.add("margin of a tie", fields.field("margin"), f"{margin:g} beside a tie", "no margin, or 0")
    return Pair(better, 1 - better, max(preference, 1 - preference), margin or 0.0)


def _number(fields: RowFields, role: str, most: float) -> float | None:
    """The number from 0 to `most` in a column that may be absent, null or blank (text in CSV)."""
    value = fields.value(role)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    number = _as_number(value)
    if number is not None and 0 <= number <= most:
        return number
    expected = "a number >= 0" if math.isinf(most) else f"a number from 0 to {most:g}"
    fields.add(f"{role} does not fit", fields.field(role), f"{shown(value)} ({kind_name(value)})", expected)
    return None


def _as_number(value: object) -> float | None:
    """A finite number, also as text; None for anything else."""
    if not isinstance(value, str) and not is_number(value):
        return None
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_tie(fields: RowFields) -> bool:
    """Whether the row is a tie (text in CSV)."""
    value = fields.value("tie")
    if value is None or isinstance(value, bool):
        return bool(value)
    spelling = value.strip().lower() if isinstance(value, str) else None
    if spelling == "":
        return False
    if spelling not in _TRUTHS:
        actual = f"{shown(value)} ({kind_name(value)})"
        fields.add("tie does not fit", fields.field("tie"), actual, "true or false")
        return False
    return _TRUTHS[spelling]


def _scored(fields: RowFields, num_responses: int) -> list[Pair]:
    """A pair for every two responses: the higher score wins, equal scores tie."""
    field, scores = fields.field("scores"), list[float]()
    for index, value in enumerate(fields.listed_values("scores", "a list with a number for each response")):
        number = _as_number(value)
        if number is None:
            actual = f"{shown(value)} ({kind_name(value)})"
            fields.add("score is not a number", f"{field}[{index}]", actual, "a finite number")
        scores.append(0.0 if number is None else number)
    if not fields.problems and len(scores) != num_responses:
        actual = f"{len(scores)} scores for {num_responses} responses"
        fields.add("scores do not fit the responses", field, actual, "a number for each response")
    return [
        Pair(one, other, _TIE)
        if scores[one] == scores[other]
        else Pair(*sorted((one, other), key=lambda index: -scores[index]))
        for one, other in itertools.combinations(range(len(scores)), 2)
    ]


def _ranked(fields: RowFields, num_responses: int) -> list[Pair]:
    """A pair for every two responses: the one earlier in the ranking wins."""
    expected = "the indices of all responses, from 0, from best to worst"
    ranking = fields.listed_values("ranking", expected)
    locations = [location for location in ranking if isinstance(location, int) and not isinstance(location, bool)]
    if not fields.problems and (len(locations) < len(ranking) or sorted(locations) != list(range(num_responses))):
        actual = f"{shown(ranking)} for {num_responses} responses"
        hint = "indices start at 0" if sorted(locations) == list(range(1, num_responses + 1)) else ""
        fields.add("ranking does not fit the responses", fields.field("ranking"), actual, expected, hint)
    return [Pair(better, worse) for better, worse in itertools.combinations(locations, 2)]
