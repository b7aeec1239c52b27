"""Tokenize comparisons and prompts, with the same ids that training and generation see.

    prompt ids + response ids = ids of `encode_supervised` for the same conversation (or prompt and completion)
    prompt ids = `prompt_tokens`, which generation starts from

This holds for text without the marks of a step format, where supervised rows have one more border. Responses end with
the end token; there are no pads. In a response of several turns the assistant's tokens count, as in supervised rows.
The report states read = used + dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import Diagnostic
from loopos.config.preferences import PreferenceTextSection
from loopos.data.piece_tokens import SegmentTokenizer
from loopos.data.preferences import Comparison, Pair
from loopos.data.prompts import Prompt, PromptContent, prompt_text
from loopos.data.reading import DataReport
from loopos.data.rows import Row
from loopos.data.supervised_tokens import CHUNK, DEFAULT_POLICY, OVER_LENGTH, RowPolicy, finish, over_length_diagnostic
from loopos.data.template_checks import num_shared
from loopos.data.templates import ChatTemplate, Segment, TemplateRefusal
from loopos.data.tool_schemas import Tool

PROMPT_OVER, SAME_TOKENS = "prompt over max_length", "two responses of the same tokens"
NO_ROOM = "responses leave no room for the prompt"


@dataclass(frozen=True, slots=True)
class EncodedComparison:
    """One comparison as tokens: the ids of the prompt and of each response with its end token, unless truncated.
    `masks`: which tokens of each response count, True for those of the assistant's turns; None for all.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: tuple[Pair, ...]
    index: int
    masks: list[list[bool]] | None = None

    def counted(self, number: int) -> Sequence[int]:
        """The indices of a response's tokens that count."""
        return counted(self.responses[number], self.mask(number))

    def mask(self, number: int) -> list[bool] | None:
        """Which tokens of a response count; None for all."""
        return None if self.masks is None else self.masks[number]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt) + sum(map(len, self.responses))


def counted(response: Sequence[int], mask: Sequence[bool] | None) -> Sequence[int]:
    """The indices of the tokens that count: those where the mask is True, all without a mask."""
    return range(len(response)) if mask is None else [index for index, counts in enumerate(mask) if counts]


def encode_comparisons(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Comparison],
    *,
    template: ChatTemplate | None,
    max_length: int | None,
    policy: RowPolicy = DEFAULT_POLICY,
) -> tuple[list[EncodedComparison], DataReport]:
    """Tokenize prompts and their responses.

    Args:
        template: the tokenizer's own if None.
        max_length: tokens of a prompt with its longest response at most.
        policy: a comparison over `max_length` is dropped, has its responses cut at their end (so that the end token is
            lost; dropped if the prompt leaves no room or the responses become equal), has its prompt cut from the left
            ("cut_prompt": behind the begin token and the system's message; dropped if the responses leave no room), or
            is an error.
    Raises:
        DataError: refused messages, rows over `max_length` with "error", too many of them with "drop", or no rows left;
            each diagnostic has file and line.
    """
    report = DataReport(read=len(examples), max_length=max_length)
    rows: list[EncodedComparison] = []
    dropped: Counter[str] = Counter()
    over: list[Diagnostic] = []
    cuts_prompts = policy.over_length == "cut_prompt"
    template = template or ChatTemplate(tokenizer)
    for index, (prompt, *whole), masks, is_short in tokenized(
        tokenizer, examples, template, report, _comparison_groups, whole=cuts_prompts
    ):
        responses, longest, lost = whole, max(map(len, whole)), [0]
        if max_length is not None and len(prompt) + longest > max_length:
            row = examples[index].row
            over.append(over_length_diagnostic(row, len(prompt) + longest, max_length, at_least=is_short))
            if cuts_prompts:
                head, room = _num_head(tokenizer, examples[index], prompt, template), max_length - longest
                if room <= head:
                    dropped[NO_ROOM] += 1
                    continue
                lost = [len(prompt) - room]
                prompt = [*prompt[:head], *prompt[head - room :]]
            elif policy.over_length == "drop" or len(prompt) >= max_length:
                dropped[OVER_LENGTH if policy.over_length == "drop" else PROMPT_OVER] += 1
                continue
            else:
                responses = [response[: max_length - len(prompt)] for response in whole]
                lost = [len(uncut) - len(response) for uncut, response in zip(whole, responses, strict=True)]
                masks = None if masks is None else [m[: max_length - len(prompt)] for m in masks]
        if len(set(map(tuple, responses))) < len(responses):
            dropped[SAME_TOKENS] += 1
            continue
        report.cut, report.tokens_cut = report.cut + sum(map(bool, lost)), report.tokens_cut + sum(lost)
        rows.append(EncodedComparison(prompt, responses, examples[index].pairs, index, masks))
    report.responses, report.pairs = sum(len(row.responses) for row in rows), sum(len(row.pairs) for row in rows)
    report.tokens = sum(row.num_tokens for row in rows)
    report.lengths = [len(row.prompt) + max(map(len, row.responses)) for row in rows]
    report.indices = [row.index for row in rows]
    report.cut_unit = "prompts " if cuts_prompts else ""
    finish(report, dropped, over, policy, "at least one row that fits")
    return rows, report


