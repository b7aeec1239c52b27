"""Chat templates: render messages to segments of text, with the assistant's turns separate.

The template is the tokenizer's own, a plain one, or a file. A conversation is rendered once as a whole
(`template_sandbox`). The start of a turn is found by rendering the messages before it with the generation prompt, so
that training and generation see the same text. A template is refused if it changes earlier text when messages follow,
or leaves out a message, a tool call or the tools. The plain template, for tokenizers without one:

    ### User:⏎{question}⏎⏎### Assistant:⏎{answer}<end token>⏎⏎
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
    """The id of the tokenizer's end token. Raises `UserError` if it has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token (eos_token), so the model could not learn to stop; set one in its "
            "tokenizer_config.json, or name another tokenizer in data.tokenizer"
        )
    return int(tokenizer.eos_token_id)


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The plain format as a Jinja template, with the begin token if the tokenizer adds one.

    Stored as the tokenizer's `chat_template`, it makes other tools use the same format.
    """
    added = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    return ("{{ bos_token }}" if added else "") + _PLAIN_TURNS


def source_of(tokenizer: PreTrainedTokenizerBase, chosen: str) -> tuple[str, str]:
    """The text of the template, and a note on its origin."""
    if chosen not in ("auto", "plain"):
        try:
            with Path(chosen).open(encoding="utf-8") as file:
                # One character over the limit, so that the sandbox reports a template that is too long.
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
    """The tokenizer's separate template for conversations with tools, if it has one."""
    own = tokenizer.chat_template
    found = own.get("tool_use") if chosen == "auto" and isinstance(own, dict) else None
    return found if isinstance(found, str) else None


__all__ = ["ChatTemplate", "Segment", "TemplateRefusal", "end_token", "plain_template"]

