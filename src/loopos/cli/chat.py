"""`loopos chat`: a conversation with a language model on a terminal, or one line of standard input per turn.

Answers stream to standard output, notes to standard error; a line that starts with / is a command. Earlier turns stay
in the model's cache, so a turn costs only its own tokens. When the history exceeds the model's positions, the oldest
turns are dropped from the prompt, with a note.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopos.cli.answers import json_lines, say, write
from loopos.cli.options import (
    Device,
    LanguageModel,
    Precision,
    Subset,
    System,
    ToolParser,
    TrustRemoteCode,
    Verbose,
    device_diagnostics,
    refuse,
)
from loopos.cli.outcome import complain, note
from loopos.cli.process import prepare_to_compute
from loopos.cli.sampling_options import SamplingOptions
from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded
from loopos.config.variants import ENVIRONMENTS, TOOL_PARSERS

if TYPE_CHECKING:
    from loopos.cli.chat_tools import ChatTools
    from loopos.data.conversations import Message
    from loopos.evaluation.reasoning import Reasoner
    from loopos.generation.settings import SamplingParams
    from loopos.generation.steps import Chain

HELP = """\
/help         show these lines
/system TEXT  set the system message from the next turn on; without TEXT remove it
/temp X       set the temperature; 0: greedy decoding
/clear        clear the history
/save FILE    append the conversation to FILE.jsonl, as training reads it
/steps        show or hide the steps of an answer with their logprobs
/quit         end (also Ctrl-D); Ctrl-C interrupts an answer"""
_PROMPT = "> "
# An answer gets at least one of so many parts of the model's positions.
_ANSWER_FRACTION = 8
_SAMPLING = Subset(
    ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "stop", "seed"),
    # Answers of a chat at temperature 0 tend to repeat themselves.
    {"temperature": 0.7, "max_new_tokens": 512},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """The options of `loopos chat`."""

    system: System = None
    environment: Annotated[
        str | None,
        typer.Option("--environment", help='Environment whose tools the model may call: a name, or "module:Class".'),
    ] = None
    row: Annotated[
        str | None,
        typer.Option("--row", metavar="JSON", help="With --environment: the row that it starts from, as an object."),
    ] = None
    tool_parser: ToolParser = "auto"
    sampling: Annotated[SamplingOptions, _SAMPLING]
    device: Device = "auto"
    precision: Precision = "auto"
    trust_remote_code: TrustRemoteCode = False
    verbose: Verbose = False


def run(source: LanguageModel, options: ChatOptions) -> int:
    """Chats until the input ends. Raises `UserError` for invalid options and an unsuitable model."""
    from loopos.cli.opened_models import open_reasoner, require_language_model

    row, problems = _row(options)
    refuse([*options.sampling.diagnostics(), *device_diagnostics(options.device, options.precision), *problems])
    model = require_language_model(source)
    prepare_to_compute(verbose=options.verbose)
    for sentence in options.sampling.notes():
        note(sentence)
    reasoner = open_reasoner(
        model,
        device=options.device,
        precision=options.precision,
        max_rows=1,
        trust_remote_code=options.trust_remote_code,
    )
    tools = None
    if options.environment is not None:
        from loopos.cli.chat_tools import ChatTools
        from loopos.config.environments import EnvironmentSection

        section = EnvironmentSection(name=options.environment, tool_parser=options.tool_parser)
        tools = ChatTools(reasoner.template, section, row)
        note(tools.summary)
    session = ChatSession(Conversation(reasoner, options.sampling.settings(), options.system, tools))
    if sys.stdin.isatty():
        note("a line is a turn; /help lists the commands, Ctrl-D ends")
    with reasoner.engine.reuse_prefixes():
        session.open()
        for line in lines():
            if not session.take(line.strip()):
                break
    return 0


def _row(options: ChatOptions) -> tuple[dict[str, object] | None, list[str]]:
    """The row of the environment, and what is wrong with the options of tools."""
    if options.environment is None:
        used = [
            name
            for name, actual in (("--row", options.row), ("--tool-parser", options.tool_parser != "auto"))
            if actual
        ]
        return None, [f"{name} without --environment: there are no tools" for name in used]
    # Unknown names end the command before a model is loaded.
    ENVIRONMENTS[options.environment]
    if options.tool_parser != "auto":
        TOOL_PARSERS[options.tool_parser]
    if options.row is None:
        return None, []
    try:
        row = json.loads(options.row)
    except ValueError as problem:
        return None, [f"--row: {problem}; expected an object in JSON"]
    return (row, []) if isinstance(row, dict) else (None, [f"--row: got {options.row}; expected an object in JSON"])


def lines() -> Iterator[str]:
    """The lines of standard input; on a terminal with line editing, where Ctrl-C clears the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    if importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")
    while True:
        try:
            yield input(_PROMPT)
        except KeyboardInterrupt:
            note("\n(/quit or Ctrl-D ends the chat)")
        except EOFError:
            say()
            return


