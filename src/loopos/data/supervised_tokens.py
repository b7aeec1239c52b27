"""Tokenize examples for language models and mark which tokens are trained. Nothing else does this.

Each segment of an example (context, reasoning, answer) is tokenized by itself, so that no token crosses a border and
the prompt ids equal those that generation starts from:

    prompt_tokens(example) + generated ids = ids of the row

The end token is always trained; the begin token is never duplicated; there are no pads. The report states read = used +
dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.sft import SftDataSection
from loopos.data.conversations import ASSISTANT, Conversation, Message, Question
from loopos.data.demonstrations import Demonstration
from loopos.data.piece_tokens import SegmentTokenizer
from loopos.data.reading import DataReport
from loopos.data.record import SKIP_ROWS, BadRows
from loopos.data.rows import Row
from loopos.data.step_format import StepFormat
from loopos.data.supervised_rows import Completion, Example, PlainText
from loopos.data.template_checks import check_reasoning
from loopos.data.templates import ChatTemplate, Segment, TemplateRefusal
from loopos.data.tokens import Encoded
from loopos.data.tool_schemas import Tool

TrainOn: TypeAlias = Literal["all", "assistant", "answer"]


@dataclass(frozen=True, slots=True)
class Part:
    """A segment with the weight of its tokens in the loss; 0 = context."""

    segment: Segment
    weight: float


def prompt_messages(example: Demonstration) -> list[Message]:
    """The messages before the chain of a demonstration."""
    system = [Message("system", example.system)] if example.system is not None else []
    return [*system, Message("user", example.problem)]


def parts_of(example: Example, template: ChatTemplate, step_format: StepFormat, train_on: TrainOn) -> list[Part]:
    """The parts of an example by the rules of `encode_supervised`. Raises `TemplateRefusal`."""
    context = 1.0 if train_on == "all" else 0.0
    tools: tuple[Tool, ...] = ()
    match example:
        case PlainText(text=text):
            return [Part(Segment(text, begins=True, closes=True), 1.0)]
        case Completion(prompt=prompt, completion=completion):
            return [Part(Segment(prompt, begins=True), context), Part(Segment(completion, closes=True), 1.0)]
        case Demonstration():
            chain = step_format.render(example.steps, example.answer)
            messages, num_prompt = [*prompt_messages(example), Message(ASSISTANT, chain)], 0
        case _:
            messages, num_prompt, tools = list(example.messages), example.num_prompt, example.tools
    segments = template.segments(messages, tools)
    last = max((segment.message for segment in segments if segment.message is not None), default=None)
    parts: list[Part] = []
    for segment in segments:
        if segment.message is None:
            parts.append(Part(segment, context))
            continue
        weight = messages[segment.message].weight if segment.message >= num_prompt else context
        if weight > 0:
            check_reasoning(messages[segment.message], segment.text)
        is_last = segment.message == last
        if not is_last:
            parts.append(Part(segment, 0.0 if train_on == "answer" else weight))
            continue
        start = step_format.answer_start(segment.text)
        if start > 0:
            reasoning = Segment(segment.text[:start], segment.message)
            parts.append(Part(reasoning, 0.0 if train_on == "answer" else weight))
        parts.append(Part(Segment(segment.text[start:], segment.message, closes=segment.closes), weight))
    return parts


OverLength: TypeAlias = Literal["drop", "cut", "cut_prompt", "error"]
OVER_LENGTH, UNTRAINED, REFUSED = "over max_length", "no trained token", "refused by the chat template"
Problem: TypeAlias = str | Sequence[Message] | Question | Example
"""An input to generate an answer for."""
CHUNK = 1024
"""Examples that are rendered and tokenized at a time."""
MOST_LONG_SHOWN = 5
"""Rows over max_length that an error lists; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Supervised:
    """One row of tokens.

    `mask`, as long as `ids`: True = the token is a target, predicted from the tokens before it; the first never is.
    `weights`: weight of each token in the loss, 0 where the mask is False; None if all are 1. `index` of the example.
    """

    ids: list[int]
    mask: list[bool]
    weights: list[float] | None
    index: int

    def encoded(self) -> Encoded:
        """The row in the form that batches use, with a weight for every token."""
        weights = self.weights if self.weights is not None else [float(learned) for learned in self.mask]
        return Encoded(self.ids, None, self.index, weights=weights)


@dataclass(frozen=True)
class RowPolicy:
    """What happens to rows that do not fit. over_length: to those over the maximum length. max_dropped_share: the
    largest fraction of rows that "drop" may remove. on_bad_row: to messages that the template refuses.
    """

    over_length: OverLength = "drop"
    max_dropped_share: float = 0.01
    on_bad_row: Literal["error", "skip"] = "error"


