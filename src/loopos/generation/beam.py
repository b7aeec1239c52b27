"""Beam search: the completions with the highest length-penalized logprob that a search of fixed width finds.

Candidates, finished beams and the end of the search follow transformers' `generate(num_beams=...)`, so that the tokens
are equal. Sampling in beams and stop strings are not supported.
Letters: P prompts searched together, b beams of each, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.generation.completions import decoded
from loopos.generation.engine import Engine
from loopos.generation.rows import Rows
from loopos.generation.scheduler import fill


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """`num_beams`: width of the search. `length_penalty`: the sum of logprobs is divided by length to this power; above
    0 favors long completions. `early_stopping`: True stops with as many finished completions as beams; False continues
    while a running beam of the current length could be better; None while one of any allowed length could.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | None = False
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop_at_end: bool = True

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"num_beams {self.num_beams} and max_new_tokens {self.max_new_tokens}: expected 1 or more of each"
            )


@dataclass(frozen=True)
class Beam:
    """A completion of the search. `score`: sum of logprobs / length ** length_penalty."""

    token_ids: list[int]
    text: str
    score: float


@dataclass
class _Search:
    """The state of one prompt: b running beams and at most b finished ones, best first."""

    limit: int
    running: list[tuple[float, list[int]]]
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    improvable: bool = True
    is_finished: bool = False


def beam_search(engine: Engine, prompts: Sequence[Sequence[int]], settings: BeamSettings) -> list[list[Beam]]:
    """At most `num_beams` beams of every prompt, best first. As many prompts as fit are searched together.

    Raises `UserError` if the beams of one prompt exceed the engine's rows, and for prompts that the model cannot take.
    """
    if settings.num_beams > engine.max_rows:
        raise UserError(
            f"num_beams: got {settings.num_beams}; expected at most {engine.max_rows}, the rows of the engine"
        )
    together = engine.max_rows // settings.num_beams
    found: list[list[Beam]] = []
    with engine.serving(settings.num_beams * len(prompts)):
        for first in range(0, len(prompts), together):
            for search in _search(engine, prompts[first : first + together], settings):
                stop_ids = _stop_ids(engine, settings)
                found.append(
                    [
                        Beam(ids, decoded(engine.tokenizer, ids[:-1] if ids[-1] in stop_ids else ids), score)
                        for score, ids in search.finished
                    ]
                )
    return found


def _stop_ids(engine: Engine, settings: BeamSettings) -> frozenset[int]:
    return frozenset((*settings.stop_token_ids, *(engine.end_tokens if settings.stop_at_end else ())))


def _search(engine: Engine, prompts: Sequence[Sequence[int]], settings: BeamSettings) -> list[_Search]:
    width, stop_ids = settings.num_beams, _stop_ids(engine, settings)
    searches = [_Search(engine.limit(prompt, settings.max_new_tokens), [(0.0, [])] * width) for prompt in prompts]
    rows = engine.rows(width * len(prompts))
    indices = range(width * len(prompts))
    repeated = [prompt for prompt in prompts for _ in range(width)]
    logits = fill(rows, indices, repeated, most_tokens=engine.prefill_tokens)
    while True:
        best = _best_continuations(logits, searches, max(2, 1 + len(stop_ids)) * width)
        sources = [
            width * number + beam
            for number, (search, candidates) in enumerate(zip(searches, best, strict=True))
            for beam in _advance(search, candidates, settings, stop_ids)
        ]
        if all(search.is_finished for search in searches):
            return searches
        logits = _step(rows, sources, [ids[-1] for search in searches for _, ids in search.running])


def _step(rows: Rows, sources: Sequence[int], tokens: Sequence[int]) -> Tensor:
    rows.select(sources)
    return rows.step(tokens)


def _best_continuations(
    logits: Tensor, searches: Sequence[_Search], num_candidates: int
) -> list[list[tuple[float, int, int]]]:
    """(sum of logprobs, beam, token) of the best continuations of each prompt's beams, best first. logits `[P · b, V]`.
    Before the first token all beams are equal, so only the first counts.
    """
    scores = logits.float().log_softmax(-1).view(len(searches), -1, logits.shape[1])
    before = torch.tensor([[score for score, _ in search.running] for search in searches], device=logits.device)
    if not searches[0].running[0][1]:
        before[:, 1:] = -1e9
    values, indices = (scores + before[..., None]).flatten(1).topk(num_candidates)
    beams, tokens = (indices // logits.shape[1]).tolist(), (indices % logits.shape[1]).tolist()
    return [list(zip(*row, strict=True)) for row in zip(values.tolist(), beams, tokens, strict=True)]


def _advance(
    search: _Search, candidates: Sequence[tuple[float, int, int]], settings: BeamSettings, stop_ids: frozenset[int]
) -> list[int]:
    """One step of a prompt's search; returns the beam that each new running beam continues."""
    width = settings.num_beams
    if search.is_finished:
        return list(range(width))
    length = len(search.running[0][1]) + 1
    ended = [token in stop_ids or length >= search.limit for _, _, token in candidates]
    # Only the first b candidates may finish; the others keep b beams running.
    full = len(search.finished) == width
    for (score, beam, token), ends in list(zip(candidates, ended, strict=True))[:width]:
        if ends and search.improvable and not (full and settings.early_stopping):
            penalized = score / length**settings.length_penalty
            search.finished.append((penalized, [*search.running[beam][1], token]))
    search.finished = sorted(search.finished, key=lambda found: -found[0])[:width]
    going = sorted(zip(ended, candidates, strict=True), key=lambda pair: pair[0])[:width]
    before, search.running = search.running, []
    for _, (score, beam, token) in going:
        search.running.append((score, [*before[beam][1], token]))
    full = len(search.finished) == width
    reach = search.limit if settings.early_stopping is None and settings.length_penalty > 0 else length
    if full and search.running[0][0] / reach**settings.length_penalty <= search.finished[-1][0]:
        search.improvable = False
    search.is_finished = not search.improvable or all(ended) or (full and settings.early_stopping is True)
    return [beam for _, (_, beam, _) in going]
