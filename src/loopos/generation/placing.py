"""Prompts into rows: what is in a cache already is not computed again.

Enters: rows, the free ones among them, and a prompt for each. Leaves: the rows filled, and the logits after each
prompt. A prompt that is asked for several times, a beginning that all prompts share (examples before the question), and
what an earlier row holds are computed once and copied. Left out: when a place is free (`engine.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loopos.generation.rows import Rows, common_length

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
