"""The chat template of a tokenizer: its own, a plain one, or a file's.

Enters: a tokenizer and the value of `data.chat_template`. Leaves: a Jinja template with the sentence that says where it
is from; the tokenizer's end token. Left out: rendering (`templates`, `template_sandbox`).

Messages → the pieces of text that are tokenised, with what the assistant says kept apart.

Enters: messages, tools and the tokenizer's own chat template, rendered within bounds (`template_sandbox`), once, over
the whole conversation. Leaves: `Piece`s: context, or one turn of the assistant with the end token that it must learn.
Where a turn begins is found by rendering the messages before it with the generation prompt, which is what generation
starts from; a template whose earlier text changes when messages follow is refused, and so is one that leaves out a
message, a call of a tool or the tools.
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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.record import shown
from loopos.data.template_checks import (
    SPLIT_HINT,
    TEMPLATE_HINT,
    TemplateRefusal,
    changes,
    check_context,
    end_of,
    end_of_text,
    num_shared,
    with_reasoning,
)
from loopos.data.template_sandbox import LONGEST_TEMPLATE, TemplateFailure, rendered
from loopos.data.tool_schemas import Tool, call_names

_PLAIN_TURNS = (
    "{% for message in messages %}"
    "{{ '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


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


def source_of(tokenizer: PreTrainedTokenizerBase, chosen: str) -> tuple[str, str]:
    """The template's text, and the sentence that says where it is from."""
    if chosen not in ("auto", "plain"):
        try:
            with Path(chosen).open(encoding="utf-8") as file:
                # One character more than a template may have: the sandbox then says that it is too long.
                return file.read(LONGEST_TEMPLATE + 1), f"chat template: {chosen}"
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(
                f'data.chat_template: {chosen} cannot be read ({problem}); expected "auto", "plain" or a file with a '
                "Jinja template"
            ) from problem
    if chosen == "auto" and tokenizer.chat_template is not None:
        try:
            return tokenizer.get_chat_template(), "chat template: the tokenizer's own"
        except ValueError as problem:
            raise UserError(f'{problem}; set data.chat_template to "plain" or to a file') from problem
    why = "" if chosen == "plain" else ", since the tokenizer has none"
    return plain_template(tokenizer), f"chat template: plain (### User: ... ### Assistant: ...){why}"


def tool_source(tokenizer: PreTrainedTokenizerBase, chosen: str) -> str | None:
    """The template for conversations with tools, where the tokenizer has one of its own for them."""
    own = tokenizer.chat_template
    found = own.get("tool_use") if chosen == "auto" and isinstance(own, dict) else None
    return found if isinstance(found, str) else None


__all__ = ["ChatTemplate", "Piece", "TemplateRefusal", "end_token", "plain_template"]

_ASKED, _SAID = "Kestrel 41", "Heron 73"
_TOOL = "kestrel_count"
_PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "Counts kestrels.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Where."}}},
    },
}
_MOST_PREFIX_CHARACTERS = 50_000_000
"""Characters that are rendered to find where the turns of one conversation begin. Most templates need two renderings,
however many turns; one whose text before the assistant's words differs from turn to turn needs one for each."""
_TOOLS_HINT = (
    "name a file with a template that writes tools in data.chat_template, or leave them out: "
    'data.columns: {"tools": null}'
)


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