class Conversation:
    """`messages`: the whole history; the model no longer sees the first `forgotten` of them."""

    def __init__(
        self, reasoner: Reasoner, settings: SamplingParams, system: str | None, tools: ChatTools | None = None
    ) -> None:
        self.reasoner, self.settings, self.system, self.tools = reasoner, settings, system, tools
        self.messages: list[Message] = list(tools.opening) if tools is not None else []
        self.forgotten = 0
        self.last: Chain | None = None

    def clear(self) -> None:
        """Starts over, an environment too; the system message stays."""
        self.forgotten, self.last = 0, None
        if self.tools is not None:
            self.tools.begin()
        self.messages = list(self.tools.opening) if self.tools is not None else []

    def answer(self, text: str | None, *, interrupted: Callable[[], bool], say: Callable[[str], None]) -> Iterator[str]:
        """The text of the answer as it is generated, over turns of tools. Afterwards the history has all turns; of an
        interrupted answer what was generated. text: None answers the history. say: receives notes. Raises `UserError`
        for a text that leaves no room for an answer, and for messages that the template refuses; the history is then
        unchanged.
        """
        from loopos.data.conversations import ASSISTANT, Message

        new = [] if text is None else [Message("user", text)]
        for _ in range(self.tools.max_turns if self.tools is not None else 1):
            answer = ""
            for delta in self._generated(new, interrupted, say):
                answer += delta
                yield delta
            if not answer.strip():
                say("note: no answer; the turn is not kept")
                return
            called = [] if self.tools is None or interrupted() else self.tools.after(answer, self.messages)
            self.messages += [*new, *(called or [Message(ASSISTANT, answer)])]
            if not called:
                return
            new = []
            yield "\n" + "".join(f"[{line}]\n" for line in _shown_calls(called))
        say(f"note: stopped after {self.tools.max_turns if self.tools is not None else 1} turns of calls")

    def _generated(
        self, new: list[Message], interrupted: Callable[[], bool], say: Callable[[str], None]
    ) -> Iterator[str]:
        """The text of one turn of the model after the history and `new`, as it is generated."""
        from loopos.generation.completions import Completion
        from loopos.generation.steps import chain_of

        prompt = self._prompt(new, say)
        tokens, logprobs, answer, reason = [], [], "", None
        stream = self.reasoner.engine.stream([prompt], self.reasoner.sampling(self.settings))
        for delta in stream:
            tokens.append(delta.token)
            logprobs.append(delta.logprob)
            answer, reason = answer + delta.text, delta.finish_reason
            yield delta.text
            if interrupted():
                stream.close()  # type: ignore[attr-defined]
                break
        completion = Completion(0, 0, tokens, answer, logprobs, None, (), reason or "guide")
        self.last = chain_of(self.reasoner.tokenizer, completion, self.reasoner.step_format)
        if reason == "length":
            say(f"note: cut at {len(tokens)} tokens")

    def _prompt(self, new: list[Message], say: Callable[[str], None]) -> list[int]:
        """The tokens of the history and `new`, without the oldest turns where they leave no room."""
        positions = self.reasoner.engine.max_positions
        forgotten, turns = self.forgotten, 0
        encode = self.reasoner.prompt if self.tools is None else self.tools.prompt
        while True:
            prompt = encode([*self._system_message(), *self.messages[forgotten:], *new])
            room = (
                None
                if positions is None
                else positions - min(self.settings.max_new_tokens, positions // _ANSWER_FRACTION)
            )
            if room is None or len(prompt) <= room:
                break
            # A turn goes with its calls and their results.
            starts = [index for index, message in enumerate(self.messages) if message.role == "user"]
            after = [index for index in starts if index > forgotten] + ([len(self.messages)] if new else [])
            if forgotten >= len(self.messages) or not after:
                raise UserError(
                    f"{len(prompt)} tokens: the model has {positions} positions and its answer needs some of them; "
                    "send a shorter message"
                )
            forgotten, turns = after[0], turns + 1
        if turns:
            say(
                f"note: the history is longer than the model's {positions} positions: the oldest "
                f"{turns} turn{'s' if turns > 1 else ''} left out from here on"
            )
            self.forgotten = forgotten
        return prompt

    def _system_message(self) -> list[Message]:
        from loopos.data.conversations import Message

        return [Message("system", self.system)] if self.system else []

    def save(self, file: Path) -> int:
        """Appends the conversation to a JSON Lines file that training reads; returns the number of messages.

        Raises `UserError` where there is nothing to save, or the file cannot be written.
        """
        if not self.messages:
            raise UserError("the conversation is empty")
        if file.suffix.lower() != ".jsonl":
            raise UserError(f"/save: got {file}; expected a name that ends in .jsonl: one conversation a line")
        messages = [message.as_template() for message in (*self._system_message(), *self.messages)]
        tools = {} if self.tools is None else {"tools": list(self.tools.schemas)}
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json_lines([{"messages": messages, **tools}]))
        except OSError as error:
            raise UserError(
                f"/save: {file}: cannot be written ({error.strerror}); expected a file that can be written"
            ) from error
        return len(messages)


