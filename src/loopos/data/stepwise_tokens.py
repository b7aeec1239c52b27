"""Tokenize answers in steps, and pack them into batches.

    prompt ids · step₁ ids · separator ids · … · stepₙ ids · separator ids

The prompt ends as generation of the assistant's turn begins. Prompt, steps and separators are tokenized each by itself,
so that the ids of the first steps do not depend on what follows: a partial answer is scored as its beginning was
trained. A step is scored at the last token of its separator, as in TRL. There are no pads and no end token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import Diagnostic
from loopos.data.piece_tokens import SegmentTokenizer
from loopos.data.preference_tokens import PROMPT_OVER, tokenized
from loopos.data.reading import DataReport
from loopos.data.stepwise import Stepwise
from loopos.data.supervised_tokens import DEFAULT_POLICY, OVER_LENGTH, RowPolicy, finish, over_length_diagnostic
from loopos.data.templates import ChatTemplate, Segment
from loopos.functional.packing import PackedLayout

UNLABELED = "no labeled step within max_length"


@dataclass(frozen=True, slots=True)
class EncodedStepwise:
    """One answer as tokens. `ends`: the position of the token that scores each step; `labels`: of each step, None where
    it was not judged.
    """

    ids: list[int]
    ends: list[int]
    labels: list[float | None]
    index: int

    @property
    def num_labels(self) -> int:
        """The number of judged steps."""
        return sum(label is not None for label in self.labels)


def encode_stepwise(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Stepwise],
    *,
    separator: str,
    template: ChatTemplate | None,
    max_length: int | None,
    policy: RowPolicy = DEFAULT_POLICY,
    needs_labels: bool = True,
) -> tuple[list[EncodedStepwise], DataReport]:
    """Tokenize prompts and the steps of their answers.

    Args:
        separator: text behind each step.
        template: the tokenizer's own if None.
        max_length: tokens of a prompt with all steps at most.
        policy: an answer over `max_length` is dropped, loses its last steps (dropped if no step, or with `needs_labels`
            no labeled step, is left), or is an error.
    Raises:
        DataError: refused messages, rows over `max_length` with "error", too many of them with "drop", or no rows left;
            each diagnostic has file and line.
    """
    report = DataReport(read=len(examples), max_length=max_length)
    rows: list[EncodedStepwise] = []
    dropped: Counter[str] = Counter()
    over: list[Diagnostic] = []
    groups_of = partial(_groups, separator)
    for index, (prompt, *steps), _, is_short in tokenized(tokenizer, examples, template, report, groups_of):
        row = _encoded(prompt, steps, examples[index].labels, index)
        if max_length is not None and len(row.ids) > max_length:
            over.append(over_length_diagnostic(examples[index].row, len(row.ids), max_length, at_least=is_short))
            if policy.over_length == "drop":
                dropped[OVER_LENGTH] += 1
                continue
            whole, row = row, _first_steps(row, max_length)
            if not row.ends:
                dropped[PROMPT_OVER] += 1
                continue
            report.cut, report.tokens_cut = report.cut + 1, report.tokens_cut + len(whole.ids) - len(row.ids)
        if needs_labels and not row.num_labels:
            dropped[UNLABELED] += 1
            continue
        rows.append(row)
    report.steps, report.labeled_steps = sum(len(row.ends) for row in rows), sum(row.num_labels for row in rows)
    report.lengths = [len(row.ids) for row in rows]
    report.tokens, report.indices = sum(report.lengths), [row.index for row in rows]
    finish(report, dropped, over, policy, "at least one row that fits")
    return rows, report


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[tuple[Sequence[int], Sequence[str]]], *, separator: str
) -> list[EncodedStepwise]:
    """As `encode_stepwise`, of prompts that are tokens already and the steps of their answers, without labels."""
    # The empty segment stands for the prompt: what follows begins no text.
    texts = [[Segment(""), *(Segment(each) for step in steps for each in (step, separator))] for _, steps in answers]
    found = []
    for index, ((prompt, _), segments) in enumerate(
        zip(answers, SegmentTokenizer(tokenizer).encode(texts), strict=True)
    ):
        pieces = segments[1:]
        steps = [[*step, *behind] for step, behind in zip(pieces[::2], pieces[1::2], strict=True)]
        found.append(_encoded(prompt, steps, [None] * len(steps), index))
    return found


def _groups(separator: str, example: Stepwise, template: ChatTemplate) -> list[list[Segment]]:
    """Segments of the prompt, then of each step with its separator. Raises `TemplateRefusal`."""
    if isinstance(example.prompt, str):
        prompt = [Segment(example.prompt, begins=True)]
    else:
        prompt = template.prompt(example.prompt, example.tools)
    return [prompt, *([Segment(step), Segment(separator)] for step in example.steps)]


def _encoded(
    prompt: Sequence[int], steps: Sequence[Sequence[int]], labels: Sequence[float | None], index: int
) -> EncodedStepwise:
    ids, ends = list(prompt), list[int]()
    for step in steps:
        ids += step
        ends.append(len(ids) - 1)
    return EncodedStepwise(ids, ends, list(labels), index)


def _first_steps(row: EncodedStepwise, length: int) -> EncodedStepwise:
    """The steps that end within `length` tokens."""
    ends = [end for end in row.ends if end < length]
    return EncodedStepwise(row.ids[: ends[-1] + 1] if ends else [], ends, row.labels[: len(ends)], row.index)


@dataclass(frozen=True)
class StepwiseBatch:
    """Answers of one forward pass, flat, with N answers and M steps.

    `ids` `[T]`; `ends` `[M]`: positions of the tokens that score the steps. `labels` `[M]` fp32: the probability that a
    step is right; `is_labeled` `[M]` bool: whether it was judged, else its label is 0. `counts` `[N]`: steps of each
    answer; `rows` `[N]`.
    """

    ids: Tensor
    layout: PackedLayout
    ends: Tensor
    labels: Tensor
    is_labeled: Tensor
    counts: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class StepwiseRows:
    """Encoded answers as `data.batches.Rows`. `soft_labels`: use probabilities as labels, else the nearer of 0 and 1; ½
    stays.
    """

    examples: Sequence[EncodedStepwise]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    soft_labels: bool = True

    @cached_property
    def lengths(self) -> list[int]:
        return [len(example.ids) for example in self.examples]

    def __call__(self, rows: Sequence[int]) -> StepwiseBatch:
        ids: list[int] = []
        ends: list[int] = []
        for row in rows:
            ends += [len(ids) + end for end in self.examples[row].ends]
            ids += self.examples[row].ids
        labels = [label for row in rows for label in self.examples[row].labels]
        return StepwiseBatch(
            ids=torch.tensor(ids, device=self.device),
            layout=PackedLayout(tuple(self.lengths[row] for row in rows), self.device),
            ends=torch.tensor(ends, device=self.device),
            labels=torch.tensor([self._label(label) for label in labels], device=self.device),
            is_labeled=torch.tensor([label is not None for label in labels], device=self.device),
            counts=tuple(len(self.examples[row].ends) for row in rows),
            rows=tuple(rows),
        )

    def _label(self, label: float | None) -> float:
        if label is None:
            return 0.0
        return label if self.soft_labels or label == 0.5 else float(label > 0.5)
