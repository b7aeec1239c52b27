"""Choosing between chains of reasoning: votes, the best of several, and a beam search over steps.

Enters: an engine, prompts, the marks of the step format, and what tells good chains from bad. Leaves: an answer with
its share of the votes, or chains ranked. Left out: a single chain (`steps.py`), beams over tokens (`beam.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loopos.config.diagnostics import UserError
from loopos.functional.comparing import plurality
from loopos.generation.completions import Completion, FinishReason, decoded
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingSettings
from loopos.generation.steps import Chain, StepGuide, StepLimits, StepMarks, chain_of, mean_logprob, reason

Score = Callable[[Chain], float]


@dataclass(frozen=True)
class Vote:
    """`answer`: what most chains say, normalised, or None where none of them has an answer; `share`: the part of all
    chains that say so, a confidence; `counts`: votes of each answer.
    """

    answer: str | None
    share: float
    counts: dict[str, int]
    chains: list[Chain]


def self_consistency(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    marks: StepMarks,
    settings: SamplingSettings,
    *,
    n: int,
    normalise: Callable[[str], str | None] = str.strip,
    limits: StepLimits = StepLimits(),
) -> list[Vote]:
    """n sampled chains of every prompt and the majority of their answers (Wang et al. 2023). A chain that never closed
    its thinking, or whose answer normalises to None, has no vote; of equal counts the answer that came first wins.
    """
    _check_sampling(settings, n)
    return [vote(chains, normalise) for chains in reason(engine, prompts, marks, settings, limits=limits, n=n)]


def vote(chains: Sequence[Chain], normalise: Callable[[str], str | None] = str.strip) -> Vote:
    """The majority of these chains' answers."""
    answers = [normalise(chain.answer.text) if chain.well_formed else None for chain in chains]
    counts = Counter(answer for answer in answers if answer is not None)
    winner = plurality(answers)
    if winner is None:
        return Vote(None, 0.0, {}, list(chains))
    place, share = winner
    return Vote(answers[place], share, dict(counts), list(chains))


def best_of_n(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    marks: StepMarks,
    settings: SamplingSettings,
    *,
    n: int,
    score: Score = mean_logprob,
    limits: StepLimits = StepLimits(),
) -> list[list[Chain]]:
    """n sampled chains of every prompt, best first."""
    _check_sampling(settings, n)
    sampled = reason(engine, prompts, marks, settings, limits=limits, n=n)
    return [sorted(chains, key=score, reverse=True) for chains in sampled]


def _check_sampling(settings: SamplingSettings, n: int) -> None:
    if n > 1 and settings.greedy:
        raise UserError(f"{n} chains at temperature 0 are all the same: give a temperature above 0")


@dataclass(frozen=True)
class _Beam:
    """A chain in the making. `done`: it has its answer, or may not go on."""

    prompt_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    actual: tuple[int, ...] = ()
    finish_reason: FinishReason = "guide"
    done: bool = False


def step_beam_search(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    marks: StepMarks,
    settings: SamplingSettings,
    *,
    beams: int,
    candidates: int,
    score: Score = mean_logprob,
    limits: StepLimits = StepLimits(max_steps=32),
) -> list[list[Chain]]:
    """Chains of every prompt, best first: from each of b beams k next steps are sampled, and the b best of all go on
    (Xie et al. 2023). A beam that has not closed its thinking after `limits.max_steps` steps has it closed and answers;
    of the other limits those on tokens of a step and of the answer count.
    """
    _check_sampling(settings, candidates)
    if beams < 1 or limits.max_steps is None:
        raise UserError(f"beams {beams}, max_steps {limits.max_steps}: expected 1 or more of each")
    kept = [[_Beam(index)] for index in range(len(prompts))]
    one_step = replace(limits, max_steps=None, min_thinking_tokens=0, max_thinking_tokens=None)

    def best(pool: Sequence[_Beam]) -> list[_Beam]:
        distinct = {beam.token_ids: beam for beam in pool}.values()
        return sorted(distinct, key=lambda beam: -score(_chain(engine, beam, marks)))[:beams]

    with engine.prefixes_kept():
        for _ in range(limits.max_steps):
            going = [beam for found in kept for beam in found if not beam.done]
            if not going:
                break
            longer = _extended(engine, prompts, going, marks, settings, candidates=candidates, limits=one_step)
            kept = [
                best([beam for beam in found if beam.done] + [beam for beam in longer if beam.prompt_index == index])
                for index, found in enumerate(kept)
            ]
        going = [_closed(engine, beam, marks) for found in kept for beam in found if not beam.done]
        if going:
            answered = _answered(engine, prompts, going, settings, limits.max_answer_tokens)
            kept = [
                best([beam for beam in found if beam.done] + [beam for beam in answered if beam.prompt_index == index])
                for index, found in enumerate(kept)
            ]
    return [
        [replace(_chain(engine, beam, marks), sample_index=position) for position, beam in enumerate(found)]
        for found in kept
    ]


