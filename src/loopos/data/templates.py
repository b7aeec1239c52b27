"""Messages → the pieces of text that are tokenised, with what the assistant says kept apart.

Enters: messages and the tokenizer's own chat template, rendered in transformers' sandbox, once, over the whole
conversation. Leaves: `Piece`s: context, or one turn of the assistant with the end token that it must learn. Where a
turn begins is found by rendering the messages before it with the generation prompt, which is what generation starts
from; a template whose earlier text changes when messages follow, or that leaves out words of the assistant, is refused.
Tokenizers without a template get a plain one:

    ### User:⏎
    what is asked⏎
    ⏎
    ### Assistant:⏎
    what is answered<end token>⏎
    ⏎

Left out: tokens (`supervised_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from loopos.config.faults import UserError
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.record import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN_TURNS = (
    "{% for message in messages %}"
    "{{ '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
_ASKED, _SAID = "Kestrel 41", "Heron 73"
_SPLIT_HINT = (
    'give one row for each turn of the assistant (with the turns before it as "prompt"), or set data.chat_template to '
    '"plain"'
)


class TemplateRefusal(ValueError):
    """A template cannot render some messages so that what the assistant says can be learned; says why, and `hint`."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised by itself. `message`: the place of the assistant's message that it is the turn of, its end
    token included; None for context. `begins`: the tokenizer's own begin token stands before it. `closes`: its own end
    token stands behind it. Neither of these two is in the text.
    """

    text: str
    message: int | None = None
    begins: bool = False
    closes: bool = False


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's end token. Raises `UserError` where it has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token (eos_token), so the model could not learn to stop; set one in its "
            "tokenizer_config.json, or name another tokenizer in data.tokenizer"
        )
    return int(tokenizer.eos_token_id)


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The plain format as a Jinja template, with the begin token if the tokenizer adds one by itself. A tokenizer that
    keeps it in `chat_template` opens the trained model elsewhere with the same format.
    """
    added = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    return ("{{ bos_token }}" if added else "") + _PLAIN_TURNS


