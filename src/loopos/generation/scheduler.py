"""Prompts into rows: what is in a cache already is not computed again.

Enters: rows, the free ones among them, and a prompt for each. Leaves: the rows filled, and the logits after each
prompt. A prompt that is asked for several times, a beginning that all prompts share (examples before the question), and
what an earlier row holds are computed once and copied. Left out: when a place is free (`engine.py`).

Rows that decode together, which completions join and leave at any time: the one loop of generation.

Enters: completions that have no token yet, one after another or many at once. Leaves: after each step the completions
that got a token; the last one says that it is done. `Engine.generate`, `Engine.stream` and a server run on it. Left
out: what a prompt and its settings may be (`engine.py`), how prompts get into rows (`placing.py`).
Letters: N rows that got logits, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loopos.generation.completions import Running
from loopos.generation.rows import Rows, common_length
from loopos.generation.sampling import Choice, History, NonFiniteLogits, choose, uniforms
from loopos.generation.settings import SamplingSettings

# A shorter beginning costs less to compute with the rest than to copy: tokens.
WORTH_COPYING = 16


def fill(rows: Rows, places: Sequence[int], prompts: Sequence[Sequence[int]], *, most_tokens: int) -> Tensor:
    """Puts prompts[i] into row places[i]; logits after each, `[N, V]`. At most `most_tokens` run in one forward."""
    leaders: dict[tuple[int, ...], int] = {}
    for place, prompt in zip(places, prompts, strict=True):
        leaders.setdefault(tuple(prompt), place)
    _begin(rows, leaders, most_tokens)
    ends = dict(_run(rows, leaders, most_tokens))
    logits = []
    for place, prompt in zip(places, prompts, strict=True):
        leader = leaders[tuple(prompt)]
        if place != leader:
            rows.copy(leader, place, len(prompt))
        logits.append(ends[leader])
    return torch.stack(logits)


def _begin(rows: Rows, leaders: dict[tuple[int, ...], int], most_tokens: int) -> None:
    """Leaves in every leader's row the part of its prompt that some row holds, never the whole: the last token must run
    for its logits.
    """
    sources = list(range(1 + max(leaders.values())))
    lengths: dict[int, int] = {}
    for prompt, place in leaders.items():
        held = [min(common_length(tokens, prompt), len(prompt) - 1) for tokens in rows.fed]
        best = max(range(len(held)), key=lambda row: (held[row], row == place))
        worth = held[best] >= WORTH_COPYING
        sources[place], lengths[place] = (best, held[best]) if worth else (place, 0)
    rows.select(sources)
    for place, length in lengths.items():
        rows.cut(place, length)
    if len(leaders) == 1:
        return
    first, *others = leaders.values()
    beginning = next(iter(leaders))
    shared = min(min(common_length(beginning, prompt), len(prompt) - 1) for prompt in leaders)
    missing = beginning[len(rows.fed[first]) : shared]
    if len(missing) >= WORTH_COPYING:
        for start in range(0, len(missing), most_tokens):
            rows.extend([first], [missing[start : start + most_tokens]])
        for place in others:
            if len(rows.fed[place]) < shared:
                rows.copy(first, place, shared)


def _run(rows: Rows, leaders: dict[tuple[int, ...], int], most_tokens: int) -> Iterator[tuple[int, Tensor]]:
    """Runs what is left of each prompt, in packs; (row, logits `[V]` after its prompt). New rows and continued ones
    run apart, since packed attention serves the new alone.
    """
    new = [(place, prompt) for prompt, place in leaders.items() if not rows.fed[place]]
    continued = [(place, prompt) for prompt, place in leaders.items() if rows.fed[place]]
    for waiting in (new, continued):
        while waiting:
            pack: list[tuple[int, Sequence[int]]] = []
            room = most_tokens
            for place, prompt in waiting:
                part = prompt[len(rows.fed[place]) :][:room]
                room -= len(part)
                pack.append((place, part))
                if not room:
                    break
            logits = rows.extend([place for place, _ in pack], [list(part) for _, part in pack])
            for (place, _), (_, prompt), end in zip(pack, waiting, logits, strict=False):
                if len(rows.fed[place]) == len(prompt):
                    yield place, end
            waiting = [(place, prompt) for place, prompt in waiting if len(rows.fed[place]) < len(prompt)]


class Model(Protocol):
    """What the loop needs of the engine that made it."""

    @property
    def prefill_tokens(self) -> int:
        """The most prompt tokens in one forward."""

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        n: int = 1,
        watch_text: bool = False,
    ) -> list[Running]:
        """n completions of every prompt, without a token yet."""

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        """What the model's forwards run under."""


