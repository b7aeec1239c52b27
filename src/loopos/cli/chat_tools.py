"""The tools of an environment in `loopos chat`: what they are, and a turn's calls → messages with their results.

Apart from `chat`, which starts without torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from loopos.config.diagnostics import UserError
from loopos.config.environments import EnvironmentSection
from loopos.data.conversations import Message
from loopos.data.record import shown
from loopos.data.template_checks import TemplateRefusal
from loopos.data.templates import ChatTemplate
from loopos.data.tool_calls import parse_turn
from loopos.data.tool_schemas import CALLS, Tool, call_id
from loopos.data.tool_turns import ToolTurns, calling, result_message
from loopos.rl.environments import EnvironmentClass
from loopos.rl.tool_runs import CallLimits, ThreadInstance, run_calls


class ChatTools:
    """An environment that a chat's model acts in. `opening`: the messages that its reset wrote, without a row none."""

    def __init__(self, template: ChatTemplate, section: EnvironmentSection, row: dict[str, object] | None) -> None:
        """Raises `UserError` for a class that is no environment, one without tools, and a template that writes none."""
        self._environment, self._section, self._row = EnvironmentClass(section.name), section, row
        if not self._environment.tools:
            raise UserError(f"--environment {section.name}: has no tools")
        self._turns = ToolTurns(template, self._environment.schemas, parser=section.tool_parser)
        self.opening: list[Message] = []
        self.begin()

    @property
    def schemas(self) -> tuple[Tool, ...]:
        """The tools as chat templates take them."""
        return self._environment.schemas

    @property
    def summary(self) -> str:
        """The tools and the parser of their calls, in a line."""
        return f"tools: {', '.join(self._environment.tools)}; calls are read by the parser {self._turns.parser}"

    @property
    def max_turns(self) -> int:
        """How many turns of calls may answer one message."""
        return self._section.max_turns

    def begin(self) -> None:
        """Starts the environment anew."""
        if self._row is None:
            state = self._environment.type()
        else:
            state, self.opening = self._environment.begin(self._row, "--row")
        self._instance = ThreadInstance(self._environment, state)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the next turn starts from. Raises `UserError`."""
        try:
            return self._turns.prompt(messages)
        except TemplateRefusal as refusal:
            raise UserError(f"{refusal}; {refusal.hint}" if refusal.hint else str(refusal)) from refusal

    def after(self, text: str, messages: Sequence[Message]) -> list[Message]:
        """The turn that a model wrote and the results of its calls, as messages; none for a turn without calls."""
        found = parse_turn(self._turns.scan, text)
        if not (found.calls or found.malformed):
            return []
        number = sum(message.role == "tool" for message in messages)
        limits = CallLimits(self._section.tool_seconds, self._section.max_result_characters)
        outcomes = run_calls(self._environment, self._instance, found.calls, found.malformed, limits)
        turn = calling(found.calls, found.content, first=number) if found.calls else Message("assistant", text)
        return [turn, *(result_message(each.name, each.text, call_id(number + n)) for n, each in enumerate(outcomes))]


def calls_and_results(messages: Sequence[Message]) -> list[str]:
    """A line for each call of a turn, with its result, for the terminal."""
    calls = messages[0].more.get(CALLS)
    names = [
        f"{call['function']['name']}({json.dumps(call['function']['arguments'], ensure_ascii=False)})"
        for call in (calls if isinstance(calls, list) else [])
    ]
    results = [shown(message.content) for message in messages[1:]]
    return [
        f"{name} -> {result}"
        for name, result in zip([*names, *["(a malformed call)"] * len(results)], results, strict=False)
    ]
