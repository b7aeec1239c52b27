"""Votes → rows of training data and of other tools' files.

A format is a function from judged items to rows; instead of a row it may yield a text, the reason why an item gives
none, which is counted. The rows are what `data` reads, and what the named tool documents.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loopos.config.diagnostics import UserError
from loopos.config.own_function import OwnFunction
from loopos.config.registry import choices
from loopos.config.study_variants import STUDY_FORMATS
from loopos.data.conversations import ASSISTANT
from loopos.data.record import shown
from loopos.data.split import split_off
from loopos.studies.events import Vote
from loopos.studies.items import Content, Item
from loopos.studies.verdicts import Judged

Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = Iterator[Row | str]

TIED, SAME, SEVERAL = "tie", "the two responses are the same", "a response of several messages"
_SHAREGPT = {"user": "human", ASSISTANT: "gpt", "system": "system", "developer": "system", "tool": "observation"}


@dataclass(frozen=True)
class Exported:
    """Rows to train on and to validate on, and how many items gave none, by reason."""

    train: list[Row]
    validation: list[Row] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def export(judged: Sequence[Judged], format_name: str, *, validation: float = 0.0, seed: int = 42) -> Exported:
    """The rows of a format. validation: fraction of the items for validation; the items of one prompt all go to one
    side. Raises `UserError` for an unknown format, or one that is not for the mode of the study, and `DataError` for
    too few items to split.
    """
    function = OwnFunction(f"study format {format_name}", STUDY_FORMATS[format_name].load())
    dropped: Counter[str] = Counter()
    if not validation:
        return Exported(_rows(function, judged, dropped), [], dropped)
    keys = [each.item.prompt_key for each in judged]
    sides = split_off(keys, validation, seed, by="prompt", source="items with votes")
    parts = [[judged[index] for index in side] for side in (sides.train, sides.validation)]
    return Exported(_rows(function, parts[0], dropped), _rows(function, parts[1], dropped), dropped)


def _rows(function: OwnFunction, judged: Sequence[Judged], dropped: Counter[str]) -> list[Row]:
    found: list[Row] = []
    for each in function(judged, about=f"{len(judged)} judged items"):
        if isinstance(each, dict):
            found.append(each)
        elif isinstance(each, str):
            dropped[each] += 1
        else:
            raise function.error(f"returned {shown(each)}; expected a dict of columns, or the reason for none")
    return found


def preferences(judged: Sequence[Judged]) -> Rows:
    """Pairs of LoopOS and TRL: prompt, chosen, rejected, p_human and margin; without ties.

    p_human is the preference of the annotators for the chosen response, margin the mean strength of their votes.
    """
    yield from _pairs(judged, "preferences")


def preferences_with_ties(judged: Sequence[Judged]) -> Rows:
    """Pairs of LoopOS with ties, whose p_human is 0.5: prompt, chosen, rejected, p_human and margin."""
    yield from _pairs(judged, "preferences_with_ties", ties=True)


def thumbs(judged: Sequence[Judged]) -> Rows:
    """Single answers of KTO: prompt, completion and label.

    The better response of two is desirable and the other one not; where every vote is that both are bad, neither is.
    """
    _require(judged, "kto", ("compare", "thumbs"))
    for each in judged:
        contents = _contents(each)
        if each.mode == "thumbs":
            ups = sum(vote.ballot.choice == "up" for vote in each.votes)
            if 2 * ups == len(each.votes):
                yield "as many up as down"
            else:
                yield _answer(each, contents[0], 2 * ups > len(each.votes))
        elif each.better is not None:
            yield _answer(each, contents[each.better], True)
            yield _answer(each, contents[1 - each.better], False)
        elif all(vote.ballot.choice == "both_bad" for vote in each.votes):
            yield _answer(each, contents[0], False)
            yield _answer(each, contents[1], False)
        else:
            yield TIED


def groups(judged: Sequence[Judged]) -> Rows:
    """Rated responses to one prompt: prompt, responses and scores, their mean ratings."""
    _require(judged, "groups", ("rating",))
    prompts: dict[str, list[Judged]] = {}
    for each in judged:
        prompts.setdefault(each.item.prompt_key, []).append(each)
    for rated in prompts.values():
        if len(rated) < 2:
            yield "only one rated response to the prompt"
            continue
        responses = [each.item.responses[0].content for each in rated]
        yield {**_prompt(rated[0].item), "responses": responses, "scores": [each.rating for each in rated]}


def demonstrations(judged: Sequence[Judged]) -> Rows:
    """Texts that annotators wrote over a response: prompt and completion."""
    for each in judged:
        edited = dict.fromkeys(vote.ballot.edited for vote in each.votes if vote.ballot.edited is not None)
        for vote_text in edited:
            response = each.item.responses[each.better or 0].content
            yield {**_prompt(each.item), "completion": _edited(response, vote_text)}
        if not edited:
            yield "no edited text"


def best(judged: Sequence[Judged]) -> Rows:
    """The better response of two, as edited, or one with more thumbs up than down: prompt and completion."""
    _require(judged, "best", ("compare", "thumbs"))
    for each in judged:
        ups = sum(vote.ballot.choice == "up" for vote in each.votes)
        index = each.better if each.mode == "compare" else 0 if 2 * ups > len(each.votes) else None
        if index is None:
            yield TIED if each.mode == "compare" else "not more up than down"
        else:
            yield {**_prompt(each.item), "completion": _contents(each)[index]}


def llama_factory(judged: Sequence[Judged]) -> Rows:
    """Pairs of LLaMA-Factory: conversations, chosen and rejected as ShareGPT; "ranking": true in its dataset_info."""
    for each, chosen, rejected in _single_messages(judged, "llama_factory"):
        if isinstance(each, str):
            yield each
            continue
        turns = [_sharegpt(message) for message in _messages(each.item.prompt)]
        tools = {"tools": json.dumps(list(each.item.tools), ensure_ascii=False)} if each.item.tools else {}
        yield {"conversations": turns, "chosen": _sharegpt(chosen), "rejected": _sharegpt(rejected), **tools}


def axolotl(judged: Sequence[Judged]) -> Rows:
    """Pairs of Axolotl's chat_template.default: messages, chosen and rejected, each a message."""
    for each, chosen, rejected in _single_messages(judged, "axolotl"):
        if isinstance(each, str):
            yield each
            continue
        yield {"messages": _messages(each.item.prompt), "chosen": chosen, "rejected": rejected, **_tools(each.item)}


