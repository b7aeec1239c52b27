"""Items of a study from files: comparisons, groups, answers with or without a thumb, conversations, or only prompts.

The files are read as `loopos data check` reads them. What a file says about which response is better is not shown to
annotators; it stays in the item's metadata.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.study import Mode
from loopos.data import rows
from loopos.data.annotation_exports import flat_rows
from loopos.data.conversations import ASSISTANT, Conversation
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.kinds import kind_of, read_kind
from loopos.data.preferences import Comparison
from loopos.data.prompts import Prompt
from loopos.data.record import is_number
from loopos.data.rows import Row
from loopos.data.supervised_rows import Completion
from loopos.data.thumbs import Thumbs
from loopos.studies.items import Content, Item, Response, content_of

SAME, UNPAIRED = "the two responses are the same", "a response without another one to the same prompt"
_EXPECTED = (
    "prompts, comparisons, groups, answers with a thumb, prompts with completions, or conversations that end with the "
    "assistant"
)


@dataclass(frozen=True)
class Imported:
    """Items in the order of the files, how many responses gave none by reason, and notes on what was read."""

    items: list[Item]
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt with its responses, by the number of the file that they come from."""

    prompt: Content
    tools: tuple[dict[str, Any], ...]
    responses: tuple[Response, ...]
    metadata: dict[str, Any]
    file: int


def items_of(
    sources: Sequence[str],
    mode: Mode,
    *,
    columns: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
    seed: int = 42,
    rules: TextRules = PLAIN_RULES,
) -> Imported:
    """Items of one mode from files.

    Two responses to compare are those of a row; of a group of more, pairs in a random order by the seed, in which each
    response is once. Single answers are paired by their prompt: those of two files with each other, those of one file
    in their order.

    Args:
        columns: role → column.
        names: the source of the responses of each file; of one file with comparisons, those of the first and second.
    Raises:
        DataError: as `loopos data check` reports it, and for rows without prompts.
    """
    found, notes = list[_Prompt](), list[str]()
    for number, source in enumerate(sources):
        own_names = list(names) if len(sources) == 1 else [*names[number : number + 1]] * 2
        read, summary = _read(source, columns or {}, own_names, number, rules)
        found += read
        notes.append(f"{source}: {summary}")
    dropped: Counter[str] = Counter()
    waiting = [Item(prompt=one.prompt, tools=one.tools, metadata=one.metadata) for one in found if not one.responses]
    answered = [one for one in found if one.responses]
    make = _compared if mode == "compare" else _single
    return Imported([*make(answered, dropped, seed), *waiting], dropped, notes)


def _read(
    source: str, columns: Mapping[str, str], names: Sequence[str], file: int, rules: TextRules
) -> tuple[list[_Prompt], str]:
    """The prompts of a file with their responses, and what was read."""
    reader = rows.read(source, rules=rules, lines=rows.Lines("prompt", frozenset({"prompt"})))
    listed = flat_rows(list(reader.rows()))
    reader.finish()
    kind = kind_of(listed, columns, source)
    if kind.family in ("labeled", "texts", "steps"):
        raise DataError([Diagnostic(source, None, None, "rows", f"rows that are {kind.name}", _EXPECTED)])
    examples, report = read_kind(reader, kind, columns)
    is_sample = kind.name == "samples"
    return [_prompt_of(each, names, file, is_sample=is_sample) for each in examples], report.summary()