def _num_head(
    tokenizer: PreTrainedTokenizerBase, example: Comparison, prompt: Sequence[int], template: ChatTemplate
) -> int:
    """The number of a prompt's first tokens that are kept when it is cut: those of the system's message and of the
    tools, else the begin token.
    """
    encoder = SegmentTokenizer(tokenizer)
    start = encoder.leading
    if not isinstance(example.prompt, str):
        system = [message for message in example.prompt[:1] if message.role in ("system", "developer")]
        try:
            segments = template.segments(system, example.tools) if system or example.tools else []
        except TemplateRefusal:
            segments = []
        start = [token for segment in encoder.encode([segments])[0] for token in segment] or start
    return num_shared(start, prompt)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    template: ChatTemplate | None,
    max_length: int | None,
    policy: RowPolicy = DEFAULT_POLICY,
) -> tuple[list[list[int]], DataReport]:
    """Tokenize prompts: the ids that generation starts from.

    Args:
        max_length: tokens of a prompt at most.
        policy: as in `encode_comparisons`; but a prompt is never truncated, because the model answers its end:
            "cut" drops it, without a limit on their number.
    Raises:
        DataError: as `encode_comparisons`.
    """
    report = DataReport(read=len(prompts), max_length=max_length)
    rows: list[list[int]] = []
    dropped: Counter[str] = Counter()
    over: list[Diagnostic] = []
    for index, (prompt,), _, is_short in tokenized(tokenizer, prompts, template, report, _prompt_groups):
        if max_length is not None and len(prompt) > max_length:
            over.append(over_length_diagnostic(prompts[index].row, len(prompt), max_length, at_least=is_short))
            dropped[PROMPT_OVER] += 1
            continue
        rows.append(prompt)
        report.indices.append(index)
    report.lengths = list(map(len, rows))
    report.tokens = sum(report.lengths)
    report.responses = report.pairs = 0
    finish(report, dropped, over, policy, "at least one row that fits")
    return rows, report


class HasRow(Protocol):
    """An example that knows its row."""

    @property
    def row(self) -> Row: ...


ExampleT = TypeVar("ExampleT", bound=HasRow)
Groups: TypeAlias = Callable[[ExampleT, ChatTemplate], list[list[Segment]]]
"""The groups of segments of an example; raises `TemplateRefusal`."""


def tokenized(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ExampleT],
    template: ChatTemplate | None,
    report: DataReport,
    groups_of: Groups[ExampleT],
    *,
    whole: bool = False,
) -> Iterator[tuple[int, list[list[int]], list[list[bool]] | None, bool]]:
    """Yield the index of each rendered example, the ids of each of its groups, such as prompt and responses, the masks
    of all groups but the first (None where all of their tokens are the assistant's), and
    whether a text was shortened.

    Only texts far over the report's `max_length` are shortened, none if `whole`. Refused examples become diagnostics of
    the report.
    """
    template = template or ChatTemplate(tokenizer)
    encoder = SegmentTokenizer(tokenizer)
    for first in range(0, len(examples), CHUNK):
        found: list[tuple[int, list[list[Segment]]]] = []
        for index in range(first, min(first + CHUNK, len(examples))):
            example = examples[index]
            try:
                found.append((index, groups_of(example, template)))
            except TemplateRefusal as problem:
                expected = "messages that the template renders turn by turn"
                row = example.row
                report.diagnostics.append(
                    Diagnostic(row.source_label, row.line, None, "messages", str(problem), expected, problem.hint)
                )
        # The ids of a segment depend only on whether it starts a text, so one prompt serves all responses.
        flat = [[segment for group in groups for segment in group] for _, groups in found]
        bounded = [encoder.bounded(row, None if whole else report.max_length) for row in flat]
        for (index, groups), uncut, short, segments in zip(found, flat, bounded, encoder.encode(bounded), strict=True):
            ids = iter(segments)
            tokens = [[next(ids) for _ in group] for group in groups]
            flat_ids = [[token for part in parts for token in part] for parts in tokens]
            yield index, flat_ids, _masks(groups[1:], tokens[1:]), short is not uncut


