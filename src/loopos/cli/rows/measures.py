"""Examples of any kind → the numbers and repetitions that `loopos data check` tells of them.

Enters: examples as training reads them. Leaves: ranges by name (characters, turns, steps, responses), counts, groups of
rows that repeat, groups that contradict each other. Left out: labels (`data_check`), printing.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from loopos.data.conversations import ASSISTANT, Conversation
from loopos.data.demonstrations import Demonstration
from loopos.data.formats import Labelled
from loopos.data.near_duplicates import near_duplicates
from loopos.data.preferences import Comparison
from loopos.data.prompts import Prompt, Words, told
from loopos.data.repeats import AnyExample, key_of_prompt, key_of_row
from loopos.data.rows import Row
from loopos.data.supervised_rows import Completion, PlainText

Range = dict[str, float]


def spread(numbers: Iterable[float]) -> Range:
    """Least, median, mean and greatest."""
    ordered = sorted(numbers)
    return {
        "least": ordered[0],
        "median": statistics.median(ordered),
        "mean": round(statistics.fmean(ordered), 1),
        "most": ordered[-1],
    }


def text_of(example: AnyExample) -> str:
    """What is compared and shown of an example: its text or texts, or what it asks."""
    match example:
        case Labelled(text=text, text_pair=pair):
            return text if pair is None else f"{text}\n{pair}"
        case Demonstration(problem=problem):
            return problem
        case Conversation(messages=messages):
            return "\n".join(message.content for message in messages)
        case Completion(prompt=prompt, completion=completion):
            return f"{prompt}\n{completion}"
        case PlainText(text=text):
            return text
        case str():
            return example
        case _:
            return told(example.prompt)


def ranges(examples: Sequence[Any]) -> dict[str, Range]:
    """The ranges of what examples of one kind have, by name."""
    found: dict[str, list[float]] = defaultdict(list)
    for example in examples:
        found["characters"].append(len(text_of(example)))
        match example:
            case Demonstration(steps=steps, answer=answer):
                found["steps"].append(len(steps))
                found["answer characters"].append(len(answer))
            case Conversation(messages=messages):
                found["turns"].append(sum(message.role == ASSISTANT for message in messages))
                found["messages"].append(len(messages))
            case Completion(completion=completion):
                found["completion characters"].append(len(completion))
            case Comparison(responses=responses):
                found["responses"].append(len(responses))
                found["response characters"] += [_size(response) for response in responses]
            case Prompt(prompt=prompt) if not isinstance(prompt, str):
                found["messages"].append(len(prompt))
            case _:
                pass
    return {name: spread(numbers) for name, numbers in found.items()}


def counts(examples: Sequence[Any]) -> dict[str, float]:
    """What is counted over examples of one kind, by name."""
    first = examples[0]
    prompts: dict[str, float] = {"different prompts": len({key_of_prompt(each) for each in examples})}
    if isinstance(first, Comparison):
        pairs = [(each, pair) for each in examples for pair in each.pairs]
        decided = [(each, pair) for each, pair in pairs if pair.probability != 0.5]
        longer = sum(_size(each.responses[pair.better]) > _size(each.responses[pair.worse]) for each, pair in decided)
        shares = {"the longer response is preferred": round(longer / len(decided), 3)} if decided else {}
        return {**prompts, "pairs": len(pairs), "ties": len(pairs) - len(decided), **shares}
    if any(isinstance(each, Conversation) for each in examples):
        chats = [each for each in examples if isinstance(each, Conversation)]
        with_system = sum(each.messages[0].role in ("system", "developer") for each in chats)
        return {**prompts, "with a system message": with_system}
    if isinstance(first, Demonstration):
        return {**prompts, "without steps": sum(not each.steps for each in examples)}
    return {} if isinstance(first, Labelled | str) else prompts


def repeated(examples: Sequence[Any], what: str) -> dict[str, int]:
    """Texts (or prompts) that occur more than once and the rows that they are in; rows that say the same in all."""
    groups = [group for group in grouped(examples) if len(group) > 1]
    found = {f"{what}s": len(groups), "rows": sum(len(group) for group in groups)}
    if what == "prompt" and not isinstance(examples[0], Prompt):
        found["rows that say the same"] = len(examples) - len({key_of_row(each) for each in examples})
    return found


def grouped(examples: Sequence[Any]) -> list[list[Any]]:
    """Examples that ask the same, in the order of the first of each."""
    groups: dict[Hashable, list[Any]] = {}
    for example in examples:
        groups.setdefault(key_of_prompt(example), []).append(example)
    return list(groups.values())


def conflicts(examples: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows that contradict each other: one text with several labels, one problem with several answers, one pair of
    responses preferred either way.
    """
    found = []
    for group in grouped(examples):
        values: dict[str, Any] = {}
        for example in group:
            if isinstance(example, Labelled) and example.label is not None:
                values[repr(example.label)] = example.label
            elif isinstance(example, Demonstration):
                values[example.answer] = example.answer
        name = "labels" if isinstance(group[0], Labelled) else "answers"
        if isinstance(group[0], Comparison):
            name, values = "preferences", _turned(group)
        if len(values) > 1:
            lines = [place_of(example) for example in group]
            found.append({"text": text_of(group[0]), name: list(values.values()), "lines": lines})
    return found


def near(examples: Sequence[Any]) -> dict[str, Any]:
    """Rows whose text is nearly that of an earlier row, of those whose texts differ; the first pairs by their lines."""
    firsts = [group[0] for group in grouped(examples)]
    found = near_duplicates([text_of(each) for each in firsts])
    pairs = [[place_of(firsts[other]), place_of(firsts[place])] for place, other in found.pairs]
    return {"rows": len(pairs), "compared": found.compared, "lines": pairs[:5]}


def place_of(example: Any) -> int | None:
    """The line of an example, or its number where its file has no lines."""
    if isinstance(example, str):
        return None
    row: Row = example.row
    return row.line if row.line is not None else row.index


def _turned(group: Sequence[Comparison]) -> dict[str, str]:
    """The responses that are the better one of a pair in one row and the worse one of the same pair in another."""
    ranked = {
        (_plain(each.responses[pair.better]), _plain(each.responses[pair.worse]))
        for each in group
        for pair in each.pairs
        if pair.probability != 0.5
    }
    both = sorted({better for better, worse in ranked if (worse, better) in ranked})
    return {each: each for each in both}


def _plain(words: Words) -> str:
    return told(words).strip()


def _size(words: Words) -> int:
    return len(words) if isinstance(words, str) else sum(len(message.content) for message in words)
