"""A conversation with a language model: what was said, and what of it the model still sees.

Enters: words of the user. Leaves: pieces of answers, and the messages. What is said before stays in the model's cache,
so that a turn costs its own tokens alone. Where the history is longer than the model has positions for, the oldest
turns are left out of what it sees, and said to be. Left out: the terminal (`chat`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from loopos.cli.answers import json_lines
from loopos.config.diagnostics import UserError
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