DEFAULT_POLICY = RowPolicy()


def encode_supervised(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    step_format: StepFormat,
    train_on: TrainOn = "assistant",
    max_length: int | None,
    policy: RowPolicy = DEFAULT_POLICY,
    template: ChatTemplate | None = None,
) -> tuple[list[Supervised], DataReport]:
    """Tokenize examples and mark the trained tokens.

    Args:
        train_on: "assistant" trains the assistant's turns with their end tokens (the completion of prompt and
            completion, all of plain text); "answer" only the answer of the last turn; "all" every token.
        policy: a row over `max_length` is dropped, truncated at its end (without the end token), or an error.
        template: the tokenizer's own if None.
    Raises:
        DataError: refused rows, rows over `max_length` with "error", too many of them with "drop", or no rows left;
            each diagnostic has file and line.
    """
    template = template or ChatTemplate(tokenizer)
    encoder = SegmentTokenizer(tokenizer)
    report = DataReport(read=len(examples), max_length=max_length)
    rows: list[Supervised] = []
    dropped: Counter[str] = Counter()
    over: list[Diagnostic] = []
    for first in range(0, len(examples), CHUNK):
        parts, indices = _chunk_parts(examples, first, template, step_format, train_on, report)
        whole = [[part.segment for part in row] for row in parts]
        bounded = [encoder.bounded(row, max_length) for row in whole]
        shortened = [short is not row for short, row in zip(bounded, whole, strict=True)]
        encoded = encoder.encode(bounded)
        for index, row_parts, segments, is_short in zip(indices, parts, encoded, shortened, strict=True):
            row = _joined_row(row_parts, segments, index)
            length = len(row.ids)
            if max_length is not None and length > max_length:
                over.append(over_length_diagnostic(examples[index].row, length, max_length, at_least=is_short))
                if policy.over_length == "drop":
                    dropped[OVER_LENGTH] += 1
                    continue
                report.cut, report.tokens_cut = report.cut + 1, report.tokens_cut + length - max_length
                row = _truncated(row, max_length)
            if not any(row.mask):
                dropped[UNTRAINED] += 1
                continue
            rows.append(row)
    report.lengths = [len(row.ids) for row in rows]
    report.tokens, report.trained_tokens = sum(report.lengths), sum(sum(row.mask) for row in rows)
    finish(report, dropped, over, policy, "at least one row with a token to learn")
    return rows, report


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    *,
    template: ChatTemplate | None = None,
) -> list[int]:
    """The ids that generation starts from; they equal the ids of a training row before the answer.

    Args:
        problem: a question (a user's message), messages, messages with tools, or an example without its last turn.
        template: the tokenizer's own if None.
    Raises:
        TemplateRefusal: the template cannot render these messages.
    """
    encoder = SegmentTokenizer(tokenizer)
    match problem:
        case Completion(prompt=text):
            segments = [Segment(text, begins=True)]
        case PlainText():
            segments = [Segment("", begins=True)]
        case _:
            tools = problem.tools if isinstance(problem, Conversation | Question) else ()
            segments = (template or ChatTemplate(tokenizer)).prompt(_messages_before_answer(problem), tools)
    return [token for ids in encoder.encode([segments])[0] for token in ids]


def _messages_before_answer(problem: Problem) -> Sequence[Message]:
    """The messages before the turn to generate."""
    if isinstance(problem, Question):
        return problem.messages
    if isinstance(problem, str):
        return [Message("user", problem)]
    if isinstance(problem, Demonstration):
        return prompt_messages(problem)
    assert not isinstance(problem, Completion | PlainText), "handled by prompt_tokens"
    if not isinstance(problem, Conversation):
        return problem
    last = max(index for index, message in enumerate(problem.messages) if message.role == ASSISTANT)
    return problem.messages[:last]


def _chunk_parts(
    examples: Sequence[Example],
    first: int,
    template: ChatTemplate,
    step_format: StepFormat,
    train_on: TrainOn,
    report: DataReport,
) -> tuple[list[list[Part]], list[int]]:
    """The parts of a chunk's examples and their indices; refused examples become diagnostics of the report."""
    found, indices = [], []
    for index in range(first, min(first + CHUNK, len(examples))):
        example = examples[index]
        try:
            found.append(parts_of(example, template, step_format, train_on))
        except TemplateRefusal as problem:
            row = example.row
            expected = "messages that the template renders turn by turn"
            report.diagnostics.append(
                Diagnostic(row.source_label, row.line, None, "messages", str(problem), expected, problem.hint)
            )
        else:
            indices.append(index)
    return found, indices