def _masks(groups: Sequence[Sequence[Segment]], tokens: Sequence[Sequence[Sequence[int]]]) -> list[list[bool]] | None:
    """Which tokens of each response are the assistant's; None where no other turn stands between them."""
    if all(len(group) == 1 for group in groups):
        return None
    return [
        [segment.message is not None for segment, part in zip(group, parts, strict=True) for _ in part]
        for group, parts in zip(groups, tokens, strict=True)
    ]


def _comparison_groups(example: Comparison, template: ChatTemplate) -> list[list[Segment]]:
    return _groups(example.prompt, example.responses, template, example.tools)


def _prompt_groups(example: Prompt, template: ChatTemplate) -> list[list[Segment]]:
    return _groups(example.prompt, (), template, example.tools)


def _groups(
    prompt: PromptContent, responses: Sequence[PromptContent], template: ChatTemplate, tools: Sequence[Tool]
) -> list[list[Segment]]:
    """Segments of the prompt, then of each response up to its last end token. Raises `TemplateRefusal`."""
    if isinstance(prompt, str):
        return [[Segment(prompt, begins=True)], *([Segment(str(response), closes=True)] for response in responses)]
    groups = [template.prompt(prompt, tools)]
    for response in responses:
        assert not isinstance(response, str), "messages go with messages"
        segments = template.segments([*prompt, *response], tools)
        turns = [index for index, segment in enumerate(segments) if segment.message is not None]
        start = next(index for index in turns if segments[index].message == len(prompt))
        assert segments[:start] == groups[0], "a turn starts at the end of the generation prompt"
        groups.append(segments[start : turns[-1] + 1])
    return groups


class Origin(NamedTuple):
    """The source of a prompt: its `text` in the file, the file and line, and the columns of its row."""

    text: str
    location: str
    row: Mapping[str, object] = MappingProxyType({})


class PreferenceEncoder:
    """Tokenizes comparisons and prompts by the settings of a config."""

    def __init__(
        self, data: PreferenceTextSection, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
    ) -> None:
        """Raises `UserError` for a tokenizer without an end token, and a template that cannot render a question."""
        self.data, self.tokenizer, self.max_length = data, tokenizer, max_length
        # "none" leaves strings as they are; messages still need the tokenizer's template.
        chosen = "auto" if data.chat_template == "none" else data.chat_template
        self.template = ChatTemplate(tokenizer, chosen)
        self.origins: dict[tuple[int, ...], Origin] = {}
        """The source of each tokenized prompt, by its ids."""

    def comparisons(self, examples: Sequence[Comparison]) -> tuple[list[EncodedComparison], DataReport]:
        """Raises `DataError` as `encode_comparisons`."""
        data = self.data
        return encode_comparisons(
            self.tokenizer,
            examples,
            template=self.template,
            max_length=self.max_length,
            policy=RowPolicy(data.over_length, data.max_dropped_share, data.on_bad_row),
        )

    def leaving_room(self, tokens: int) -> PreferenceEncoder:
        """An encoder of prompts after which this many tokens still fit."""
        limit = None if self.max_length is None else self.max_length - tokens
        return PreferenceEncoder(self.data, self.tokenizer, max_length=limit)

    def prompts(self, examples: Sequence[Prompt]) -> tuple[list[list[int]], DataReport]:
        """Raises `DataError` as `encode_prompts`."""
        data = self.data
        ids, report = encode_prompts(
            self.tokenizer,
            examples,
            template=self.template,
            max_length=self.max_length,
            policy=RowPolicy(data.over_length, data.max_dropped_share, data.on_bad_row),
        )
        for tokens, index in zip(ids, report.indices, strict=True):
            example = examples[index]
            self.origins[tuple(tokens)] = Origin(prompt_text(example.prompt), example.row.location, example.row.values)
        return ids, report
