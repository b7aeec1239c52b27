"""A conversation with a language model: what was said, and what of it the model still sees.

Enters: words of the user. Leaves: pieces of answers, and the messages. What is said before stays in the model's cache,
so that a turn costs its own tokens alone. Where the history is longer than the model has positions for, the oldest
turns are left out of what it sees, and said to be. Left out: the terminal (`chat`).

`loopos chat`: a conversation with a language model on the terminal, or a line of standard input a turn.

Enters: a model and lines. Leaves: answers on standard output as they come, notes on standard error. A line that begins
with / is a command. Left out: the conversation itself (`conversation`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from loopos.cli.answers import json_lines, say, write
from loopos.cli.opened_models import open_reasoner, require_language_model
from loopos.cli.outcome import complain, note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.sampling_options import SamplingOptions, place_diagnostics, refuse
from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded
from loopos.data.conversations import ASSISTANT, Message
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.completions import Completion
from loopos.generation.settings import SamplingSettings
from loopos.generation.steps import Chain, chain_of

# The least room for an answer, as a share of the model's positions.
_ANSWER_SHARE = 8


class Conversation:
    """`messages`: all that was said; the first `forgotten` of them the model does not see any more."""

    def __init__(self, reasoner: Reasoner, settings: SamplingSettings, system: str | None) -> None:
        self.reasoner, self.settings, self.system = reasoner, settings, system
        self.messages: list[Message] = []
        self.forgotten = 0
        self.last: Chain | None = None

    def clear(self) -> None:
        """Begins anew; the system's words stay."""
        self.messages, self.forgotten, self.last = [], 0, None

    def answer(self, text: str, *, interrupted: Callable[[], bool], say: Callable[[str], None]) -> Iterator[str]:
        """The pieces of the answer to the user's words. When all are taken, both are part of the history; an answer
        that was interrupted as far as it came. say: takes notes. Raises `UserError` for words that leave the model no
        room, and messages that its template refuses; the history is then as before.
        """
        prompt = self._prompt(Message("user", text), say)
        tokens, logprobs, told, reason = [], [], "", None
        stream = self.reasoner.engine.stream([prompt], self.reasoner.sampling(self.settings))
        for piece in stream:
            tokens.append(piece.token)
            logprobs.append(piece.logprob)
            told, reason = told + piece.text, piece.finish_reason
            yield piece.text
            if interrupted():
                stream.close()  # type: ignore[attr-defined]
                break
        completion = Completion(0, 0, tokens, told, logprobs, None, (), reason or "guide")
        self.last = chain_of(self.reasoner.tokenizer, completion, self.reasoner.step_format)
        if reason == "length":
            say(f"note: cut at {len(tokens)} tokens")
        if told.strip():
            self.messages += [Message("user", text), Message(ASSISTANT, told)]
        else:
            say("note: no answer; the turn is not kept")

    def _prompt(self, asked: Message, say: Callable[[str], None]) -> list[int]:
        """The tokens of the history and the question, without the oldest turns where they leave no room."""
        positions = self.reasoner.engine.max_positions
        system = [Message("system", self.system)] if self.system else []
        forgotten = self.forgotten
        while True:
            prompt = self.reasoner.prompt([*system, *self.messages[forgotten:], asked])
            room = (
                None if positions is None else positions - min(self.settings.max_new_tokens, positions // _ANSWER_SHARE)
            )
            if room is None or len(prompt) <= room:
                break
            if forgotten >= len(self.messages):
                raise UserError(
                    f"{len(prompt)} tokens: the model has {positions} positions and its answer needs some of them; "
                    "say it in fewer words"
                )
            forgotten += 2
        if forgotten > self.forgotten:
            turns = (forgotten - self.forgotten) // 2
            say(
                f"note: the history is longer than the model's {positions} positions: the oldest "
                f"{turns} turn{'s' if turns > 1 else ''} left out from here on"
            )
            self.forgotten = forgotten
        return prompt

    def save(self, file: Path) -> int:
        """Adds the conversation to a file of JSON Lines, which training reads; returns the number of its messages.

        Raises `UserError` where there is nothing to save, or the file cannot be written.
        """
        if not self.messages:
            raise UserError("nothing has been said yet")
        if file.suffix.lower() != ".jsonl":
            raise UserError(f"/save: got {file}; expected a name that ends in .jsonl: one conversation a line")
        system = [Message("system", self.system)] if self.system else []
        told = [message.as_template() for message in (*system, *self.messages)]
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json_lines([{"messages": told}]))
        except OSError as error:
            raise UserError(
                f"/save: {file}: cannot be written ({error.strerror}); expected a writable place"
            ) from error
        return len(told)


HELP = """\
/help         these lines
/system TEXT  what the model is told first, from the next turn on; without TEXT nothing
/temp X       temperature; 0 takes the likeliest token
/clear        forget what was said
/save FILE    add the conversation to FILE.jsonl, as training reads it
/steps        show the steps of an answer with their logprobs, or no longer
/quit         end (Ctrl-D too); Ctrl-C ends an answer"""
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
    """Talks until the end of the input. Raises `UserError` for options and a model that will not do."""
    refuse([*options.sampling.diagnostics(), *place_diagnostics(options.device, options.precision)])
    require_language_model(source)
    restart_with_settings()
    for sentence in options.sampling.notes():
        note(sentence)
    hush_libraries(verbose=options.verbose)
    reasoner = open_reasoner(
        source,
        device=options.device,
        precision=options.precision,
        max_rows=1,
        trust_remote_code=options.trust_remote_code,
    )

    talk = Talk(Conversation(reasoner, options.sampling.settings(), options.system))
    if sys.stdin.isatty():
        note("a line is a turn; /help lists the commands, Ctrl-D ends")
    with reasoner.engine.reuse_prefixes():
        for line in lines():
            if not talk.take(line.strip()):
                break
    return 0


def lines() -> Iterator[str]:
    """The lines of standard input; on a terminal with editing, and with Ctrl-C clearing the line."""
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
    """Takes one line after another: turns and commands."""

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
        """Does what a line wants; False where it ends the chat. A mistake is said, and the chat goes on."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        try:
            if name in self._commands:
                self._commands[name](rest.strip())
            elif name.startswith("/"):
                raise UserError(f"{name}: no such command; /help lists them")
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

        def tell(sentence: str) -> None:
            # A note stands on a line of its own, also where both streams go into one pipe.
            below.append(sentence) if written else note(sentence)

        with StopSignals() as signals:
            for piece in talk.answer(text, interrupted=lambda: signals.received is not None, say=tell):
                write(piece)
                written += len(piece)
        say()
        for sentence in below:
            note(sentence)
        if signals.received == "SIGINT":
            note("(interrupted; what was said is kept)")
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
        note("forgotten")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save: no file; expected /save FILE.jsonl")
        number = self.conversation.save(Path(expanded(text)))
        note(f"{text}: {number} messages added")

    def _steps(self, _: str) -> None:
        self.shows_steps = not self.shows_steps
        note(f"steps: {'shown' if self.shows_steps else 'not shown'}")