class ChatTemplate:
    """Renders messages by one template. `summary` says which; `end` is the text that ends a turn of the assistant,
    empty where the template writes none and the tokenizer's end token is put behind each turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chosen: str = "auto") -> None:
        """chosen: "auto" (the tokenizer's own, else the plain format), "plain", or a file with a Jinja template.

        Raises `UserError` where the tokenizer has no end token, or the template cannot render a question and an answer.
        """
        end_token(tokenizer)
        self.tokenizer = tokenizer
        self.source, self.summary = source_of(tokenizer, chosen)
        self._tool_source = tool_source(tokenizer, chosen) or self.source
        if "strftime_now" in self.source:
            self.summary += "; it writes the date of the run into the text"
        self._header, self.end = self._probe()

    def pieces(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Piece]:
        """The rendered conversation in pieces, whose texts together are the whole. Raises `TemplateRefusal`."""
        if tools and not self._writes_tools:
            raise TemplateRefusal("the chat template does not write the row's tools", _TOOLS_HINT)
        whole = self._rendered(messages, tools, prompting=False)
        turns = [number for number, message in enumerate(messages) if message.role == ASSISTANT]
        starts = self._turn_starts(messages, tools, turns, whole)
        limits = [*starts, len(whole)][1:]
        pieces: list[Piece] = []
        place = 0
        for number, start, limit in zip(turns, starts, limits, strict=True):
            end = self._turn_end(messages, number, tools, whole, start, limit)
            if start > place:
                pieces.append(Piece(whole[place:start]))
            pieces.append(Piece(whole[start:end], number, closes=not self.end))
            place = end
        check_context(messages, whole)
        return [*pieces, Piece(whole[place:])] if place < len(whole) else pieces

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Piece]:
        """The pieces that generation of the next turn starts from: the same as those before that turn in training.

        Raises `TemplateRefusal`.
        """
        text = self._rendered(messages, tools, prompting=True)
        earlier = self.pieces(messages, tools)
        while earlier and earlier[-1].message is None:
            earlier.pop()
        past = "".join(piece.text for piece in earlier)
        if not text.startswith(past):
            raise TemplateRefusal(changes(past, text), SPLIT_HINT)
        return [*earlier, Piece(text[len(past) :])] if len(text) > len(past) else earlier

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a turn: the tokenizer's end token and, if another, the template's."""
        ids = {end_token(self.tokenizer)}
        if self.end:
            ids.add(self.tokenizer(self.end, add_special_tokens=False)["input_ids"][-1])
        return tuple(sorted(ids))

    @cached_property
    def _writes_tools(self) -> bool:
        """Whether the template writes the tools that it is given."""
        question = [Message("user", _ASKED)]
        try:
            return _TOOL in self._rendered(question, [_PROBE_TOOL], prompting=True)
        except TemplateRefusal:
            # It looks at tools: what it has against the row's own, it says when they are rendered.
            return True

    def _turn_starts(
        self, messages: Sequence[Message], tools: Sequence[Tool], turns: Sequence[int], whole: str
    ) -> list[int]:
        """Where each turn begins in `whole`.

        The first turn behind a message of each role, and the last turn of all, are rendered for themselves. What stands
        between that message's words and the turn then shows where the others begin; where it is not there, they are
        rendered too. So the work grows with the conversation, not with its square.
        """
        between: dict[str, str] = {}
        starts: list[int] = []
        place = spent = 0
        for number in turns:
            before = messages[number - 1] if number else None
            start = -1
            if before is not None and before.role in between and number != turns[-1]:
                start = end_of(before.content.strip() + between[before.role], whole, place)
            if start < 0:
                start = self._turn_start(messages[:number], tools, whole)
                spent += start
                if spent > _MOST_PREFIX_CHARACTERS:
                    reason = f"the chat template would have to be rendered for each of {len(turns):,} turns"
                    raise TemplateRefusal(reason, "split the conversation into shorter ones")
            if before is not None and before.role != ASSISTANT and before.role not in between:
                words = before.content.strip()
                found = whole.rfind(words, place, start) if words else -1
                if found >= 0:
                    between[before.role] = whole[found + len(words) : start]
            starts.append(start)
            place = start
        return starts

    def _turn_start(self, before: Sequence[Message], tools: Sequence[Tool], whole: str) -> int:
        """Where a turn begins in `whole`: behind what generation would start from."""
        if not before:
            position = whole.find(self._header)
            if position < 0:
                raise TemplateRefusal(f"the chat template writes no {shown(self._header)} before the assistant's words")
            return position + len(self._header)
        prompt = self._rendered(before, tools, prompting=True)
        if not whole.startswith(prompt):
            raise TemplateRefusal(changes(prompt, whole), SPLIT_HINT)
        return len(prompt)

    def _turn_end(
        self, messages: Sequence[Message], number: int, tools: Sequence[Tool], whole: str, start: int, limit: int
    ) -> int:
        """Where the turn of a message ends in `whole`: behind its words and calls and, if there is one, the end
        token after them.

        Templates may change white space between the words, and write more around them.
        """
        message = messages[number]
        end = end_of_text(message.content, whole, start, limit)
        if end < 0:
            reason = f"{shown(message.content)} became {shown(whole[start:limit])}"
            raise TemplateRefusal(f"the chat template leaves out part of what the assistant says: {reason}", SPLIT_HINT)
        called = start
        for name in call_names(message.more):
            called = end_of(name, whole, called, limit)
            if called < 0:
                raise TemplateRefusal(f"the chat template leaves out a call of the tool {shown(name)}", TEMPLATE_HINT)
        if self.end:
            position = whole.find(self.end, max(end, called), limit)
            if position < 0:
                raise TemplateRefusal(f"no end token {shown(self.end)} follows what the assistant says")
            return position + len(self.end)
        if called == start:
            return end
        # Nothing marks where the last call ends but the end of the text up to here.
        return min(limit, len(self._rendered(messages[: number + 1], tools, prompting=False).rstrip()))

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Tool], *, prompting: bool) -> str:
        variables = {
            "messages": [with_reasoning(message.as_template()) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": prompting,
            **self.tokenizer.special_tokens_map,
        }
        try:
            return rendered(self._tool_source if tools else self.source, variables)
        except TemplateFailure as problem:
            roles = ", ".join(message.role for message in messages[:20]) + (", ..." if len(messages) > 20 else "")
            raise TemplateRefusal(f"the chat template refuses messages of {roles}: {problem}") from problem

    def _probe(self) -> tuple[str, str]:
        """What stands between a question and an answer, and the end token behind the answer with what precedes it."""
        question, answer = Message("user", _ASKED), Message(ASSISTANT, _SAID)
        try:
            asked = self._rendered([question], (), prompting=False)
            prompt = self._rendered([question], (), prompting=True)
            text = self._rendered([question, answer], (), prompting=False)
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