_QUESTION, _ANSWER = "Kestrel 41", "Heron 73"
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
"""Limit on characters rendered to find the turns of one conversation. Most templates need two renderings for any number
of turns; a template whose header differs between turns needs one rendering per turn."""
_TOOLS_HINT = (
    "name a file with a template that writes tools in data.chat_template, or leave them out: "
    'data.columns: {"tools": null}'
)


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is tokenized by itself.

    `message`: index of the assistant's message whose turn this is, end token included; None for context. `begins` and
    `closes`: the tokenizer's begin token precedes, its end token follows; neither is in the text.
    """

    text: str
    message: int | None = None
    begins: bool = False
    closes: bool = False


class ChatTemplate:
    """Renders messages with one template, named in `summary`.

    `end` is the text that ends an assistant turn; empty if the template writes none, in which case the tokenizer's end
    token is added after each turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chosen: str = "auto") -> None:
        """chosen: "auto" (the tokenizer's own, else the plain format), "plain", or a file with a Jinja template.

        Raises `UserError` if the tokenizer has no end token or the template cannot render a question and an answer.
        """
        end_token(tokenizer)
        self.tokenizer = tokenizer
        self.source, self.summary = source_of(tokenizer, chosen)
        self._tool_source = tool_source(tokenizer, chosen) or self.source
        if "strftime_now" in self.source:
            self.summary += "; it writes the date of the run into the text"
        self._header, self.end = self._probe()

    def segments(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        """The rendered conversation as segments, whose texts join to the whole. Raises `TemplateRefusal`."""
        if tools and not self.writes_tools:
            name = self.summary.removeprefix("chat template: ")
            raise TemplateRefusal(f"the chat template does not write the row's tools ({name})", _TOOLS_HINT)
        whole = self._rendered(messages, tools, prompting=False)
        turns = [number for number, message in enumerate(messages) if message.role == ASSISTANT]
        starts = self._turn_starts(messages, tools, turns, whole)
        limits = [*starts, len(whole)][1:]
        segments: list[Segment] = []
        position = 0
        for number, start, limit in zip(turns, starts, limits, strict=True):
            end = self._turn_end(messages, number, tools, whole, start, limit)
            if start > position:
                segments.append(Segment(whole[position:start]))
            segments.append(Segment(whole[start:end], number, closes=not self.end))
            position = end
        check_context(messages, whole)
        return [*segments, Segment(whole[position:])] if position < len(whole) else segments

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        """The segments that generation of the next turn starts from; the same as before that turn in training.

        Raises `TemplateRefusal`.
        """
        text = self._rendered(messages, tools, prompting=True)
        earlier = self.segments(messages, tools)
        while earlier and earlier[-1].message is None:
            earlier.pop()
        past = "".join(segment.text for segment in earlier)
        if not text.startswith(past):
            raise TemplateRefusal(changes(past, text), SPLIT_HINT)
        return [*earlier, Segment(text[len(past) :])] if len(text) > len(past) else earlier

    def text(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, prompting: bool = False) -> str:
        """The rendered conversation. prompting: with the start of the next turn. Raises `TemplateRefusal`."""
        return self._rendered(messages, tools, prompting=prompting)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a turn: the tokenizer's end token and the template's, if it differs."""
        ids = {end_token(self.tokenizer)}
        if self.end:
            ids.add(self.tokenizer(self.end, add_special_tokens=False)["input_ids"][-1])
        return tuple(sorted(ids))

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template renders tools."""
        question = [Message("user", _QUESTION)]
        try:
            return _TOOL in self._rendered(question, [_PROBE_TOOL], prompting=True)
        except TemplateRefusal:
            # The template handles tools; it reports problems of a row's tools when they are rendered.
            return True

    def _turn_starts(
        self, messages: Sequence[Message], tools: Sequence[Tool], turns: Sequence[int], whole: str
    ) -> list[int]:
        """Where each turn begins in `whole`.

        The first turn after a message of each role, and the last turn, are found by rendering. The text between that
        message and the turn then locates the other turns; if it is not found, they are rendered too. So the work is
        linear in the length of the conversation, not quadratic.
        """
        between: dict[str, str] = {}
        starts: list[int] = []
        position = spent = 0
        for number in turns:
            before = messages[number - 1] if number else None
            start = -1
            if before is not None and before.role in between and number != turns[-1]:
                after = between[before.role]
                start = end_of(before.content.strip() + after, whole, position)
                if before.content != before.content.strip():
                    # A template may keep outer white space; then the stripped content only matches further on.
                    earlier = end_of(before.content + after, whole, position, start if start >= 0 else None)
                    start = earlier if earlier >= 0 else start
            if start < 0:
                start = self._turn_start(messages[:number], tools, whole)
                spent += start
                if spent > _MOST_PREFIX_CHARACTERS:
                    reason = f"the chat template would have to be rendered for each of {len(turns):,} turns"
                    raise TemplateRefusal(reason, "split the conversation into shorter ones")
            if before is not None and before.role != ASSISTANT and before.role not in between:
                content = before.content.strip()
                found = whole.rfind(content, position, start) if content else -1
                if found >= 0:
                    between[before.role] = whole[found + len(content) : start]
            starts.append(start)
            position = start
        return starts

    def _turn_start(self, before: Sequence[Message], tools: Sequence[Tool], whole: str) -> int:
        """The start of a turn in `whole`: the end of the generation prompt."""
        if not before:
            position = whole.find(self._header)
            if position < 0:
                raise TemplateRefusal(f"the chat template writes no {shown(self._header)} before an assistant message")
            return position + len(self._header)
        prompt = self._rendered(before, tools, prompting=True)
        if not whole.startswith(prompt):
            raise TemplateRefusal(changes(prompt, whole), SPLIT_HINT)
        return len(prompt)

    def _turn_end(
        self, messages: Sequence[Message], number: int, tools: Sequence[Tool], whole: str, start: int, limit: int
    ) -> int:
        """The end of a message's turn in `whole`: after its content, its tool calls and the end token, if there is one.

        Templates may change white space inside the content and add text around it.
        """
        message = messages[number]
        end = end_of_text(message.content, whole, start, limit)
        if end < 0:
            reason = f"{shown(message.content)} became {shown(whole[start:limit])}"
            raise TemplateRefusal(f"the chat template leaves out part of an assistant message: {reason}", SPLIT_HINT)
        called = start
        for name in call_names(message.more):
            called = end_of(name, whole, called, limit)
            if called < 0:
                raise TemplateRefusal(f"the chat template leaves out a call of the tool {shown(name)}", TEMPLATE_HINT)
        if self.end:
            position = whole.find(self.end, max(end, called), limit)
            if position < 0:
                raise TemplateRefusal(f"no end token {shown(self.end)} follows an assistant message")
            return position + len(self.end)
        if called == start:
            return end
        # Only the end of the text up to here marks the end of the last call.
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
        """The header between question and answer, and the text from the answer through the end token."""
        question, answer = Message("user", _QUESTION), Message(ASSISTANT, _ANSWER)
        try:
            without_prompt = self._rendered([question], (), prompting=False)
            prompt = self._rendered([question], (), prompting=True)
            text = self._rendered([question, answer], (), prompting=False)
        except TemplateRefusal as problem:
            raise UserError(f'{problem}; set data.chat_template to "plain" or to a file') from problem
        _, answered, tail = text.rpartition(_ANSWER)
        if not answered:
            raise UserError(
                'the chat template does not write assistant messages; set data.chat_template to "plain" or to a file'
            )
        header = prompt[num_shared(without_prompt, prompt) :]
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in tokens if token.special} | {str(self.tokenizer.eos_token)}
        found = [(tail.find(token), -len(token), token) for token in special if token and token in tail]
        if not found:
            return header, ""
        position, _, token = min(found)
        return header, tail[: position + len(token)]