def argilla(judged: Sequence[Judged]) -> Rows:
    """Records of Argilla, as `records.from_json` reads them: fields, metadata and every annotator's response."""
    for each in judged:
        question, names = _question(each)
        answers: dict[str, list[Row]] = {question: [], "comment": []}
        for vote in each.votes:
            user = {"user_id": str(uuid.uuid5(uuid.NAMESPACE_URL, vote.annotator)), "status": "submitted"}
            answers[question].append({"value": _argilla_value(vote), **user})
            if vote.ballot.comment:
                answers["comment"].append({"value": vote.ballot.comment, **user})
        sources = {f"source_{number}": one.source for number, one in enumerate(each.item.responses, start=1)}
        responses = {name: _plain(one.content) for name, one in zip(names, each.item.responses, strict=True)}
        yield {
            "id": each.item.id,
            "fields": {"prompt": _plain(each.item.prompt), **responses},
            "metadata": {name: source for name, source in sources.items() if source},
            "responses": {name: values for name, values in answers.items() if values},
        }


def label_studio(judged: Sequence[Judged]) -> Rows:
    """Tasks of Label Studio with annotations: pairwise, a rating, or choices; its pairwise control has no tie."""
    for each in judged:
        annotations = [found for vote in each.votes if (found := _annotation(each, vote)) is not None]
        if not annotations:
            yield TIED
            continue
        names = ("answer1", "answer2") if each.mode == "compare" else _question(each)[1]
        contents = {name: _plain(one.content) for name, one in zip(names, each.item.responses, strict=True)}
        yield {"data": {"id": each.item.id, "prompt": _plain(each.item.prompt), **contents}, "annotations": annotations}


def chatbot_arena(judged: Sequence[Judged]) -> Rows:
    """Votes as Chatbot Arena publishes them, one row each: models, winner, annotator and both conversations."""
    _require(judged, "chatbot_arena", ("compare",))
    for each in judged:
        prompt = _messages(each.item.prompt)
        both = [[*prompt, *_messages(one.content, ASSISTANT)] for one in each.item.responses]
        for vote in each.votes:
            winner = {0: "model_a", 1: "model_b", None: "tie"}[vote.chosen]
            yield {
                "question_id": each.item.id,
                "model_a": each.item.responses[0].source,
                "model_b": each.item.responses[1].source,
                "winner": "tie (bothbad)" if vote.ballot.choice == "both_bad" else winner,
                "judge": vote.annotator,
                "conversation_a": both[0],
                "conversation_b": both[1],
                "turn": sum(message.get("role") == "user" for message in prompt),
                "anony": True,
                "tstamp": vote.time,
            }


