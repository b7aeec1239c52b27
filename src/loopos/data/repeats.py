"""Keys of examples to find equal ones, and a note on validation rows that training contains too.

Metrics on such rows partly measure memorization. `near_duplicates` finds texts that are almost equal.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias

from loopos.data.conversations import ASSISTANT, Conversation
from loopos.data.demonstrations import Demonstration
from loopos.data.formats import Labeled
from loopos.data.preferences import Comparison
from loopos.data.prompts import Prompt, PromptContent, prompt_key
from loopos.data.stepwise import Stepwise
from loopos.data.supervised_rows import Completion, PlainText
from loopos.data.thumbs import Thumbs

AnyExample: TypeAlias = (
    Labeled | Demonstration | Conversation | Completion | PlainText | Comparison | Prompt | Stepwise | Thumbs | str
)


def key_of_prompt(example: AnyExample) -> Hashable:
    """What an example asks: its text or texts, its problem, the messages before the assistant first speaks."""
    match example:
        case str():
            return example.strip()
        case Labeled(text=text, text_pair=pair):
            return text.strip(), pair.strip() if pair is not None else None
        case Demonstration(problem=problem, system=system):
            return problem, system
        case Conversation(messages=messages):
            index = next(index for index, message in enumerate(messages) if message.role == ASSISTANT)
            return prompt_key(messages[:index])
        case Completion(prompt=prompt):
            return prompt.strip()
        case PlainText(text=text):
            return text.strip()
        case _:
            return _key(example.prompt)


def key_of_row(example: AnyExample) -> Hashable:
    """All that an example teaches."""
    prompt = key_of_prompt(example)
    match example:
        case Labeled(label=label):
            return prompt, repr(label)
        case Demonstration(steps=steps, answer=answer):
            return prompt, steps, answer
        case Conversation(messages=messages):
            return prompt_key(messages)
        case Completion(completion=completion):
            return prompt, completion.strip()
        case Comparison(responses=responses, pairs=pairs):
            # The order of the responses does not matter, only which one is better.
            ranked = {(_key(responses[pair.better]), _key(responses[pair.worse])) for pair in pairs}
            return prompt, frozenset(ranked)
        case Stepwise(steps=steps, labels=labels):
            return prompt, steps, labels
        case Thumbs(comparison=comparison, desirable=desirable):
            return prompt, tuple(map(_key, comparison.responses)), desirable
        case _:
            return prompt


def repeats_summary(train: Sequence[AnyExample], validation: Sequence[AnyExample], what: str = "prompt") -> list[str]:
    """The sentence that counts the rows of validation that training has too; none where it has none of them."""
    rows, prompts = ({key(each) for each in train} for key in (key_of_row, key_of_prompt))
    whole = sum(key_of_row(each) in rows for each in validation)
    shared = sum(key_of_prompt(each) in prompts for each in validation) - whole
    found = [f"{whole} are in the training data too"] if whole else []
    found += [f"{shared} share their {what} with a training row"] if shared else []
    if not found:
        return []
    return [f"validation: of {len(validation)} rows {' and '.join(found)}; metrics on them partly measure memorization"]


def _key(content: PromptContent) -> str:
    return prompt_key(content.strip() if isinstance(content, str) else content)
