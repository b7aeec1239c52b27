"""Reasoning in steps: problem → step 1 → step 2 → … → answer, with limits on steps and tokens.

A chain is one completion with a guide: a step that is too long gets its delimiter, thinking that is too long its
closing mark, and thinking that is too short is continued (budget forcing, Muennighoff et al. 2025, s1). `search.py`
chooses between chains; `evaluation` checks answers.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.generation.completions import Completion, GrowingText, Verdict
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams


class StepMarks(Protocol):
    """The strings around steps: `opening` and `closing` around all of them, `delimiter` after each, `answer_marker`
    before the answer. All except the delimiter may be empty.
    """

    @property
    def opening(self) -> str: ...
    @property
    def closing(self) -> str: ...
    @property
    def delimiter(self) -> str: ...
    @property
    def answer_marker(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """None = no limit; all but `max_steps` in tokens. Thinking that would end before `min_thinking_tokens` is continued
    with `continuation` instead.
    """

    max_steps: int | None = None
    max_step_tokens: int | None = None
    min_thinking_tokens: int = 0
    max_thinking_tokens: int | None = None
    max_answer_tokens: int | None = None
    continuation: str = "\nWait,"

    def __post_init__(self) -> None:
        limits = (self.max_steps, self.max_step_tokens, self.max_thinking_tokens, self.max_answer_tokens)
        if any(limit is not None and limit < 1 for limit in limits):
            raise UserError(f"step limits: got {self}; expected 1 or more for each")
        if self.max_thinking_tokens is not None and self.max_thinking_tokens < self.min_thinking_tokens:
            raise UserError(
                f"max_thinking_tokens {self.max_thinking_tokens}: expected at least min_thinking_tokens "
                f"{self.min_thinking_tokens}"
            )
        if self.min_thinking_tokens and not self.continuation:
            raise UserError("min_thinking_tokens needs a continuation; got an empty one")


@dataclass(frozen=True)
class Step:
    """One step, or the answer. `text`: without its delimiter. `logprob`: sum over its `tokens`. A token across a
    boundary belongs to the part where it ends.
    """

    text: str
    logprob: float
    tokens: int


@dataclass(frozen=True)
class Chain:
    """Steps and the answer. `well_formed`: thinking was closed, so there is an answer. `finish_reason`: of the
    completion.
    """

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    text: str
    logprobs: list[float]
    forced: tuple[int, ...]
    steps: tuple[Step, ...]
    answer: Step
    well_formed: bool
    finish_reason: str


def mean_logprob(chain: Chain) -> float:
    """Mean logprob of the sampled tokens; −inf for a chain without any."""
    chosen = len(chain.token_ids) - len(chain.forced)
    return sum(chain.logprobs) / chosen if chosen else float("-inf")


def reason(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    marks: StepMarks,
    settings: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    *,
    limits: StepLimits = StepLimits(),
    n: int = 1,
) -> list[list[Chain]]:
    """n chains of every prompt. Raises `UserError` as `Engine.generate` does."""

    def guide(_prompt: int, _sample: int) -> StepGuide:
        return StepGuide(marks, limits)

    free = limits == StepLimits()
    completions = engine.generate(prompts, settings, n=n, guide=None if free else guide)
    chains = [chain_of(engine.tokenizer, completion, marks) for completion in completions]
    return [chains[first : first + n] for first in range(0, len(chains), n)]


class StepGuide:
    """Keeps one chain within its limits.

    `unfinished`: text after the last delimiter of a chain that this completion continues. `opened`: the opening has
    been written. `pause`: end the completion after its first step.
    """

    def __init__(
        self, marks: StepMarks, limits: StepLimits, *, unfinished: str = "", opened: bool = False, pause: bool = False
    ) -> None:
        assert marks.delimiter, "steps without a delimiter"
        self._marks, self._limits, self._unfinished, self._pause = marks, limits, unfinished, pause
        self._end_mark = marks.closing or marks.answer_marker
        self._thinking, self._opened = True, opened or not marks.opening
        self._step_at, self._steps = 0, 0
        self._step_tokens_at, self._answer_tokens_at = 0, 0

    def after(self, text: GrowingText, tokens: Sequence[int], *, ended: bool) -> Verdict | None:
        """Implements `Guide`."""
        num_tokens = len(tokens) - ended
        if not self._thinking:
            most = self._limits.max_answer_tokens
            enough = most is not None and num_tokens - self._answer_tokens_at >= most
            return Verdict(finish=True) if enough and not ended else None
        whole = self._unfinished + text.text
        if not self._opened and not self._open(whole):
            return None
        closed_at = self._closed_at(whole)
        if closed_at is None and not ended:
            return self._in_step(whole, num_tokens)
        if num_tokens < self._limits.min_thinking_tokens:
            cut = len(whole) if closed_at is None else closed_at
            keep = min(bisect_right(text.ends, cut - len(self._unfinished)), num_tokens)
            return Verdict(keep=keep, written=self._limits.continuation)
        self._thinking, self._answer_tokens_at = False, num_tokens
        return None

    def _open(self, whole: str) -> bool:
        """Skips the opening if the text starts with it; returns False while that is undecided."""
        opening = self._marks.opening
        if whole.startswith(opening):
            self._step_at = len(opening)
        elif opening.startswith(whole):
            return False
        self._opened = True
        return True

    def _closed_at(self, whole: str) -> int | None:
        if not self._end_mark:
            return None
        # The closing mark may start with the delimiter of the previous step.
        position = whole.find(self._end_mark, max(0, self._step_at - len(self._end_mark) + 1))
        return position if position >= 0 else None

    def _in_step(self, whole: str, num_tokens: int) -> Verdict | None:
        delimiter, limits = self._marks.delimiter, self._limits
        while (position := whole.find(delimiter, self._step_at)) >= 0:
            self._steps += bool(whole[self._step_at : position].strip())
            self._step_at, self._step_tokens_at = position + len(delimiter), num_tokens
        if self._pause and self._steps:
            return Verdict(finish=True)
        current = whole[self._step_at :]
        if self._end_mark and limits.max_thinking_tokens is not None and num_tokens >= limits.max_thinking_tokens:
            return Verdict(written=(delimiter if current else "") + self._end_mark)
        if self._end_mark.startswith(current):
            # Empty, or the start of the closing mark: no step that a limit applies to.
            return None
        if self._end_mark and limits.max_steps is not None and self._steps >= limits.max_steps:
            return Verdict(keep=self._step_tokens_at, written=self._end_mark)
        longest = limits.max_step_tokens
        if longest is not None and num_tokens - self._step_tokens_at >= longest:
            return Verdict(written=delimiter)
        return None


def chain_of(tokenizer: PreTrainedTokenizerBase, completion: Completion, marks: StepMarks) -> Chain:
    """Splits a completion into its steps and its answer."""
    whole = completion.text
    start = len(marks.opening) if marks.opening and whole.startswith(marks.opening) else 0
    end_mark = marks.closing or marks.answer_marker
    closed_at = whole.find(end_mark, start) if end_mark else -1
    thinking_end = closed_at if closed_at >= 0 else len(whole)
    texts, ends = [], []
    while start < thinking_end:
        position = whole.find(marks.delimiter, start, thinking_end)
        stop, after = (position, position + len(marks.delimiter)) if position >= 0 else (thinking_end, thinking_end)
        if whole[start:stop].strip():
            texts.append(whole[start:stop])
            ends.append(after)
        elif ends:
            ends[-1] = after
        start = after
    answer = whole[closed_at + len(end_mark) :] if closed_at >= 0 else ""
    if marks.closing and marks.answer_marker:
        answer = answer.strip().removeprefix(marks.answer_marker)
    texts.append(answer.strip())
    if closed_at < 0 and ends:
        # Thinking was not closed, so the last tokens, including the stop token, belong to the last step.
        ends[-1] = sys.maxsize
    sums, counts = _sums(tokenizer, completion, ends)
    parts = [Step(text, total, number) for text, total, number in zip(texts, sums, counts, strict=True)]
    return Chain(
        completion.prompt_index,
        completion.sample_index,
        completion.token_ids,
        whole,
        completion.logprobs,
        completion.forced,
        tuple(parts[:-1]),
        parts[-1],
        closed_at >= 0,
        completion.finish_reason,
    )


def _sums(
    tokenizer: PreTrainedTokenizerBase, completion: Completion, ends: Sequence[int]
) -> tuple[list[float], list[int]]:
    """Sum of logprobs and number of tokens of each part; `ends` are the ends in the text of all parts but the last."""
    text = GrowingText(tokenizer)
    sums, counts = [0.0] * (len(ends) + 1), [0] * (len(ends) + 1)
    for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
        text.add(token)
        part = bisect_left(ends, text.ends[-1])
        sums[part] += logprob
        counts[part] += 1
    return sums, counts
