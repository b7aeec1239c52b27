"""What people judge: a prompt with one response or two, and `items.jsonl`, which only grows.

The id of an item is a digest of its content, so that the same content is one item however often it is added, and votes
cannot come to stand for another text.
"""

from __future__ import annotations

import hashlib
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.keys import Section, Text
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.prompts import PromptContent
from loopos.storage.json_files import json_text
from loopos.storage.shared_log import SharedLog
from loopos.studies.lines import line_of, section_of

ITEMS = "items.jsonl"
_ID_DIGITS = 16

Content: TypeAlias = Text | Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
"""A text, or messages (role, content and what else they have)."""


class Response(Section):
    """One response to the prompt of an item."""

    content: Content = Field(description="the text, or messages of which the first and last are the assistant's")
    source: str = Field(default="", description="checkpoint, run or model that it comes from; annotators do not see it")
    sampling: dict[str, Any] = Field(default={}, description="sampling settings that it was generated with")
    scores: tuple[float, ...] = Field(default=(), description="its reward by each model of an ensemble")

    @property
    def text(self) -> str:
        """The response as one text: what the assistant wrote."""
        return text_of(self.content)


class Item(Section):
    """A prompt and the responses to judge: two to compare, one to rate, none while it waits for responses."""

    id: str = Field(default="", description="digest of the content; made when the item is added")
    prompt: Content = Field(description="the text that is continued, or messages")
    responses: tuple[Response, ...] = Field(default=(), max_length=2, description="responses to the prompt")
    tools: tuple[dict[str, Any], ...] = Field(default=(), description="tools that the model could call")
    metadata: dict[str, Any] = Field(default={}, description="whatever else belongs to the item")

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of prompt, tools, and contents and sources of responses."""
        values = self.model_dump(mode="json")
        parts = [[each["content"], each["source"]] for each in values["responses"]]
        text = json_text([values["prompt"], values["tools"], parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]

    @property
    def prompt_key(self) -> str:
        """A text that is equal only for equal prompts with equal tools."""
        values = self.model_dump(mode="json", include={"prompt", "tools"})
        return json_text(values, sort_keys=True)

    @property
    def margins(self) -> tuple[float, ...]:
        """Reward of the first response minus that of the second, by each model; empty unless all scored both."""
        if len(self.responses) < 2 or len(self.responses[0].scores) != len(self.responses[1].scores):
            return ()
        one, other = self.responses
        return tuple(a - b for a, b in zip(one.scores, other.scores, strict=True))


def text_of(content: Content) -> str:
    """A content as one text; of messages, what the assistant wrote, or if there is only one, what it has."""
    if isinstance(content, str):
        return content
    shown = [each for each in content if each.get("role") == ASSISTANT] or content
    return "\n\n".join(str(each.get("content") or "") for each in shown)


def content_of(content: PromptContent) -> Content:
    """A prompt or response of `data` as the content of an item."""
    return content if isinstance(content, str) else tuple(map(message_values, content))


def message_values(message: Message) -> dict[str, Any]:
    """A message with all its keys."""
    return dict(message.as_template())


@dataclass(frozen=True, slots=True)
class Added:
    """Counts of items that were new, and of those that the study had. `added + repeated` = what was passed in."""

    added: int
    repeated: int


class Items(Mapping[str, Item]):
    """The items of a study by id, in order. Reading sees what other processes have appended since."""

    def __init__(self, folder: Path) -> None:
        """Raises `DataError` for a line that is no item, or whose id is that of another content."""
        self._log = SharedLog(folder / ITEMS)
        self._items: dict[str, Item] = {}
        self._size = self._lines = 0
        self._catch_up()

    def add(self, items: Sequence[Item]) -> Added:
        """Append the items that are not there yet. Raises `StorageError`."""
        with self._log.locked():
            self._catch_up()
            new: dict[str, Item] = {}
            for each in items:
                item = each.model_copy(update={"id": each.digest})
                if item.id not in self._items:
                    new.setdefault(item.id, item)
            if new:
                self._log.append(b"".join(map(line_of, new.values())))
            self._catch_up()
            return Added(len(new), len(items) - len(new))

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    def _catch_up(self) -> None:
        """Read what was appended since the last time."""
        path = self._log.path
        if self._log.size() == self._size:
            # Without the lock: the file only grows.
            return
        with self._log.locked():
            if self._log.size() < self._size:
                # The file was replaced by an older one.
                self._items, self._size, self._lines = {}, 0, 0
            content = self._log.read(self._size)
        for line in content.splitlines(keepends=True):
            self._lines += 1
            self._size += len(line)
            if line.strip():
                item = _identified(section_of(Item, line, path, self._lines), path, self._lines)
                self._items.setdefault(item.id, item)

    def __getitem__(self, item_id: str) -> Item:
        self._catch_up()
        return self._items[item_id]

    def __iter__(self) -> Iterator[str]:
        self._catch_up()
        return iter(tuple(self._items))

    def __len__(self) -> int:
        self._catch_up()
        return len(self._items)

    def items(self) -> ItemsView[str, Item]:
        """Ids and items, read once: what others add meanwhile is not in it."""
        self._catch_up()
        return dict(self._items).items()

    def values(self) -> ValuesView[Item]:
        """The items, read once."""
        self._catch_up()
        return dict(self._items).values()


def _identified(item: Item, path: Path, number: int) -> Item:
    """The item with its id. Raises `DataError` where the line has that of another content."""
    digest = item.digest
    if item.id and item.id != digest:
        hint = "the line was changed after it was added: restore it, or remove its id to make it another item"
        raise DataError([Diagnostic(str(path), number, None, "id", f'"{item.id}"', f'"{digest}", the digest', hint)])
    return item.model_copy(update={"id": digest})
