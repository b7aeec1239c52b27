"""Examples → parts of text with the factor on their loss: what is context, what is learned.

Enters: an example, the chat template, the `StepFormat`, what to train on. Leaves: `Part`s in order, whose texts
together are the example; reasoning and answer are parts of their own. Left out: tokens (`supervised_tokens`).

Examples → token ids and, born with them, which tokens are learned. For language models, the only place.

Enters: examples (`supervised_rows`), a tokenizer, the `StepFormat`, what to train on. Leaves: `Supervised` rows and a
report in which read = used + dropped. Every piece of an example (context, reasoning, answer) is tokenised by itself, so
that no token lies on both sides of a border and the ids of a prompt are those that generation starts from:

    prompt_tokens(example) + what is said = the row's ids

The end token is always part of what is learned; the begin token is never doubled; there are no pads.
Left out: templates (`templates`), batches (`batches`).

Examples of a language model's run → tokens, by the rules of the config.

Enters: the `data` section of chain-of-thought training, its step format and the tokenizer. Leaves: a
`SupervisedEncoder`. Left out: rows (`supervised`), templates and tokens themselves (`templates`, `supervised_tokens`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from loopos.config.chain_of_thought import ReasoningDataSection
from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data.conversations import ASSISTANT, Conversation, Message, Question
from loopos.data.demonstrations import Demonstration
from loopos.data.piece_tokens import SegmentTokenizer
from loopos.data.record import SKIP_ROWS, BadRows
from loopos.data.rows import Row
from loopos.data.step_format import StepFormat
from loopos.data.supervised_rows import Completion, Example, PlainText
from loopos.data.template_checks import check_reasoning
from loopos.data.templates import ChatTemplate, Piece, TemplateRefusal
from loopos.data.tokens import Encoded, length_spread
from loopos.data.tool_schemas import Tool

TrainOn: TypeAlias = Literal["all", "assistant", "answer"]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece with the factor on the loss of its tokens; 0 = context."""

    piece: Piece
    weight: float


def before_answer(example: Demonstration) -> list[Message]:
    """The messages that a demonstration's chain answers."""
    system = [Message("system", example.system)] if example.system is not None else []
    return [*system, Message("user", example.problem)]


def parts_of(example: Example, template: ChatTemplate, step_format: StepFormat, train_on: TrainOn) -> list[Part]:
    """The parts of an example, as `supervised_tokens.encode_supervised` says. Raises `TemplateRefusal`."""
    context = 1.0 if train_on == "all" else 0.0
    tools: tuple[Tool, ...] = ()
    match example:
        case PlainText(text=text):
            return [Part(Piece(text, begins=True, closes=True), 1.0)]
        case Completion(prompt=prompt, completion=completion):
            return [Part(Piece(prompt, begins=True), context), Part(Piece(completion, closes=True), 1.0)]
        case Demonstration():
            chain = step_format.render(example.steps, example.answer)
            messages, num_prompt = [*before_answer(example), Message(ASSISTANT, chain)], 0
        case _:
            messages, num_prompt, tools = list(example.messages), example.num_prompt, example.tools
    pieces = template.pieces(messages, tools)
    last = max((piece.message for piece in pieces if piece.message is not None), default=None)
    parts: list[Part] = []
    for piece in pieces:
        if piece.message is None:
            parts.append(Part(piece, context))
            continue
        weight = messages[piece.message].weight if piece.message >= num_prompt else context
        if weight > 0:
            check_reasoning(messages[piece.message], piece.text)
        is_last = piece.message == last
        if not is_last:
            parts.append(Part(piece, 0.0 if train_on == "answer" else weight))
            continue
        start = step_format.answer_start(piece.text)
        if start > 0:
            reasoning = Piece(piece.text[:start], piece.message)
            parts.append(Part(reasoning, 0.0 if train_on == "answer" else weight))
        parts.append(Part(Piece(piece.text[start:], piece.message, closes=piece.closes), weight))
    return parts