def _joined_row(parts: Sequence[Part], segments: Sequence[Sequence[int]], index: int) -> Supervised:
    """Join parts to one row; context after the last target is dropped, because nothing is trained on it."""
    ids = [token for segment in segments for token in segment]
    weights = [part.weight for part, segment in zip(parts, segments, strict=True) for _ in segment]
    if weights:
        weights[0] = 0.0  # no token before it could predict it
    end = max((position + 1 for position, weight in enumerate(weights) if weight > 0), default=0)
    return _row(ids[:end], weights[:end], index) if end else _row(ids, weights, index)


def _row(ids: list[int], weights: list[float], index: int) -> Supervised:
    mask = [weight > 0 for weight in weights]
    is_plain = all(weight in (0.0, 1.0) for weight in weights)
    return Supervised(ids, mask, None if is_plain else weights, index)


def _truncated(row: Supervised, length: int) -> Supervised:
    weights = None if row.weights is None else row.weights[:length]
    return Supervised(row.ids[:length], row.mask[:length], weights, row.index)


class NothingLeft(DataError):
    """Every row was dropped."""


def finish(
    report: DataReport, dropped: Counter[str], over: Sequence[Diagnostic], policy: RowPolicy, expected: str
) -> None:
    """Complete a report that has its lengths and its diagnostics of refused rows: read = used + dropped.

    over: rows over the maximum length. expected: of which there must be one. Raise `DataError` if a policy is violated
    or no row is left.
    """
    refused = report.diagnostics
    dropped.update({REFUSED: len(refused)} if refused else {})
    report.used, report.dropped = len(report.lengths or ()), dict(dropped)
    assert report.read == report.used + sum(report.dropped.values()), report
    if refused and policy.on_bad_row == "error":
        raise BadRows(refused, len(refused), "correct the rows", SKIP_ROWS)
    check_over(over, report.read, report.max_length, policy)
    if not report.used:
        raise NothingLeft([Diagnostic("data", None, None, "rows", report.summary(), expected)])


def over_length_diagnostic(row: Row, length: int, max_length: int, *, at_least: bool) -> Diagnostic:
    """The diagnostic for a row that is too long; `at_least`: its end was not tokenized.

    The advice follows once after all of them (`check_over`).
    """
    actual = f"{'at least ' if at_least else ''}{length} tokens"
    return Diagnostic(row.source_label, row.line, None, "row", actual, f"at most {max_length} (max_length)")


def check_over(over: Sequence[Diagnostic], read: int, max_length: int | None, policy: RowPolicy) -> None:
    """Raise `BadRows` if the policy does not allow the rows over `max_length` (diagnostics `over`).

    "error" allows none, "drop" at most the fraction `max_dropped_share` of the rows `read`.
    """
    if over and policy.over_length == "error":
        advice = f'{len(over)} of {read} rows are over max_length {max_length}, and data.over_length is "error": '
        advice += 'raise training.max_length, shorten these rows, or set data.over_length to "drop"'
        raise BadRows(over[:MOST_LONG_SHOWN], len(over), advice)
    if policy.over_length == "drop" and len(over) > policy.max_dropped_share * read:
        advice = (
            f"{len(over)} of {read} rows are over max_length {max_length}, more than data.max_dropped_share "
            f"({policy.max_dropped_share:g}) allows to drop: raise training.max_length, or data.max_dropped_share to "
            f"at least {math.ceil(len(over) / read * 100) / 100:g}"
        )
        raise BadRows(over[:MOST_LONG_SHOWN], len(over), advice)


class SupervisedEncoder:
    """Tokenizes examples by the settings of a config: template, step format, trained tokens, length."""

    def __init__(
        self,
        data: SftDataSection,
        step_format: StepFormat,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None,
    ) -> None:
        """Raises `UserError` for a tokenizer without an end token or a template that cannot render a question."""
        self.data, self.step_format, self.tokenizer, self.max_length = data, step_format, tokenizer, max_length
        self.template = ChatTemplate(tokenizer, data.chat_template)

    def __call__(self, examples: Sequence[Example]) -> tuple[list[Supervised], DataReport]:
        """Raises `DataError` like `encode_supervised`."""
        return encode_supervised(
            self.tokenizer,
            examples,
            step_format=self.step_format,
            train_on=self.data.train_on,
            max_length=self.max_length,
            policy=RowPolicy(self.data.over_length, self.data.max_dropped_share, self.data.on_bad_row),
            template=self.template,
        )