def _shown_calls(messages: list[Message]) -> list[str]:
    from loopos.cli.chat_tools import calls_and_results

    return calls_and_results(messages)


class ChatSession:
    """Handles lines: turns and commands."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.shows_steps = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP),
            "/system": self._system,
            "/temp": self._temperature,
            "/clear": self._clear,
            "/save": self._save,
            "/steps": self._steps,
        }

    def open(self) -> None:
        """Lets the model answer what an environment begins with."""
        for message in self.conversation.messages:
            say(f"{message.role}: {message.content}")
        if self.conversation.messages:
            self._turn(None)

    def take(self, line: str) -> bool:
        """Handles one line; False if it ends the chat. A mistake is reported and the chat continues."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        try:
            if name in self._commands:
                self._commands[name](rest.strip())
            elif name.startswith("/"):
                raise UserError(f"{name}: unknown command; /help lists the commands")
            elif line:
                return self._turn(line)
        except UserError as error:
            complain(str(error))
        return True

    def _turn(self, text: str | None) -> bool:
        from loopos.cli.trace import described
        from loopos.training.stopping import StopSignals

        conversation = self.conversation
        written, below = 0, list[str]()

        def add_note(sentence: str) -> None:
            # A note gets its own line, also where both streams go into one pipe.
            below.append(sentence) if written else note(sentence)

        with StopSignals() as signals:
            for text_delta in conversation.answer(text, interrupted=lambda: signals.received is not None, say=add_note):
                write(text_delta)
                written += len(text_delta)
        say()
        for sentence in below:
            note(sentence)
        if signals.received == "SIGINT":
            note("(interrupted; the history keeps the partial answer)")
        if self.shows_steps and conversation.last is not None:
            say(described(conversation.last, conversation.reasoner.step_format))
        return signals.received != "SIGTERM"

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        note(f"system: {text or 'nothing'}")

    def _temperature(self, text: str) -> None:
        try:
            chosen = float(text)
        except ValueError:
            raise UserError(f"/temp: got {text or 'nothing'}; expected a number, 0 or more") from None
        self.conversation.settings = replace(self.conversation.settings, temperature=chosen)
        note(f"temperature: {chosen:g}")

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        note("history cleared")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save: no file; expected /save FILE.jsonl")
        number = self.conversation.save(Path(expanded(text)))
        note(f"{text}: {number} messages added")

    def _steps(self, _: str) -> None:
        self.shows_steps = not self.shows_steps
        note(f"steps: {'shown' if self.shows_steps else 'not shown'}")
