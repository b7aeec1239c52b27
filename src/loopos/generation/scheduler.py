"""Continuous batching: the scheduler decodes many completions together and admits waiting prompts as rows become free.

`fill` prefills rows. A prompt that occurs several times, a prefix that all prompts share, and tokens that a row already
holds are computed once and copied.
Letters: N rows that got logits, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loopos.generation.completions import Running
from loopos.generation.grammars import allowed_tokens
from loopos.generation.rows import Rows, common_length
from loopos.generation.sampling import Choice, History, NonFiniteLogits, choose, uniforms
from loopos.generation.settings import SamplingParams

# Shorter prefixes (in tokens) are faster to compute than to copy.
WORTH_COPYING = 16


def fill(rows: Rows, targets: Sequence[int], prompts: Sequence[Sequence[int]], *, most_tokens: int) -> Tensor:
    """Prefills row targets[i] with prompts[i]; logits after each prompt, `[N, V]`. At most `most_tokens` per
    forward.
    """
    leaders: dict[tuple[int, ...], int] = {}
    for row, prompt in zip(targets, prompts, strict=True):
        leaders.setdefault(tuple(prompt), row)
    _begin(rows, leaders, most_tokens)
    ends = dict(_run(rows, leaders, most_tokens))
    logits = []
    for row, prompt in zip(targets, prompts, strict=True):
        leader = leaders[tuple(prompt)]
        if row != leader:
            rows.copy(leader, row, len(prompt))
        logits.append(ends[leader])
    return torch.stack(logits)


def _begin(rows: Rows, leaders: dict[tuple[int, ...], int], most_tokens: int) -> None:
    """Copies into every leader's row the longest prefix of its prompt that some row holds, but never the whole prompt:
    its last token must run to give logits.
    """
    sources = list(range(1 + max(leaders.values())))
    lengths: dict[int, int] = {}
    for prompt, row in leaders.items():
        shared = [min(common_length(tokens, prompt), len(prompt) - 1) for tokens in rows.fed]
        best = max(range(len(shared)), key=lambda source: (shared[source], source == row))
        is_worth_copying = shared[best] >= WORTH_COPYING
        sources[row], lengths[row] = (best, shared[best]) if is_worth_copying else (row, 0)
    rows.select(sources)
    for row, length in lengths.items():
        rows.cut(row, length)
    if len(leaders) == 1:
        return
    first, *others = leaders.values()
    first_prompt = next(iter(leaders))
    common = min(min(common_length(first_prompt, prompt), len(prompt) - 1) for prompt in leaders)
    missing = first_prompt[len(rows.fed[first]) : common]
    if len(missing) >= WORTH_COPYING:
        for start in range(0, len(missing), most_tokens):
            rows.extend([first], [missing[start : start + most_tokens]])
        for row in others:
            if len(rows.fed[row]) < common:
                rows.copy(first, row, common)


def _run(rows: Rows, leaders: dict[tuple[int, ...], int], most_tokens: int) -> Iterator[tuple[int, Tensor]]:
    """Runs the rest of each prompt in packed batches; yields (row, logits `[V]` after its prompt). Empty and continued
    rows run separately, because packed attention serves only empty ones.
    """
    new = [(row, prompt) for prompt, row in leaders.items() if not rows.fed[row]]
    continued = [(row, prompt) for prompt, row in leaders.items() if rows.fed[row]]
    for waiting in (new, continued):
        while waiting:
            pack: list[tuple[int, Sequence[int]]] = []
            room = most_tokens
            for row, prompt in waiting:
                part = prompt[len(rows.fed[row]) :][:room]
                room -= len(part)
                pack.append((row, part))
                if not room:
                    break
            logits = rows.extend([row for row, _ in pack], [list(part) for _, part in pack])
            for (row, _), (_, prompt), end in zip(pack, waiting, logits, strict=False):
                if len(rows.fed[row]) == len(prompt):
                    yield row, end
            waiting = [(row, prompt) for row, prompt in waiting if len(rows.fed[row]) < len(prompt)]


class Model(Protocol):
    """The interface of the engine that the scheduler uses."""

    @property
    def prefill_tokens(self) -> int:
        """The maximum number of prompt tokens per forward."""

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams],
        *,
        n: int = 1,
        watch_text: bool = False,
    ) -> list[Running]:
        """n completions of every prompt, without tokens yet."""

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        """The context in which the model's forwards run."""