def _pairs(judged: Sequence[Judged], name: str, *, ties: bool = False) -> Rows:
    _require(judged, name, ("compare",))
    for each in judged:
        if each.better is None and not ties:
            yield TIED
            continue
        better, contents = each.better or 0, _contents(each)
        if contents[0] == contents[1]:
            yield SAME
            continue
        margin = {} if each.margin is None else {"margin": each.margin}
        pair = {"chosen": contents[better], "rejected": contents[1 - better], "p_human": each.probability}
        yield {**_prompt(each.item), **pair, **margin}


def _single_messages(judged: Sequence[Judged], name: str) -> Iterator[tuple[Judged | str, Row, Row]]:
    """Items with the messages of both responses; or a reason with two empty messages."""
    _require(judged, name, ("compare",))
    for each in judged:
        contents = _contents(each)
        messages = [_messages(content, ASSISTANT) for content in contents]
        if each.better is None:
            yield TIED, {}, {}
        elif contents[0] == contents[1]:
            yield SAME, {}, {}
        elif any(len(found) > 1 for found in messages):
            yield SEVERAL, {}, {}
        else:
            yield each, messages[each.better][0], messages[1 - each.better][0]


def _require(judged: Iterable[Judged], name: str, modes: tuple[str, ...]) -> None:
    """Raises `UserError` for a study of another mode."""
    mode = next((each.mode for each in judged), modes[0])
    if mode not in modes:
        raise UserError(f'format {name}: got a study of mode "{mode}"; expected the mode {choices(modes, own="")}')


def _contents(judged: Judged) -> list[Content]:
    """The responses; the better one, or the only one, as edited."""
    contents: list[Content] = [response.content for response in judged.item.responses]
    index = judged.better if judged.mode == "compare" else 0
    if judged.edited is not None and index is not None:
        contents[index] = _edited(contents[index], judged.edited)
    return contents


def _edited(content: Content, text: str) -> Content:
    """A response whose last message has another text."""
    return text if isinstance(content, str) else (*content[:-1], {"role": ASSISTANT, "content": text})


def _answer(judged: Judged, content: Content, label: bool) -> Row:
    return {**_prompt(judged.item), "completion": content, "label": label}


def _prompt(item: Item) -> Row:
    return {"prompt": item.prompt, **_tools(item)}


def _tools(item: Item) -> Row:
    return {"tools": list(item.tools)} if item.tools else {}


def _messages(content: Content, role: str = "user") -> list[Row]:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def _plain(content: Content) -> object:
    """A text for a text field; messages where there is more than a text."""
    if isinstance(content, str):
        return content
    is_text = len(content) == 1 and content[0].keys() == {"role", "content"}
    return content[0]["content"] if is_text else list(content)


def _sharegpt(message: Mapping[str, Any]) -> Row:
    calls = message.get("tool_calls")
    if calls:
        functions = [each.get("function", each) for each in calls]
        value = functions[0] if len(functions) == 1 else functions
        return {"from": "function_call", "value": json.dumps(value, ensure_ascii=False)}
    role = str(message.get("role"))
    return {"from": _SHAREGPT.get(role, role), "value": message.get("content")}


def _question(judged: Judged) -> tuple[str, tuple[str, ...]]:
    """Name of the question, and of the fields of the responses."""
    if judged.mode == "compare":
        return "preference", ("response1", "response2")
    return ("label", ("completion",)) if judged.mode == "thumbs" else ("rating", ("response",))


def _argilla_value(vote: Vote) -> object:
    if vote.ballot.choice in ("left", "right"):
        return {0: "response1", 1: "response2", None: "tie"}[vote.chosen]
    return vote.ballot.rating if vote.ballot.choice is None else vote.ballot.choice


def _annotation(judged: Judged, vote: Vote) -> Row | None:
    """A vote as an annotation; None for one that the control does not have."""
    if judged.mode == "compare":
        if vote.chosen is None:
            return None
        result = {"type": "pairwise", "value": {"selected": ("left", "right")[vote.chosen]}, "to_name": "answers"}
    elif judged.mode == "thumbs":
        result = {"type": "choices", "value": {"choices": [vote.ballot.choice]}, "to_name": "completion"}
    else:
        result = {"type": "rating", "value": {"rating": vote.ballot.rating}, "to_name": "response"}
    time = {} if vote.ballot.seconds is None else {"lead_time": vote.ballot.seconds}
    name, _ = _question(judged)
    return {"completed_by": vote.annotator, "was_cancelled": False, **time, "result": [{"from_name": name, **result}]}