def _extended(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    going: Sequence[_Beam],
    marks: StepMarks,
    settings: SamplingSettings,
    *,
    candidates: int,
    limits: StepLimits,
) -> list[_Beam]:
    """k beams with one more step for every beam."""
    held = []
    for beam in going:
        text = decoded(engine.tokenizer, beam.token_ids)
        held.append(text[text.rfind(marks.delimiter) + len(marks.delimiter) :] if beam.token_ids else "")

    def guide(index: int, _sample: int) -> StepGuide:
        return StepGuide(marks, limits, held=held[index], opened=bool(going[index].token_ids), pause=True)

    added = engine.generate(*_continued(prompts, going, settings), n=candidates, guide=guide)
    longer = [_joined(going[completion.prompt_index], completion) for completion in added]
    return [
        replace(
            beam,
            done=beam.finish_reason != "guide"
            or len(beam.token_ids) >= settings.max_new_tokens
            or _chain(engine, beam, marks).well_formed,
        )
        for beam in longer
    ]


def _answered(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    going: Sequence[_Beam],
    settings: SamplingSettings,
    most_tokens: int | None,
) -> list[_Beam]:
    """The beams with what follows their closing."""
    starts, each = _continued(prompts, going, settings)
    if most_tokens is not None:
        each = [replace(setting, max_new_tokens=min(setting.max_new_tokens, most_tokens)) for setting in each]
    return [_joined(going[added.prompt_index], added) for added in engine.generate(starts, each)]


def _continued(
    prompts: Sequence[Sequence[int]], going: Sequence[_Beam], settings: SamplingSettings
) -> tuple[list[list[int]], list[SamplingSettings]]:
    """Prompts that end with the beams' tokens, and settings for the tokens that are left to each."""
    starts = [[*prompts[beam.prompt_index], *beam.token_ids] for beam in going]
    left = [max(1, settings.max_new_tokens - len(beam.token_ids)) for beam in going]
    return starts, [replace(settings, max_new_tokens=most) for most in left]


def _closed(engine: Engine, beam: _Beam, marks: StepMarks) -> _Beam:
    """The beam with the end of its thinking written."""
    written = engine.tokenizer.encode(marks.closing or marks.answer_marker, add_special_tokens=False)
    start = len(beam.token_ids)
    return replace(
        beam,
        token_ids=(*beam.token_ids, *written),
        logprobs=(*beam.logprobs, *[0.0] * len(written)),
        actual=(*beam.actual, *range(start, start + len(written))),
    )


def _joined(beam: _Beam, added: Completion) -> _Beam:
    start = len(beam.token_ids)
    return replace(
        beam,
        token_ids=(*beam.token_ids, *added.token_ids),
        logprobs=(*beam.logprobs, *added.logprobs),
        actual=(*beam.actual, *(start + place for place in added.actual)),
        finish_reason=added.finish_reason,
    )


def _chain(engine: Engine, beam: _Beam, marks: StepMarks) -> Chain:
    ids = list(beam.token_ids)
    text = decoded(engine.tokenizer, ids[:-1] if beam.finish_reason == "stop token" else ids)
    completion = Completion(beam.prompt_index, 0, ids, text, list(beam.logprobs), None, beam.actual, beam.finish_reason)
    return chain_of(engine.tokenizer, completion, marks)