class Scheduler:
    """Created by `Engine.session`. In fp32 the text of a completion does not depend on the other rows of the batch."""

    def __init__(
        self,
        engine: Model,
        rows: Rows,
        *,
        with_logprobs: bool = True,
        admitted_tokens: int | None = None,
        spares_others: bool = False,
    ) -> None:
        """admitted_tokens: maximum prompt tokens per prefill step (but at least one prompt); a decode step follows
        each, so that no row waits long for its next token. None admits all prompts that fit. spares_others: non-finite
        logits end only their own completion ("failed") instead of raising `NonFiniteLogits` for all.
        """
        self._engine, self._rows, self._with_logprobs = engine, rows, with_logprobs
        self._admitted_tokens, self._spares_others = admitted_tokens, spares_others
        self._has_admitted = False
        self._waiting: deque[Running] = deque()
        self._active: list[Running] = []

    @property
    def num_waiting(self) -> int:
        """Completions that wait for a row."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Rows that are decoding."""
        return len(self._active)

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams],
        *,
        n: int = 1,
        watch_text: bool = False,
    ) -> list[Running]:
        """Queues n completions of every prompt, equal to those of `Engine.generate` with the same arguments. Raises
        `UserError` as it does.
        """
        added = self._engine.begin(prompts, settings, n=n, watch_text=watch_text)
        self.join(added)
        return added

    def join(self, added: Iterable[Running]) -> None:
        """Queues completions in this order, after those that already wait."""
        self._waiting.extend(added)

    def cancel(self, running: Running) -> None:
        """Cancels a completion and frees its row at once; no effect on a finished one."""
        if running.finish_reason is not None:
            return
        running.finish_reason = "cancelled"
        if running in self._waiting:
            self._waiting.remove(running)
            return
        with self._engine.without_gradients():
            self._close_gaps()

    def step(self) -> list[Running]:
        """One forward: prefills waiting prompts into free rows if there are any, else decodes one token in every row.
        Returns the completions that got a token; empty when everything is finished.
        """
        with self._engine.without_gradients():
            added = self._admitted()
            if added:
                first = len(self._active)
                targets = range(first, first + len(added))
                prompts = [running.prompt for running in added]
                logits = fill(self._rows, targets, prompts, most_tokens=self._engine.prefill_tokens)
                self._active += added
            elif self._active:
                added, first = list(self._active), 0
                logits = self._rows.step([running.tokens[-1] for running in added])
            else:
                return []
            self._take(logits, added, first)
            self._close_gaps()
        return added

    def _admitted(self) -> list[Running]:
        """The completions to prefill now."""
        limited = self._admitted_tokens is not None
        if limited and self._has_admitted and self._active:
            self._has_admitted = False
            return []
        added: list[Running] = []
        room = self._admitted_tokens or 0
        while self._waiting and len(self._active) + len(added) < len(self._rows.fed):
            room -= len(self._waiting[0].prompt)
            if limited and added and room < 0:
                break
            added.append(self._waiting.popleft())
        self._has_admitted = bool(added)
        return added

    def _take(self, logits: Tensor, chosen_for: Sequence[Running], first_row: int) -> None:
        """One token for each completion. logits `[N, V]`; row first_row + i belongs to chosen_for[i]."""
        groups: dict[SamplingParams, list[int]] = {}
        if all(running.choice is chosen_for[0].choice for running in chosen_for):
            groups[chosen_for[0].choice] = list(range(len(chosen_for)))
        else:
            for row, running in enumerate(chosen_for):
                groups.setdefault(running.choice, []).append(row)
        for settings, targets in groups.items():
            members = [chosen_for[row] for row in targets]
            group_logits = logits if len(groups) == 1 else logits[torch.tensor(targets, device=logits.device)]
            drawn = None if settings.greedy else _draws(members).to(logits.device)
            for part, choice in self._chosen(group_logits, settings, members, drawn):
                tokens = choice.tokens.tolist()
                logprobs = _floats(choice.logprobs, len(tokens))
                filtered = _floats(choice.filtered_logprobs, len(tokens))
                for row, token, full, left in zip(targets[part], tokens, logprobs, filtered, strict=True):
                    length = chosen_for[row].take(token, full, left)
                    if length is not None:
                        self._rows.cut(first_row + row, length)

    def _chosen(
        self, logits: Tensor, settings: SamplingParams, members: Sequence[Running], drawn: Tensor | None
    ) -> Iterator[tuple[slice, Choice]]:
        """The tokens of members with the same settings, with the slice of members that each choice is for. If one has
        non-finite logits, the others still get tokens and only that one fails.
        """
        whole = slice(0, len(members))
        try:
            yield whole, self._choose(logits, settings, members, drawn, whole)
            return
        except NonFiniteLogits:
            if not self._spares_others:
                raise
        for index, running in enumerate(members):
            part = slice(index, index + 1)
            try:
                choice = self._choose(logits, settings, members, drawn, part)
            except NonFiniteLogits:
                running.finish_reason = "failed"
            else:
                yield part, choice

    def _choose(
        self,
        logits: Tensor,
        settings: SamplingParams,
        members: Sequence[Running],
        drawn: Tensor | None,
        part: slice,
    ) -> Choice:
        return choose(
            logits[part],
            settings,
            history=_history(members[part], logits.device) if settings.needs_history else None,
            uniforms=None if drawn is None else drawn[part],
            with_logprobs=self._with_logprobs,
            allowed=_allowed(members[part], logits) if settings.constrained else None,
        )

    def _close_gaps(self) -> None:
        """Removes finished completions; the last row moves into each gap, so that active rows stay contiguous."""
        active, rows = self._active, self._rows
        for index in range(len(active) - 1, -1, -1):
            if active[index].finish_reason is None:
                continue
            last = active.pop()
            if last.finish_reason is None:
                rows.copy(len(active), index, len(rows.fed[len(active)]))
                active[index] = last


def _floats(values: Tensor | None, number: int) -> Sequence[float | None]:
    return [None] * number if values is None else values.tolist()


def _draws(members: Sequence[Running]) -> Tensor:
    """The next uniform number of each, `[B]`."""
    numbers = uniforms([running.key for running in members], [running.draws for running in members])
    for running in members:
        running.draws += 1
    return numbers


def _allowed(members: Sequence[Running], logits: Tensor) -> Tensor:
    return allowed_tokens([running.grammar for running in members], logits.shape[1], logits.device)


def _history(members: Sequence[Running], device: torch.device) -> History:
    return History.of([running.prompt for running in members], [running.tokens for running in members], device)