def _prompt_of(example: Any, names: Sequence[str], file: int, *, is_sample: bool) -> _Prompt:
    """An example of `data` as a prompt with responses."""
    row: Row = example.row
    metadata: dict[str, Any] = {"file": row.location}
    match example:
        case Comparison(prompt=prompt, responses=contents):
            pair = example.pairs[0] if len(contents) == 2 else None
            if pair is not None:
                metadata["preference"] = pair.probability if pair.better == 0 else 1 - pair.probability
        case Thumbs(comparison=comparison):
            prompt, contents = comparison.prompt, comparison.responses
            metadata["desirable"] = list(example.desirable)
        case Completion(prompt=prompt, completion=completion):
            contents = (completion,)
        case Conversation(messages=messages):
            last = max(number for number, message in enumerate(messages) if message.role != ASSISTANT)
            prompt, contents = messages[: last + 1], (messages[last + 1 :],)
        case Prompt(prompt=prompt):
            text = row.values.get("text") if is_sample else None
            contents = (text,) if isinstance(text, str) else ()
        case _:
            raise AssertionError(f"no other kind of example is read: {example!r}")
    tools = tuple(dict(tool) for tool in getattr(example, "tools", ()))
    responses = tuple(
        Response(
            content=content_of(content), source=_source(row, names, index), scores=_scores(row, index, len(contents))
        )
        for index, content in enumerate(contents)
        if content
    )
    return _Prompt(content_of(prompt), tools, responses, metadata, file)


def _source(row: Row, names: Sequence[str], index: int) -> str:
    """Where a response comes from: as the user names it, or as a column does."""
    if index < len(names):
        return names[index]
    for name in (("model_a", "model_b")[index] if index < 2 else "", "model", "source"):
        if isinstance(row.values.get(name), str):
            return str(row.values[name])
    return ""


def _scores(row: Row, index: int, count: int) -> tuple[float, ...]:
    """The rewards of a response: `score` or `scores` of a single one, `scores` of a group, `score_chosen` and
    `scores_chosen` of a pair. A list is of several models.
    """
    if count == 1:
        value = row.values.get("scores", row.values.get("score"))
    elif count == 2 and "scores" not in row.values:
        side = ("chosen", "rejected")[index]
        value = row.values.get(f"scores_{side}", row.values.get(f"score_{side}"))
    else:
        listed = row.values.get("scores")
        value = listed[index] if isinstance(listed, list) and len(listed) == count else None
    numbers = value if isinstance(value, list) else [value]
    return tuple(map(float, numbers)) if numbers and all(map(is_number, numbers)) else ()


def _single(found: Sequence[_Prompt], dropped: Counter[str], seed: int) -> Iterator[Item]:
    """One item for each response."""
    for one in found:
        for response in one.responses:
            yield Item(prompt=one.prompt, responses=(response,), tools=one.tools, metadata=one.metadata)


def _compared(found: Sequence[_Prompt], dropped: Counter[str], seed: int) -> Iterator[Item]:
    """One item for each two responses."""
    single: dict[str, list[_Prompt]] = {}
    for number, one in enumerate(found):
        if len(one.responses) == 1:
            key = Item(prompt=one.prompt, tools=one.tools).prompt_key
            single.setdefault(key, []).append(one)
            continue
        responses = list(one.responses)
        if len(responses) > 2:
            random.Random(f"{seed} {number}").shuffle(responses)
        yield from _items(one, zip(responses[::2], responses[1::2], strict=False), dropped)
        dropped[UNPAIRED] += len(responses) % 2
    for prompts in single.values():
        by_file = [
            [one.responses[0] for one in group] for _, group in itertools.groupby(prompts, key=lambda one: one.file)
        ]
        first, second = (
            by_file
            if len(by_file) == 2
            else (
                [response for group in by_file for response in group][::2],
                [response for group in by_file for response in group][1::2],
            )
        )
        yield from _items(prompts[0], zip(first, second, strict=False), dropped)
        dropped[UNPAIRED] += abs(len(first) - len(second))
    for reason in [name for name, count in dropped.items() if not count]:
        del dropped[reason]


def _items(one: _Prompt, pairs: Iterator[tuple[Response, Response]], dropped: Counter[str]) -> Iterator[Item]:
    for pair in pairs:
        if pair[0].content == pair[1].content:
            dropped[SAME] += 1
        else:
            yield Item(prompt=one.prompt, responses=pair, tools=one.tools, metadata=one.metadata)
