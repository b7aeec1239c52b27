"""Comparisons and prompts → token ids, those that training and generation see.

Enters: comparisons (`preferences`) or prompts (`prompts`), a tokenizer, its chat template. Leaves: ids of the prompt
once and of each response with its end token, and a report in which read = used + dropped. For every response

    prompt ids + response ids = the ids of `encode_supervised` for the same conversation (or prompt and completion),
    prompt ids = `prompt_tokens`: what generation starts from

for a text without the marks of a step format, where supervised rows have one more border. There are no pads.
Left out: batches (`batches`), what the pairs mean for a loss.

Comparisons and prompts → tokens, by the rules of the config.

Enters: the `data` section of a method that learns from preferences, and the tokenizer. Leaves: a `PreferenceEncoder`.
Left out: rows (`preference_data`), templates and tokens themselves (`templates`, `preference_tokens`), batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.preferences import PreferenceTextSection
from loopos.data.piece_tokens import SegmentTokenizer
from loopos.data.preferences import Comparison, Pair
from loopos.data.prompts import Prompt, Words, told
from loopos.data.reading import FormatReport, account
from loopos.data.record import SKIP_ROWS, BadRows
from loopos.data.supervised_tokens import CHUNK, OVER_LENGTH, REFUSED, OverLength, check_over, over_diagnostic
from loopos.data.templates import ChatTemplate, Piece, TemplateRefusal
from loopos.data.tokens import length_spread
from loopos.data.tool_schemas import Tool

PROMPT_OVER, SAME_TOKENS = "prompt over max_length", "two responses of the same tokens"


@dataclass(frozen=True, slots=True)
class EncodedComparison:
    """One comparison as tokens: the ids of the prompt and of each response, whose last is the end token unless it was
    cut. `index`: the comparison's place among those given.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: tuple[Pair, ...]
    index: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass
class PreferenceReport:
    """What tokenising did: `read` = `used` + the sum of `dropped`, which counts rows by reason. `responses` and `pairs`
    count those of the rows used, 0 where prompts alone were asked for; `tokens` counts each prompt once. `cut`:
    responses shortened, with the tokens they lost. `lengths`: of each prompt with its longest response; `places`: those
    of the rows used, among those read.
    """

    read: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    responses: int = 0
    pairs: int = 0
    tokens: int = 0
    cut: int = 0
    tokens_cut: int = 0
    max_length: int | None = None
    diagnostics: list[Diagnostic] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list, repr=False)
    places: list[int] = field(default_factory=list, repr=False)

    def counts(self) -> dict[str, object]:
        """The account in numbers, for logs."""
        told = asdict(self)
        return {name: value for name, value in told.items() if name not in ("diagnostics", "lengths", "places")}

    def summary(self) -> str:
        """The account in words."""
        spread = length_spread(self.lengths) or "no rows"
        held = f"{self.responses} responses, {self.pairs} pairs, " if self.responses else ""
        cut = f"; {self.cut} cut at {self.max_length} ({self.tokens_cut} tokens lost)" if self.cut else ""
        told = account(FormatReport(self.read, self.used, self.dropped, ()))
        return f"{told}; {held}{self.tokens:,} tokens, {spread}{cut}"


