"""Turns of tools under one chat template: which parser reads its calls, and the tokens that answer them.

In a conversation with tools, tokens are only appended: the prompt, what the model wrote, the suffix that the template
writes for the tools' results and the next turn, what the model wrote next. Nothing is rendered again. The suffix is the
text after a turn's end in a rendering of a small conversation with these results, tokenized by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from loopos.config.diagnostics import UserError
from loopos.config.variants import TOOL_PARSERS
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.record import shown
from loopos.data.spelled_tokens import SpelledTokens
from loopos.data.template_checks import TemplateRefusal, changes
from loopos.data.templates import ChatTemplate, Segment
from loopos.data.tool_calls import Scan, ToolCall, parse_turn
from loopos.data.tool_schemas import CALLS, Tool, call_id

_QUESTION = Message("user", "How many kestrels are at 41?")
_CALL = ToolCall("kestrel_count", {"place": "41"})
_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": _CALL.name,
        "description": "Counts kestrels.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "Where."}},
            "required": ["place"],
        },
    },
}
_RESULT, _REASONING = "73 kestrels", "<think>\nThe tool counts them.\n</think>\n\n"
_HINT = "name a file with a template that writes tools in data.chat_template, or choose a model whose template does"


def calling(calls: Sequence[ToolCall], content: str = "", *, first: int = 0) -> Message:
    """An assistant's message with calls. first: the number of its first call in the conversation."""
    return Message(
        ASSISTANT, content, more={CALLS: [call.as_message(call_id(first + n)) for n, call in enumerate(calls)]}
    )


def result_message(name: str, text: str, identity: str) -> Message:
    """What a tool answered to the call `identity`."""
    return Message("tool", text, more={"name": name, "tool_call_id": identity})


class ToolTurns:
    """The tools of a conversation under a template. `parser`: the name of the parser; `scan`: its function."""

    def __init__(self, template: ChatTemplate, tools: Sequence[Tool] = (_TOOL,), *, parser: str = "auto") -> None:
        """parser: its name, or "auto": the one that reads the call that the template writes. Raises `UserError` for a
        template without tools, for calls that no parser reads, and for an unknown parser.
        """
        self.template, self.tools = template, tuple(tools)
        self._spelled = SpelledTokens(template)
        self.parser = self._parser_of_template() if parser == "auto" else parser
        self.scan: Scan = TOOL_PARSERS[self.parser].load()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the first turn starts from. Raises `TemplateRefusal`."""
        return self._spelled.prompt(messages, self.tools)

    def suffix(self, results: Sequence[tuple[str, str]]) -> list[int]:
        """The ids after a turn of calls: what the tools answered, by (name, text), and the start of the next turn.
        Control tokens that a tool's text spells are encoded as text. Raises `TemplateRefusal`.
        """
        texts, spelled = self._spelled.hidden([text for _, text in results])
        try:
            text = self._suffix([(name, text) for (name, _), text in zip(results, texts, strict=True)], len(results))
        except TemplateRefusal:
            if len(results) == 1:
                raise
            # Llama 3's template refuses several calls in one turn, but writes several results.
            text = self._suffix([(name, text) for (name, _), text in zip(results, texts, strict=True)], 1)
        # Not the first segment, which some tokenizers would begin with a blank.
        return self._spelled.encode([Segment(""), Segment(text)], spelled)

    def check_prefix(self) -> None:
        """Raises `UserError` if the template changes earlier text when results and turns follow, or the tokenizer joins
        a turn's end with what follows: the tokens of a conversation would then not be those of its rendering.
        """
        refusal: TemplateRefusal | None = None
        # Templates for reasoning may add an empty block to the last turn only, unless the turn has one.
        for content in ("", _REASONING):
            try:
                self._check_text(content)
            except TemplateRefusal as problem:
                refusal = refusal or problem
            else:
                self._check_tokens()
                return
        assert refusal is not None
        raise self._refused(f"{refusal}; a conversation with tools needs one that only appends") from refusal

    def _check_text(self, content: str) -> None:
        messages, known = [_QUESTION], self.template.text([_QUESTION], (_TOOL,), prompting=True)
        for number in range(2):
            messages.append(calling([_CALL], content, first=number))
            whole = self.template.text(messages, (_TOOL,))
            known = self._extended(known, whole[: self._turn_end(messages, (_TOOL,))])
            messages.append(result_message(_CALL.name, _RESULT, call_id(number)))
            known = self._extended(known, self.template.text(messages, (_TOOL,), prompting=True))
        messages.append(Message(ASSISTANT, f"{content}There are 73."))
        self._extended(known, self.template.text(messages, (_TOOL,)))

    def _extended(self, known: str, text: str) -> str:
        if not text.startswith(known):
            raise TemplateRefusal(changes(known, text))
        return text

    def _check_tokens(self) -> None:
        suffix = self._suffix([(_CALL.name, _RESULT)], 1)
        tokenizer = self.template.tokenizer
        end = self.template.end or str(tokenizer.eos_token)
        whole, own = ([*self._spelled.encode([Segment(""), Segment(text)], [])] for text in (end + suffix, end))
        if whole != [*own, *self._spelled.encode([Segment(""), Segment(suffix)], [])]:
            raise self._refused(
                f"the tokenizer joins the end of a turn {shown(end)} with the text after it; expected an end that is a "
                "special token"
            )

    def _suffix(self, results: Sequence[tuple[str, str]], num_calls: int) -> str:
        calls = [ToolCall(name, _CALL.arguments) for name, _ in results[:num_calls]]
        identities = [call_id(min(number, num_calls - 1)) for number in range(len(results))]
        answered = [result_message(*result, identity) for result, identity in zip(results, identities, strict=True)]
        messages = [_QUESTION, calling(calls), *answered]
        whole = self.template.text(messages, self.tools, prompting=True)
        return whole[self._turn_end(messages, self.tools) :]

    def _turn_end(self, messages: Sequence[Message], tools: Sequence[Tool]) -> int:
        """The end of the last assistant's turn in the rendered messages."""
        last = max(number for number, message in enumerate(messages) if message.role == ASSISTANT)
        position = end = 0
        for segment in self.template.segments(messages, tools):
            position += len(segment.text)
            end = position if segment.message == last else end
        return end

    def _parser_of_template(self) -> str:
        messages = [_QUESTION, calling([_CALL])]
        if not self.template.writes_tools:
            raise self._refused("it does not write tools")
        try:
            segments = self.template.segments(messages, (_TOOL,))
        except TemplateRefusal as problem:
            raise self._refused(str(problem)) from problem
        turn = next(segment.text for segment in segments if segment.message == 1).removesuffix(self.template.end)
        for name in TOOL_PARSERS:
            found = parse_turn(TOOL_PARSERS[name].load(), turn)
            # Besides the call there may be an empty block of reasoning.
            if found.calls == [_CALL] and _CALL.name not in found.content:
                return name
        raise self._refused(
            f"none of the parsers {', '.join(TOOL_PARSERS)} reads its calls, such as {shown(turn)}; name one of "
            "`loopos list tool-parsers`, or register your own"
        )

    def _refused(self, reason: str) -> UserError:
        return UserError(f"{self.template.summary}: {reason}; {_HINT}")
