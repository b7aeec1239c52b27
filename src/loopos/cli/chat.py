"""`loopos chat`: a conversation with a language model on a terminal, or one line of standard input per turn.

Answers stream to standard output, notes to standard error; a line that starts with / is a command. Earlier turns stay
in the model's cache, so a turn costs only its own tokens. When the history exceeds the model's positions, the oldest
turns are dropped from the prompt, with a note.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loopos.cli.answers import say, write
from loopos.cli.opened_models import open_reasoner, require_language_model
from loopos.cli.outcome import complain, note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.sampling_options import SamplingOptions, place_diagnostics, refuse
from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded

if TYPE_CHECKING:
    from loopos.cli.conversation import Conversation

HELP = """\
/help         show these lines
/system TEXT  set the system message from the next turn on; without TEXT remove it
/temp X       set the temperature; 0: greedy decoding
/clear        clear the history
/save FILE    append the conversation to FILE.jsonl, as training reads it
/steps        show or hide the steps of an answer with their logprobs
/quit         end (also Ctrl-D); Ctrl-C interrupts an answer"""
_PROMPT = "> "


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """The options of `loopos chat`."""

    system: str | None = None
    device: str = "auto"
    precision: str = "auto"
    trust_remote_code: bool = False
    verbose: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


def run(source: str, options: ChatOptions) -> int:
    """Chats until the input ends. Raises `UserError` for invalid options and an unsuitable model."""
    refuse([*options.sampling.diagnostics(), *place_diagnostics(options.device, options.precision)])
    model = require_language_model(source)
    restart_with_settings()
    for sentence in options.sampling.notes():
        note(sentence)
    hush_libraries(verbose=options.verbose)
    reasoner = open_reasoner(
        model,
        device=options.device,
        precision=options.precision,
        max_rows=1,
        trust_remote_code=options.trust_remote_code,
    )

    from loopos.cli.conversation import Conversation

    talk = Talk(Conversation(reasoner, options.sampling.settings(), options.system))
    if sys.stdin.isatty():
        note("a line is a turn; /help lists the commands, Ctrl-D ends")
    with reasoner.engine.reuse_prefixes():
        for line in lines():
            if not talk.take(line.strip()):
                break
    return 0


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


class Talk:
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

    def _turn(self, text: str) -> bool:
        from loopos.cli.trace import described
        from loopos.training.stopping import StopSignals

        talk = self.conversation
        written, below = 0, list[str]()

        def add_note(sentence: str) -> None:
            # A note gets its own line, also where both streams go into one pipe.
            below.append(sentence) if written else note(sentence)

        with StopSignals() as signals:
            for text_delta in talk.answer(text, interrupted=lambda: signals.received is not None, say=add_note):
                write(text_delta)
                written += len(text_delta)
        say()
        for sentence in below:
            note(sentence)
        if signals.received == "SIGINT":
            note("(interrupted; the history keeps the partial answer)")
        if self.shows_steps and talk.last is not None:
            say(described(talk.last, talk.reasoner.step_format))
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