OverLength: TypeAlias = Literal["drop", "cut", "error"]
OVER_LENGTH, UNTRAINED, REFUSED = "over max_length", "no trained token", "refused by the chat template"
Problem: TypeAlias = str | Sequence[Message] | Question | Example
"""What a model is asked."""
CHUNK = 1024
"""Examples that are rendered and tokenised at a time."""
MOST_LONG_SHOWN = 5
"""Rows over max_length that an error lists; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Supervised:
    """One row of tokens. `mask`, as long as `ids`: True = this token is a target, predicted from those before it; the
    first never is. `weights`: the factor on the loss of each token, 0 where the mask is False; None where all are 1.
    `index`: the example's place among those given.
    """

    ids: list[int]
    mask: list[bool]
    weights: list[float] | None
    index: int

    def encoded(self) -> Encoded:
        """The row as batches take it, with a weight for every token."""
        weights = self.weights if self.weights is not None else [float(learned) for learned in self.mask]
        return Encoded(self.ids, None, self.index, weights=weights)


@dataclass
class SupervisedReport:
    """What tokenising did: `read` = `used` + the sum of `dropped`, which counts rows by reason. `cut`: rows shortened
    to `max_length`, with the tokens they lost.
    """

    read: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    cut: int = 0
    tokens_cut: int = 0
    max_length: int | None = None
    diagnostics: list[Diagnostic] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list, repr=False)

    def counts(self) -> dict[str, object]:
        """The account in numbers, for logs."""
        told = asdict(self)
        return {name: value for name, value in told.items() if name not in ("diagnostics", "lengths")}

    def summary(self) -> str:
        """The account in words."""
        spread = length_spread(self.lengths) or "no rows"
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in sorted(self.dropped.items()))
        cut = f"; {self.cut} cut at {self.max_length} ({self.tokens_cut} tokens lost)" if self.cut else ""
        share = f" ({self.trained_tokens / self.tokens:.0%})" if self.tokens else ""
        return (
            f"{self.read} examples, {self.used} used{dropped}; {self.tokens:,} tokens, {self.trained_tokens:,} "
            f"trained{share}, {spread}{cut}"
        )


def encode_supervised(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    step_format: StepFormat,
    train_on: TrainOn = "assistant",
    max_length: int | None,
    over_length: OverLength = "drop",
    max_dropped_share: float = 0.01,
    on_bad_row: Literal["error", "skip"] = "error",
    template: ChatTemplate | None = None,
) -> tuple[list[Supervised], SupervisedReport]:
    """Tokenises examples and marks what is learned.

    Args:
        train_on: "assistant" learns what the assistant says, its end token included (of prompt and completion the
            completion, of plain text all); "answer" of that the last turn's answer alone; "all" every token.
        over_length: a row over `max_length` is dropped, cut at its end (so that the end token goes), or an error.
        max_dropped_share: rows over `max_length` may be at most this share of all under "drop".
        on_bad_row: what a conversation does that the template refuses.
        template: the tokenizer's own if None.
    Raises:
        DataError: rows that are refused, over `max_length` under "error", or too many of them under "drop"; no row
        left. Each fault names file and line.
    """
    template = template or ChatTemplate(tokenizer)
    encoder = SegmentTokenizer(tokenizer)
    report = SupervisedReport(max_length=max_length)
    rows: list[Supervised] = []
    dropped: Counter[str] = Counter()
    over: list[Diagnostic] = []
    for first in range(0, len(examples), CHUNK):
        parts, places = _chunk_parts(examples, first, template, step_format, train_on, report)
        whole = [[part.piece for part in row] for row in parts]
        bounded = [encoder.bounded(row, max_length) for row in whole]
        shortened = [short is not row for short, row in zip(bounded, whole, strict=True)]
        encoded = encoder.encode(bounded)
        for place, row_parts, pieces, is_short in zip(places, parts, encoded, shortened, strict=True):
            row = _joined(row_parts, pieces, place)
            length = len(row.ids)
            if max_length is not None and length > max_length:
                over.append(over_diagnostic(examples[place].row, length, max_length, at_least=is_short))
                if over_length == "drop":
                    dropped[OVER_LENGTH] += 1
                    continue
                report.cut, report.tokens_cut = report.cut + 1, report.tokens_cut + length - max_length
                row = _shortened(row, max_length)
            if not any(row.mask):
                dropped[UNTRAINED] += 1
                continue
            rows.append(row)
    refused = list(report.diagnostics)
    dropped.update({REFUSED: len(refused)} if refused else {})
    report.read, report.used, report.dropped = len(examples), len(rows), dict(dropped)
    _fill(report, rows)
    assert report.read == report.used + sum(report.dropped.values()), report
    if refused and on_bad_row == "error":
        raise BadRows(refused, len(refused), "correct the rows", SKIP_ROWS)
    check_over(over, len(examples), max_length, over_length, max_dropped_share)
    if not rows:
        raise DataError(
            [Diagnostic("data", None, None, "rows", report.summary(), "at least one row with a token to learn")]
        )
    return rows, report


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    *,
    template: ChatTemplate | None = None,
) -> list[int]:
    """The ids that generation starts from: those of a row of training before what the model is to say.

    Args:
        problem: a question (a user's message), the messages so far, these with tools, or an example, whose last turn is
            left out.
        template: the tokenizer's own if None.
    Raises:
        TemplateRefusal: the template cannot render these messages.
    """
    encoder = SegmentTokenizer(tokenizer)
    match problem:
        case Completion(prompt=text):
            pieces = [Piece(text, begins=True)]
        case PlainText():
            pieces = [Piece("", begins=True)]
        case _:
            tools = problem.tools if isinstance(problem, Conversation | Question) else ()
            pieces = (template or ChatTemplate(tokenizer)).prompt(_asked(problem), tools)
    return [token for ids in encoder.encode([pieces])[0] for token in ids]


def _asked(problem: Problem) -> Sequence[Message]:
    """The messages before the turn that is to be generated."""
    if isinstance(problem, Question):
        return problem.messages
    if isinstance(problem, str):
        return [Message("user", problem)]
    if isinstance(problem, Demonstration):
        return before_answer(problem)
    assert not isinstance(problem, Completion | PlainText), "their prompts need no messages"
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
    report: SupervisedReport,
) -> tuple[list[list[Part]], list[int]]:
    """The parts of a chunk's examples and their places; those that the template refuses are noted as faults."""
    found, places = [], []
    for index in range(first, min(first + CHUNK, len(examples))):
        example = examples[index]
        try:
            found.append(parts_of(example, template, step_format, train_on))
        except TemplateRefusal as problem:
            row = example.row
            expected = "messages that the template renders turn by turn"
            report.diagnostics.append(
                Diagnostic(row.place, row.line, None, "messages", str(problem), expected, problem.hint)
            )
        else:
            places.append(index)
    return found, places


def _joined(parts: Sequence[Part], pieces: Sequence[Sequence[int]], index: int) -> Supervised:
    """One row of its parts; context behind the last target is left out, for nothing is learned from it."""
    ids = [token for piece in pieces for token in piece]
    weights = [part.weight for part, piece in zip(parts, pieces, strict=True) for _ in piece]
    if weights:
        weights[0] = 0.0  # nothing stands before it that could predict it
    end = max((position + 1 for position, weight in enumerate(weights) if weight > 0), default=0)
    return _row(ids[:end], weights[:end], index) if end else _row(ids, weights, index)


def _row(ids: list[int], weights: list[float], index: int) -> Supervised:
    mask = [weight > 0 for weight in weights]
    is_plain = all(weight in (0.0, 1.0) for weight in weights)
    return Supervised(ids, mask, None if is_plain else weights, index)


def _shortened(row: Supervised, length: int) -> Supervised:
    weights = None if row.weights is None else row.weights[:length]
    return Supervised(row.ids[:length], row.mask[:length], weights, row.index)


def _fill(report: SupervisedReport, rows: Sequence[Supervised]) -> None:
    report.lengths = [len(row.ids) for row in rows]
    report.tokens, report.trained_tokens = sum(report.lengths), sum(sum(row.mask) for row in rows)


def over_diagnostic(row: Row, length: int, max_length: int, *, at_least: bool) -> Diagnostic:
    """The fault of a row that is too long; at_least: its end was never tokenised. What to do stands once, behind all of
    them (`check_over`).
    """
    actual = f"{'at least ' if at_least else ''}{length} tokens"
    return Diagnostic(row.place, row.line, None, "row", actual, f"at most {max_length} (max_length)")


def check_over(
    over: Sequence[Diagnostic], read: int, max_length: int | None, over_length: OverLength, max_dropped_share: float
) -> None:
    """Raises `BadRows` where the policy does not allow the rows over `max_length`, whose faults are `over`: any under
    "error", more than `max_dropped_share` of the rows `read` under "drop".
    """
    if over and over_length == "error":
        advice = f'{len(over)} of {read} rows are over max_length {max_length}, and data.over_length is "error": '
        advice += 'raise training.max_length, shorten these rows, or set data.over_length to "drop"'
        raise BadRows(over[:MOST_LONG_SHOWN], len(over), advice)
    if over_length == "drop" and len(over) > max_dropped_share * read:
        advice = (
            f"{len(over)} of {read} rows are over max_length {max_length}, more than data.max_dropped_share "
            f"({max_dropped_share:g}) allows to drop: raise training.max_length, or data.max_dropped_share to at least "
            f"{math.ceil(len(over) / read * 100) / 100:g}"
        )
        raise BadRows(over[:MOST_LONG_SHOWN], len(over), advice)


class SupervisedEncoder:
    """Makes the tokens of examples as a config says: by which template and step format, what is learned, how long."""

    def __init__(
        self,
        data: ReasoningDataSection,
        step_format: StepFormat,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None,
    ) -> None:
        """Raises `UserError` for a tokenizer without an end token, and a template that cannot render a question."""
        self.data, self.step_format, self.tokenizer, self.max_length = data, step_format, tokenizer, max_length
        self.template = ChatTemplate(tokenizer, data.chat_template)

    def __call__(self, examples: Sequence[Example]) -> tuple[list[Supervised], SupervisedReport]:
        """Raises `DataError` as `encode_supervised`."""
        return encode_supervised(
            self.tokenizer,
            examples,
            step_format=self.step_format,
            train_on=self.data.train_on,
            max_length=self.max_length,
            over_length=self.data.over_length,
            max_dropped_share=self.data.max_dropped_share,
            on_bad_row=self.data.on_bad_row,
            template=self.template,
        )
