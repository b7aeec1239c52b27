"""A conversation with a language model, and which of its turns the model still sees. Apart from `chat`, which starts
without torch.

Earlier turns stay in the model's cache, so a turn costs only its own tokens. When the history exceeds the model's
positions, the oldest turns are dropped from the prompt, with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from loopos.cli.answers import json_lines
from loopos.config.diagnostics import UserError
from loopos.data.conversations import ASSISTANT, Message
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.completions import Completion
from loopos.generation.settings import SamplingParams
from loopos.generation.steps import Chain, chain_of

# An answer gets at least one of so many parts of the model's positions.
_ANSWER_FRACTION = 8


class Conversation:
    """`messages`: the whole history; the model no longer sees the first `forgotten` of them."""

    def __init__(self, reasoner: Reasoner, settings: SamplingParams, system: str | None) -> None:
        self.reasoner, self.settings, self.system = reasoner, settings, system
        self.messages: list[Message] = []
        self.forgotten = 0
        self.last: Chain | None = None

    def clear(self) -> None:
        """Starts over; the system message stays."""
        self.messages, self.forgotten, self.last = [], 0, None

    def answer(self, text: str, *, interrupted: Callable[[], bool], say: Callable[[str], None]) -> Iterator[str]:
        """The text of the answer as it is generated. Afterwards the history has both turns; of an interrupted answer
        what was generated. say: receives notes. Raises `UserError` for a text that leaves no room for an answer, and
        for messages that the template refuses; the history is then unchanged.
        """
        prompt = self._prompt(Message("user", text), say)
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
        if answer.strip():
            self.messages += [Message("user", text), Message(ASSISTANT, answer)]
        else:
            say("note: no answer; the turn is not kept")

    def _prompt(self, question: Message, say: Callable[[str], None]) -> list[int]:
        """The tokens of the history and the question, without the oldest turns where they leave no room."""
        positions = self.reasoner.engine.max_positions
        system = [Message("system", self.system)] if self.system else []
        forgotten = self.forgotten
        while True:
            prompt = self.reasoner.prompt([*system, *self.messages[forgotten:], question])
            room = (
                None
                if positions is None
                else positions - min(self.settings.max_new_tokens, positions // _ANSWER_FRACTION)
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
        """Appends the conversation to a JSON Lines file that training reads; returns the number of messages.

        Raises `UserError` where there is nothing to save, or the file cannot be written.
        """
        if not self.messages:
            raise UserError("nothing has been said yet")
        if file.suffix.lower() != ".jsonl":
            raise UserError(f"/save: got {file}; expected a name that ends in .jsonl: one conversation a line")
        system = [Message("system", self.system)] if self.system else []
        messages = [message.as_template() for message in (*system, *self.messages)]
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json_lines([{"messages": messages}]))
        except OSError as error:
            raise UserError(
                f"/save: {file}: cannot be written ({error.strerror}); expected a writable place"
            ) from error
        return len(messages)