class Scheduler:
    """Made by `Engine.session`. In fp32 no completion's text depends on what joins or leaves beside it."""

    def __init__(
        self,
        engine: Model,
        rows: Rows,
        *,
        with_logprobs: bool = True,
        admitted_tokens: int | None = None,
        spares_others: bool = False,
    ) -> None:
        """admitted_tokens: prompt tokens that one step takes in at most (one prompt at least), and the step after it
        decodes, so that no row waits long for its next token; None takes in all that there is room for.
        spares_others: logits without a token to choose end their own completion ("failed"), instead of raising
        `NonFiniteLogits` for all.
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
        """Rows that decode."""
        return len(self._active)

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        n: int = 1,
        watch_text: bool = False,
    ) -> list[Running]:
        """n completions of every prompt, which join the rows: the very ones that `Engine.generate` makes of the same
        arguments. Raises `UserError` as it does.
        """
        begun = self._engine.begin(prompts, settings, n=n, watch_text=watch_text)
        self.join(begun)
        return begun

    def join(self, begun: Iterable[Running]) -> None:
        """They get rows in this order, behind those that wait already."""
        self._waiting.extend(begun)

    def cancel(self, running: Running) -> None:
        """Its row is free at once. One that is done stays as it is."""
        if running.finish_reason is not None:
            return
        running.finish_reason = "cancelled"
        if running in self._waiting:
            self._waiting.remove(running)
            return
        with self._engine.without_gradients():
            self._close_gaps()

    def step(self) -> list[Running]:
        """One forward: prompts into free rows if there are both, else one token more in every row. Those that got a
        token; none when all is done.
        """
        with self._engine.without_gradients():
            begun = self._admitted()
            if begun:
                first = len(self._active)
                places = range(first, first + len(begun))
                prompts = [running.prompt for running in begun]
                logits = fill(self._rows, places, prompts, most_tokens=self._engine.prefill_tokens)
                self._active += begun
            elif self._active:
                begun, first = list(self._active), 0
                logits = self._rows.step([running.tokens[-1] for running in begun])
            else:
                return []
            self._take(logits, begun, first)
            self._close_gaps()
        return begun

    def _admitted(self) -> list[Running]:
        """The completions whose prompts run now."""
        limited = self._admitted_tokens is not None
        if limited and self._has_admitted and self._active:
            self._has_admitted = False
            return []
        begun: list[Running] = []
        room = self._admitted_tokens or 0
        while self._waiting and len(self._active) + len(begun) < len(self._rows.fed):
            room -= len(self._waiting[0].prompt)
            if limited and begun and room < 0:
                break
            begun.append(self._waiting.popleft())
        self._has_admitted = bool(begun)
        return begun

    def _take(self, logits: Tensor, chosen_for: Sequence[Running], first_row: int) -> None:
        """One token for each; logits `[N, V]`, row first_row + i of the rows belongs to chosen_for[i]."""
        groups: dict[SamplingSettings, list[int]] = {}
        if all(running.choice is chosen_for[0].choice for running in chosen_for):
            groups[chosen_for[0].choice] = list(range(len(chosen_for)))
        else:
            for place, running in enumerate(chosen_for):
                groups.setdefault(running.choice, []).append(place)
        for settings, places in groups.items():
            members = [chosen_for[place] for place in places]
            theirs = logits if len(groups) == 1 else logits[torch.tensor(places, device=logits.device)]
            drawn = None if settings.greedy else _draws(members).to(logits.device)
            for part, choice in self._chosen(theirs, settings, members, drawn):
                tokens = choice.tokens.tolist()
                logprobs = _floats(choice.logprobs, len(tokens))
                filtered = _floats(choice.filtered_logprobs, len(tokens))
                for place, token, full, left in zip(places[part], tokens, logprobs, filtered, strict=True):
                    kept = chosen_for[place].take(token, full, left)
                    if kept is not None:
                        self._rows.cut(first_row + place, kept)

    def _chosen(
        self, logits: Tensor, settings: SamplingSettings, members: Sequence[Running], drawn: Tensor | None
    ) -> Iterator[tuple[slice, Choice]]:
        """The tokens of members with the same settings, with the part of them that each choice is for. Where one has no
        token to choose, the others get theirs and it fails alone.
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
        settings: SamplingSettings,
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
        )

    def _close_gaps(self) -> None:
        """Takes the finished out: the last row moves into each gap, so that the rows that decode stay the first."""
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


def _history(members: Sequence[Running], device: torch.device) -> History:
    return History.of([running.prompt for running in members], [running.tokens for running in members], device)
