"""The step format: steps and an answer as text, and back.

    opening · step₁ · delimiter · … · stepₙ · delimiter · closing · answer_marker · answer

Three formats have names: "think" (one step a line inside `<think>` … `</think>`, then the answer), "hashes" (one step a
line, then `#### answer`, as in GSM8K) and "lines" (one step a line; the last line is the answer).

Nothing is escaped, because a model learns the exact text of the data. What could not be parsed back exactly is refused
(`problem` gives the reason): a step that is blank, contains the delimiter or the closing tag, or begins like the
answer; an answer that is blank, has white space around it, or has several lines where the format has one. So
parse(render(steps, answer)) returns the same steps and answer. Text that a model writes after its answer (an
explanation, the marker again, the next question) is not part of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loopos.config.sections import StepFormatSection
from loopos.data.record import shown

# A line that begins another exchange: models that do not stop go on with the next question of their training texts.
_NEXT_EXCHANGE = re.compile(
    r"^[ \t>*]*(?:#+[ \t]*)?(?:question|problem|exercise|q)\s*\d*\s*\**[:.)]"
    r"|^[ \t]*#+[ \t]*(?:user|human|instruction)\b"
    r"|(?<=\n\n)\**(?:user|human)\**:",
    re.IGNORECASE | re.MULTILINE,
)
_TURN_MARK = r"<\|(?:im_start|start_header_id|start|user|system|assistant)\|>|<start_of_turn>|\[INST\]"


class Parsed(NamedTuple):
    """What a text holds. `well_formed`: every part was where the format wants it, the answer is not blank, and nothing
    stands behind it. Where it was not, `steps` and `answer` are the best reading: without the closing tag there is no
    answer inside the reasoning; without the marker the last line is the answer; of several markers the first counts.
    """

    steps: tuple[str, ...]
    answer: str
    well_formed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFormat:
    r"""The four strings around steps and answer. `delimiter` ends each step and is never empty. With an empty
    `closing` the steps end at the first that begins with `answer_marker`, and the answer is the rest of that line; with
    both empty, the last step is the answer. Behind a `closing` an answer may have several lines.
    """

    opening: str = "<think>\n"
    closing: str = "</think>\n"
    delimiter: str = "\n"
    answer_marker: str = ""

    def __post_init__(self) -> None:
        assert self.delimiter, "steps need a delimiter"

    def render(self, steps: Sequence[str], answer: str) -> str:
        """The text of a chain. Raises `ValueError` with the reason where `problem` has one."""
        reason = self.problem(steps, answer)
        if reason is not None:
            raise ValueError(reason)
        return self._written(steps, answer)

    def problem(self, steps: Sequence[str], answer: str) -> str | None:
        """Why these steps and this answer cannot be written so that they are read back exactly; None if they can."""
        for number, step in enumerate(steps, start=1):
            reason = self._step_problem(step)
            if reason is not None:
                return f"step {number} {reason}"
        if not answer.strip():
            return "the answer is blank"
        if answer != answer.strip():
            return f"the answer {shown(answer)} has white space around it"
        if not self.closing.strip():
            if not self.answer_marker.strip() and self.delimiter in answer:
                return f"the answer {shown(answer)} holds the delimiter {shown(self.delimiter)}"
            if self.answer_marker.strip() and "\n" in answer:
                marker = shown(self.answer_marker)
                return f"the answer {shown(answer)} contains a line break; after {marker} only one line is read"
        read = self.parse(self._written(steps, answer))
        if read != (tuple(steps), answer, True):
            return f"it would be read back as the steps {shown(list(read.steps))} and the answer {shown(read.answer)}"
        return None

    def parse(self, text: str) -> Parsed:
        """What `text` holds; any text has a reading.

        A missing `opening` is allowed if `closing` is there: some templates write it into the prompt.
        """
        closing = self.closing.strip()
        if not closing:
            return self._parse_lines(text)
        body, found, rest = text.partition(closing)
        opened = self._opened(body)
        if not found:
            if opened is not None:
                return Parsed(self._steps(opened), "", False)
            return Parsed((), self._cut(self._after_marker(text))[0], False)
        steps, rest = self._steps(body if opened is None else opened), rest.strip()
        marked = rest.startswith(self.answer_marker.strip())
        answer, is_whole = self._cut(self._after_marker(rest))
        return Parsed(steps, answer, marked and is_whole and bool(answer))

    def answer_start(self, text: str) -> int:
        """Where the part of `text` begins that gives the answer (its marker included); 0 where all of it does."""
        closing = self.closing.strip()
        if closing:
            position = text.find(closing)
            rest = text[position + len(closing) :]
            return 0 if position < 0 else len(text) - len(rest.lstrip())
        position = self._marked_line(text) if self.answer_marker.strip() else text.rstrip().rfind(self.delimiter)
        if position < 0:
            return 0
        return position if self.answer_marker.strip() else position + len(self.delimiter)

    def _written(self, steps: Sequence[str], answer: str) -> str:
        chain = "".join(step + self.delimiter for step in steps)
        return f"{self.opening}{chain}{self.closing}{self.answer_marker}{answer}"

    def _step_problem(self, step: str) -> str | None:
        closing, marker = self.closing.strip(), self.answer_marker.strip()
        if not step.strip():
            return "is blank"
        if self.delimiter in step:
            return f"holds the delimiter {shown(self.delimiter)}: {shown(step)}"
        if closing and closing in step:
            return f"holds the closing {shown(closing)}: {shown(step)}"
        if not closing and marker and step.lstrip().startswith(marker):
            return f"begins with the answer marker {shown(marker)}: {shown(step)}"
        return None

    def _opened(self, body: str) -> str | None:
        """`body` behind the opening, or None where there is no opening."""
        if body.startswith(self.opening):
            return body[len(self.opening) :]
        opening = self.opening.strip()
        bare = body.lstrip()
        return bare[len(opening) :] if bare.startswith(opening) else None

    def _steps(self, body: str) -> tuple[str, ...]:
        return tuple(step for step in body.split(self.delimiter) if step.strip())

    def _parse_lines(self, text: str) -> Parsed:
        """Formats without a closing: the answer is the rest of the marked line, or the last line."""
        opened = self._opened(text)
        body = text if opened is None else opened
        marker = self.answer_marker.strip()
        position = self._marked_line(body) if marker else -1
        if position >= 0:
            line, behind = _first_line(body[position:].lstrip()[len(marker) :])
            answer, is_whole = self._cut(line)
            is_whole = is_whole and opened is not None and not behind
            return Parsed(self._steps(body[:position]), answer, is_whole and bool(answer))
        if marker and marker in body:
            before, _, after = body.partition(marker)
            return Parsed(self._steps(before), self._cut(_first_line(after)[0])[0], False)
        next_exchange = _NEXT_EXCHANGE.search(body, body.find("\n\n") + 1 or len(body))
        nonblank = body if next_exchange is None else body[: next_exchange.start()]
        *steps, answer = self._steps(nonblank) or ("",)
        is_whole = next_exchange is None and not marker and opened is not None
        return Parsed(tuple(steps), answer.strip(), is_whole and bool(answer.strip()))

    def _marked_line(self, text: str) -> int:
        """Where the first step-like piece begins that starts with the answer marker; -1 where there is none."""
        position = 0
        for part in text.split(self.delimiter):
            if part.lstrip().startswith(self.answer_marker.strip()):
                return position
            position += len(part) + len(self.delimiter)
        return -1

    def _after_marker(self, text: str) -> str:
        """What stands behind the first marker; the whole text where there is none."""
        marker = self.answer_marker.strip()
        return text.partition(marker)[2] if marker and marker in text else text

    def _cut(self, text: str) -> tuple[str, bool]:
        """The answer at the beginning of `text`, and whether it is all of it: it ends where the marks of the format
        come again, or another exchange begins.
        """
        answer = text.strip()
        marks = [_TURN_MARK, *(re.escape(mark) for mark in (self.opening.strip(), self.closing.strip()) if mark)]
        if marker := self.answer_marker.strip():
            # Within a sentence it may be a word of the answer.
            marks.append(rf"(?:^|(?<=[.!?…] )|(?<=[.!?…])){re.escape(marker)}")
        positions = [found.start() for mark in marks if (found := re.search(mark, answer, re.MULTILINE)) is not None]
        first_end = answer.find("\n")
        next_exchange = _NEXT_EXCHANGE.search(answer, first_end + 1) if first_end >= 0 else None
        if next_exchange is not None:
            positions.append(next_exchange.start())
        if not positions:
            return answer, True
        position = min(positions)
        line = answer.rfind("\n", 0, position) + 1
        return (answer[:line].strip() or answer[:position].strip()), False


def _first_line(text: str) -> tuple[str, str]:
    """The first line of a text that is not blank, and what stands behind it."""
    line, _, behind = text.strip().partition("\n")
    return line.strip(), behind.strip()


NAMED_FORMATS: Mapping[str, StepFormat] = {
    "think": StepFormat(),
    "hashes": StepFormat(opening="", closing="", answer_marker="#### "),
    "lines": StepFormat(opening="", closing=""),
}
"""The formats that a config names with one word."""


def readings_of_answer(text: str) -> tuple[str, ...]:
    """What a text in any of the named formats may give as its answer: what stands behind `</think>`; behind `####`, or
    its last line; without either the whole text, or its last line. A text that only opens `<think>` gives none.
    """
    think, hashes = NAMED_FORMATS["think"], NAMED_FORMATS["hashes"]
    if think.closing.strip() in text or text.lstrip().startswith(think.opening.strip()):
        found = think.parse(text).answer
        marked = hashes.answer_marker.strip() in found
        return (hashes.parse(found).answer if marked else found,)
    last = text.strip().rpartition("\n")[2]
    if hashes.answer_marker.strip() in text:
        # A heading of Markdown begins so too.
        return hashes.parse(text).answer, last
    return (text, last) if "\n" in text.strip() else (text,)


def chosen_format(section: str | StepFormatSection) -> StepFormat:
    """The format of a config: one of the names, or its four strings."""
    if isinstance(section, str):
        return NAMED_FORMATS[section]
    return StepFormat(
        opening=section.opening,
        closing=section.closing,
        delimiter=section.delimiter,
        answer_marker=section.answer_marker,
    )