def encode_comparisons(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Comparison],
    *,
    template: ChatTemplate | None,
    max_length: int | None,
    over_length: OverLength = "drop",
    max_dropped_share: float = 0.01,
    on_bad_row: Literal["error", "skip"] = "error",
) -> tuple[list[EncodedComparison], PreferenceReport]:
    """Tokenises prompts and their responses.

    Args:
        template: the tokenizer's own if None.
        max_length: tokens of a prompt with its longest response at most.
        over_length: a comparison over `max_length` is dropped, has its responses cut at their end (so that the end
            token goes; dropped where the prompt leaves no room, or nothing is left to tell them apart), or is an error.
        max_dropped_share: comparisons over `max_length` may be at most this share of all under "drop".
        on_bad_row: what messages do that the template refuses.
    Raises:
        DataError: messages that are refused, rows over `max_length` under "error", or too many of them under "drop";
        no row left. Each fault names file and line.
    """
    report = PreferenceReport(read=len(examples), max_length=max_length)
    rows: list[EncodedComparison] = []
    dropped: Counter[str] = Counter()
    over: list[Diagnostic] = []
    for place, (prompt, *whole), is_short in _tokenised(tokenizer, examples, template, report):
        responses, longest = whole, max(map(len, whole))
        if max_length is not None and len(prompt) + longest > max_length:
            over.append(over_diagnostic(examples[place].row, len(prompt) + longest, max_length, at_least=is_short))
            if over_length == "drop" or len(prompt) >= max_length:
                dropped[OVER_LENGTH if over_length == "drop" else PROMPT_OVER] += 1
                continue
            responses = [response[: max_length - len(prompt)] for response in whole]
        if len(set(map(tuple, responses))) < len(responses):
            dropped[SAME_TOKENS] += 1
            continue
        lost = [len(uncut) - len(response) for uncut, response in zip(whole, responses, strict=True)]
        report.cut, report.tokens_cut = report.cut + sum(map(bool, lost)), report.tokens_cut + sum(lost)
        rows.append(EncodedComparison(prompt, responses, examples[place].pairs, place))
    report.responses, report.pairs = sum(len(row.responses) for row in rows), sum(len(row.pairs) for row in rows)
    report.tokens = sum(row.num_tokens for row in rows)
    report.lengths = [len(row.prompt) + max(map(len, row.responses)) for row in rows]
    report.places = [row.index for row in rows]
    _settle(report, dropped, over, over_length, max_dropped_share, on_bad_row)
    return rows, report


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    template: ChatTemplate | None,
    max_length: int | None,
    over_length: OverLength = "drop",
    max_dropped_share: float = 0.01,
    on_bad_row: Literal["error", "skip"] = "error",
) -> tuple[list[list[int]], PreferenceReport]:
    """Tokenises prompts: the ids that generation starts from.

    Args:
        max_length: tokens of a prompt at most.
        over_length: as `encode_comparisons`; but a prompt is never cut, for the model answers its end: under "cut" it
            is dropped as under "drop", however many they are.
    Raises:
        DataError: as `encode_comparisons`.
    """
    report = PreferenceReport(read=len(prompts), max_length=max_length)
    rows: list[list[int]] = []
    dropped: Counter[str] = Counter()
    over: list[Diagnostic] = []
    for place, (prompt,), is_short in _tokenised(tokenizer, prompts, template, report):
        if max_length is not None and len(prompt) > max_length:
            over.append(over_diagnostic(prompts[place].row, len(prompt), max_length, at_least=is_short))
            dropped[PROMPT_OVER] += 1
            continue
        rows.append(prompt)
        report.places.append(place)
    report.lengths = list(map(len, rows))
    report.tokens = sum(report.lengths)
    _settle(report, dropped, over, over_length, max_dropped_share, on_bad_row)
    return rows, report


def _tokenised(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Comparison] | Sequence[Prompt],
    template: ChatTemplate | None,
    report: PreferenceReport,
) -> Iterator[tuple[int, list[list[int]], bool]]:
    """The place of each example that the template renders, with the ids of its prompt and of each response, and whether
    the end of one is missing, far behind the report's `max_length`; what the template refuses is noted as faults.
    """
    template = template or ChatTemplate(tokenizer)
    encoder = SegmentTokenizer(tokenizer)
    for first in range(0, len(examples), CHUNK):
        found: list[tuple[int, list[list[Piece]]]] = []
        for index in range(first, min(first + CHUNK, len(examples))):
            example = examples[index]
            try:
                responses = example.responses if isinstance(example, Comparison) else ()
                found.append((index, _groups(example.prompt, responses, template, example.tools)))
            except TemplateRefusal as problem:
                expected = "messages that the template renders turn by turn"
                row = example.row
                report.diagnostics.append(
                    Diagnostic(row.place, row.line, None, "messages", str(problem), expected, problem.hint)
                )
        # A piece's ids depend on whether it opens a text, not on what stands before it: one prompt serves all.
        whole = [[piece for group in groups for piece in group] for _, groups in found]
        bounded = [encoder.bounded(row, report.max_length) for row in whole]
        for (index, groups), uncut, short, pieces in zip(found, whole, bounded, encoder.encode(bounded), strict=True):
            ids = iter(pieces)
            yield index, [[token for _ in group for token in next(ids)] for group in groups], short is not uncut