class ChatTemplate:
    """Renders messages by one template. `said` says which; `end` is the text that ends a turn of the assistant, empty
    where the template writes none and the tokenizer's end token is put behind each turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chosen: str = "auto") -> None:
        """chosen: "auto" (the tokenizer's own, else the plain format), "plain", or a file with a Jinja template.

        Raises `UserError` where the tokenizer has no end token, or the template cannot render a question and an answer.
        """
        end_token(tokenizer)
        self.tokenizer = tokenizer
        self.source, self.said = _source(tokenizer, chosen)
        if "strftime_now" in self.source:
            self.said += "; it writes the date of the run into the text"
        self._header, self.end = self._probe()

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The rendered conversation in pieces, whose texts together are the whole. Raises `TemplateRefusal`."""
        whole = self._rendered(messages, prompting=False)
        turns = [number for number, message in enumerate(messages) if message.role == ASSISTANT]
        starts = [self._turn_start(messages[:number], whole) for number in turns]
        limits = [*starts, len(whole)][1:]
        pieces: list[Piece] = []
        place = 0
        for number, start, limit in zip(turns, starts, limits, strict=True):
            end = self._turn_end(messages[number], whole, start, limit)
            if start > place:
                pieces.append(Piece(whole[place:start]))
            pieces.append(Piece(whole[start:end], number, closes=not self.end))
            place = end
        return [*pieces, Piece(whole[place:])] if place < len(whole) else pieces

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """The pieces that generation of the next turn starts from: the same as those before that turn in training.

        Raises `TemplateRefusal`.
        """
        text = self._rendered(messages, prompting=True)
        earlier = self.pieces(messages)
        while earlier and earlier[-1].message is None:
            earlier.pop()
        past = "".join(piece.text for piece in earlier)
        if not text.startswith(past):
            raise TemplateRefusal(_changes(past, text), _SPLIT_HINT)
        return [*earlier, Piece(text[len(past) :])] if len(text) > len(past) else earlier

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a turn: the tokenizer's end token and, if another, the template's."""
        ids = {end_token(self.tokenizer)}
        if self.end:
            ids.add(self.tokenizer(self.end, add_special_tokens=False)["input_ids"][-1])
        return tuple(sorted(ids))

    def _turn_start(self, before: Sequence[Message], whole: str) -> int:
        """Where a turn begins in `whole`: behind what generation would start from."""
        if not before:
            place = whole.find(self._header)
            if place < 0:
                raise TemplateRefusal(f"the chat template writes no {shown(self._header)} before the assistant's words")
            return place + len(self._header)
        prompt = self._rendered(before, prompting=True)
        if not whole.startswith(prompt):
            raise TemplateRefusal(_changes(prompt, whole), _SPLIT_HINT)
        return len(prompt)

    def _turn_end(self, message: Message, whole: str, start: int, limit: int) -> int:
        """Where a turn ends in `whole`: behind the message's words and, if there is one, the end token after them.

        Templates may change white space between the words, and write more around them.
        """
        said = _end_of_words(message.content, whole, start, limit)
        if said < 0:
            reason = f"{shown(message.content)} became {shown(whole[start:limit])}"
            raise TemplateRefusal(
                f"the chat template leaves out part of what the assistant says: {reason}", _SPLIT_HINT
            )
        if not self.end:
            return said
        place = whole.find(self.end, said, limit)
        if place < 0:
            raise TemplateRefusal(f"no end token {shown(self.end)} follows what the assistant says")
        return place + len(self.end)

    def _rendered(self, messages: Sequence[Message], *, prompting: bool) -> str:
        conversation: Any = [message.as_template() for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, chat_template=self.source, tokenize=False, add_generation_prompt=prompting
            )
        except (TemplateError, TypeError) as problem:
            roles = ", ".join(message.role for message in messages)
            raise TemplateRefusal(f"the chat template refuses messages of {roles}: {problem}") from problem
        assert isinstance(text, str)
        return text

    def _probe(self) -> tuple[str, str]:
        """What stands between a question and an answer, and the end token behind the answer with what precedes it."""
        question, answer = Message("user", _ASKED), Message(ASSISTANT, _SAID)
        try:
            asked = self._rendered([question], prompting=False)
            prompt = self._rendered([question], prompting=True)
            text = self._rendered([question, answer], prompting=False)
        except TemplateRefusal as problem:
            raise UserError(f'{problem}; set data.chat_template to "plain" or to a file') from problem
        _, answered, tail = text.rpartition(_SAID)
        if not answered:
            raise UserError(
                "the chat template does not write what the assistant says; set data.chat_template to "
                '"plain" or to a file'
            )
        header = prompt[num_shared(asked, prompt) :]
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in tokens if token.special} | {str(self.tokenizer.eos_token)}
        places = [(tail.find(token), -len(token), token) for token in special if token and token in tail]
        if not places:
            return header, ""
        place, _, token = min(places)
        return header, tail[: place + len(token)]


def _source(tokenizer: PreTrainedTokenizerBase, chosen: str) -> tuple[str, str]:
    """The template's text, and the sentence that says where it is from."""
    if chosen not in ("auto", "plain"):
        try:
            return Path(chosen).read_text(encoding="utf-8"), f"chat template: {chosen}"
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(
                f'data.chat_template: {chosen} cannot be read ({problem}); wanted "auto", "plain" or a file with a '
                "Jinja template"
            ) from problem
    if chosen == "auto" and tokenizer.chat_template is not None:
        try:
            return tokenizer.get_chat_template(), "chat template: the tokenizer's own"
        except ValueError as problem:
            raise UserError(f'{problem}; set data.chat_template to "plain" or to a file') from problem
    why = "" if chosen == "plain" else ", since the tokenizer has none"
    return plain_template(tokenizer), f"chat template: plain (### User: ... ### Assistant: ...){why}"


def _end_of_words(content: str, whole: str, start: int, limit: int) -> int:
    """Where the words of `content` end in `whole[start:limit]`, whatever white space is between them; -1 if nowhere."""
    place = whole.find(content.strip(), start, limit)
    if place >= 0:
        return place + len(content.strip())
    words = re.compile(r"\s*".join(re.escape(word) for word in content.split()))
    found = words.search(whole, start, limit)
    return found.end() if found is not None else -1


def num_shared(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _changes(prompt: str, whole: str) -> str:
    place = num_shared(prompt, whole)
    return (
        "the chat template changes earlier text when messages follow: "
        f"{shown(prompt[place : place + 40])} became {shown(whole[place : place + 40])}"
    )