def _groups(
    prompt: Words, responses: Sequence[Words], template: ChatTemplate, tools: Sequence[Tool]
) -> list[list[Piece]]:
    """The pieces of the prompt, then of each response up to its last end token. Raises `TemplateRefusal`."""
    if isinstance(prompt, str):
        return [[Piece(prompt, begins=True)], *([Piece(str(response), closes=True)] for response in responses)]
    groups = [template.prompt(prompt, tools)]
    for response in responses:
        assert not isinstance(response, str), "messages go with messages"
        pieces = template.pieces([*prompt, *response], tools)
        turns = [place for place, piece in enumerate(pieces) if piece.message is not None]
        start = next(place for place in turns if pieces[place].message == len(prompt))
        assert pieces[:start] == groups[0], "a turn begins behind what generation starts from"
        groups.append(pieces[start : turns[-1] + 1])
    return groups


def _settle(
    report: PreferenceReport,
    dropped: Counter[str],
    over: Sequence[Diagnostic],
    over_length: OverLength,
    max_dropped_share: float,
    on_bad_row: Literal["error", "skip"],
) -> None:
    """Fills in what was used and dropped, and raises where the policies do not allow it or nothing is left."""
    dropped.update({REFUSED: len(report.diagnostics)} if report.diagnostics else {})
    report.used, report.dropped = len(report.lengths), dict(dropped)
    assert report.read == report.used + sum(report.dropped.values()), report
    if report.diagnostics and on_bad_row == "error":
        raise BadRows(report.diagnostics, len(report.diagnostics), "correct the rows", SKIP_ROWS)
    check_over(over, report.read, report.max_length, over_length, max_dropped_share)
    if not report.used:
        raise DataError([Diagnostic("data", None, None, "rows", report.summary(), "at least one row that fits")])


class Origin(NamedTuple):
    """What a prompt was made from: its `text` as the file has it, and the file and line."""

    text: str
    place: str


class PreferenceEncoder:
    """Makes the tokens of comparisons and prompts as a config says: by which template, how long."""

    def __init__(
        self, data: PreferenceTextSection, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
    ) -> None:
        """Raises `UserError` for a tokenizer without an end token, and a template that cannot render a question."""
        self.data, self.tokenizer, self.max_length = data, tokenizer, max_length
        # "none" leaves strings as they stand; messages still need a template, the tokenizer's own.
        chosen = "auto" if data.chat_template == "none" else data.chat_template
        self.template = ChatTemplate(tokenizer, chosen)
        self.words: dict[tuple[int, ...], Origin] = {}
        """What was asked, by the ids of each prompt that was tokenised."""

    def comparisons(self, examples: Sequence[Comparison]) -> tuple[list[EncodedComparison], PreferenceReport]:
        """Raises `DataError` as `encode_comparisons`."""
        data = self.data
        return encode_comparisons(
            self.tokenizer,
            examples,
            template=self.template,
            max_length=self.max_length,
            over_length=data.over_length,
            max_dropped_share=data.max_dropped_share,
            on_bad_row=data.on_bad_row,
        )

    def prompts(self, examples: Sequence[Prompt]) -> tuple[list[list[int]], PreferenceReport]:
        """Raises `DataError` as `encode_prompts`."""
        data = self.data
        ids, report = encode_prompts(
            self.tokenizer,
            examples,
            template=self.template,
            max_length=self.max_length,
            over_length=data.over_length,
            max_dropped_share=data.max_dropped_share,
            on_bad_row=data.on_bad_row,
        )
        for tokens, place in zip(ids, report.places, strict=True):
            self.words[tuple(tokens)] = Origin(told(examples[place].prompt), examples[place].row.where)
        return ids, report
