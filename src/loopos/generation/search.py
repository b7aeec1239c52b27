"""Search over chains of reasoning: self-consistency, best-of-n, and beam search over steps.

`steps.py` makes a single chain; `beam.py` searches over tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loopos.config.diagnostics import UserError
from loopos.functional.comparing import plurality
from loopos.generation.completions import Completion, FinishReason, decoded
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.generation.steps import Chain, StepGuide, StepLimits, StepMarks, chain_of, mean_logprob, reason

Scores = Callable[[Sequence[Chain]], Sequence[float]]
"""A number for each of several chains, finished or not; higher is better. They come together, so that a model can score
them in few passes.
"""


def mean_logprobs(chains: Sequence[Chain]) -> list[float]:
    """`mean_logprob` of each chain."""
    return [mean_logprob(chain) for chain in chains]


@dataclass(frozen=True)
class Vote:
    """`answer`: the most frequent answer, normalized; None if no chain has one. `fraction`: of all chains with that
    answer, a confidence. `counts`: votes of each answer.
    """

    answer: str | None
    fraction: float
    counts: dict[str, int]
    chains: list[Chain]


def self_consistency(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    marks: StepMarks,
    settings: SamplingParams,
    *,
    n: int,
    normalize: Callable[[str], str | None] = str.strip,
    limits: StepLimits = StepLimits(),
) -> list[Vote]:
    """n sampled chains of every prompt and the majority of their answers (Wang et al. 2023). Chains that never closed
    their thinking, or whose answer normalizes to None, do not vote; of equal counts the first answer wins.
    """
    _check_sampling(settings, n)
    return [vote(chains, normalize) for chains in reason(engine, prompts, marks, settings, limits=limits, n=n)]


def vote(chains: Sequence[Chain], normalize: Callable[[str], str | None] = str.strip) -> Vote:
    """The majority of these chains' answers."""
    answers = [normalize(chain.answer.text) if chain.well_formed else None for chain in chains]
    counts = Counter(answer for answer in answers if answer is not None)
    winner = plurality(answers)
    if winner is None:
        return Vote(None, 0.0, {}, list(chains))
    index, fraction = winner
    return Vote(answers[index], fraction, dict(counts), list(chains))


def best_of_n(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    marks: StepMarks,
    settings: SamplingParams,
    *,
    n: int,
    scores: Scores = mean_logprobs,
    limits: StepLimits = StepLimits(),
) -> list[list[Chain]]:
    """n sampled chains of every prompt, best first."""
    _check_sampling(settings, n)
    sampled = reason(engine, prompts, marks, settings, limits=limits, n=n)
    found = iter(scores([chain for chains in sampled for chain in chains]))
    ranked = [sorted(((next(found), chain) for chain in chains), key=_score, reverse=True) for chains in sampled]
    return [[chain for _, chain in chains] for chains in ranked]


def _score(scored: tuple[float, Chain]) -> float:
    return scored[0]


def _check_sampling(settings: SamplingParams, n: int) -> None:
    if n > 1 and settings.greedy:
        raise UserError(f"{n} chains at temperature 0 are identical; set a temperature above 0")


@dataclass(frozen=True)
class _Beam:
    """A partial chain. `finished`: it has an answer or must not continue."""

    prompt_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    forced: tuple[int, ...] = ()
    finish_reason: FinishReason = "guide"
    finished: bool = False

    @property
    def key(self) -> tuple[int, tuple[int, ...], FinishReason]:
        """What the chain, and so its score, depends on."""
        return self.prompt_index, self.token_ids, self.finish_reason


def step_beam_search(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    marks: StepMarks,
    settings: SamplingParams,
    *,
    beams: int,
    candidates: int,
    scores: Scores = mean_logprobs,
    limits: StepLimits = StepLimits(max_steps=32),
) -> list[list[Chain]]:
    """Chains of every prompt, best first: each of b beams samples k next steps, and the b best of all continue (Xie et
    al. 2023). A beam that has not closed its thinking after `limits.max_steps` steps is closed and answers; of the
    other limits only those on tokens per step and per answer apply.
    """
    _check_sampling(settings, candidates)
    if beams < 1 or limits.max_steps is None:
        raise UserError(f"beams {beams}, max_steps {limits.max_steps}: expected 1 or more of each")
    pools = [[_Beam(index)] for index in range(len(prompts))]
    one_step = replace(limits, max_steps=None, min_thinking_tokens=0, max_thinking_tokens=None)
    known: dict[tuple[int, tuple[int, ...], FinishReason], float] = {}

    def best(candidates: Sequence[_Beam]) -> list[list[_Beam]]:
        """The best beams of each prompt; only those that are new are scored."""
        new = {beam.key: beam for beam in candidates if beam.key not in known}
        found = scores([_chain(engine, beam, marks) for beam in new.values()]) if new else []
        known.update(zip(new, found, strict=True))
        distinct: list[dict[tuple[int, ...], _Beam]] = [{} for _ in prompts]
        for beam in candidates:
            distinct[beam.prompt_index][beam.token_ids] = beam
        return [sorted(pool.values(), key=lambda beam: -known[beam.key])[:beams] for pool in distinct]

    with engine.reuse_prefixes():
        for _ in range(limits.max_steps):
            going = [beam for pool in pools for beam in pool if not beam.finished]
            if not going:
                break
            longer = _extended(engine, prompts, going, marks, settings, candidates=candidates, limits=one_step)
            pools = best([beam for pool in pools for beam in pool if beam.finished] + longer)
        going = [_closed(engine, beam, marks) for pool in pools for beam in pool if not beam.finished]
        if going:
            answered = _answered(engine, prompts, going, settings, limits.max_answer_tokens)
            pools = best([beam for pool in pools for beam in pool if beam.finished] + answered)
    return [
        [replace(_chain(engine, beam, marks), sample_index=position) for position, beam in enumerate(pool)]
        for pool in pools
    ]


def _extended(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    going: Sequence[_Beam],
    marks: StepMarks,
    settings: SamplingParams,
    *,
    candidates: int,
    limits: StepLimits,
) -> list[_Beam]:
    """k beams with one more step for every beam."""
    open_text = []
    for beam in going:
        text = decoded(engine.tokenizer, beam.token_ids)
        open_text.append(text[text.rfind(marks.delimiter) + len(marks.delimiter) :] if beam.token_ids else "")

    def guide(index: int, _sample: int) -> StepGuide:
        return StepGuide(marks, limits, unfinished=open_text[index], opened=bool(going[index].token_ids), pause=True)

    added = engine.generate(*_continued(prompts, going, settings), n=candidates, guide=guide)
    longer = [_extended_by(going[completion.prompt_index], completion) for completion in added]
    return [
        replace(
            beam,
            finished=beam.finish_reason != "guide"
            or len(beam.token_ids) >= settings.max_new_tokens
            or _chain(engine, beam, marks).well_formed,
        )
        for beam in longer
    ]


def _answered(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    going: Sequence[_Beam],
    settings: SamplingParams,
    most_tokens: int | None,
) -> list[_Beam]:
    """The beams with the text after their closing."""
    starts, each = _continued(prompts, going, settings)
    if most_tokens is not None:
        each = [replace(setting, max_new_tokens=min(setting.max_new_tokens, most_tokens)) for setting in each]
    return [_extended_by(going[added.prompt_index], added) for added in engine.generate(starts, each)]


def _continued(
    prompts: Sequence[Sequence[int]], going: Sequence[_Beam], settings: SamplingParams
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that end with the beams' tokens, and settings with the remaining tokens of each."""
    starts = [[*prompts[beam.prompt_index], *beam.token_ids] for beam in going]
    left = [max(1, settings.max_new_tokens - len(beam.token_ids)) for beam in going]
    return starts, [replace(settings, max_new_tokens=most) for most in left]


def _closed(engine: Engine, beam: _Beam, marks: StepMarks) -> _Beam:
    """The beam with the closing mark appended."""
    written = engine.tokenizer.encode(marks.closing or marks.answer_marker, add_special_tokens=False)
    start = len(beam.token_ids)
    return replace(
        beam,
        token_ids=(*beam.token_ids, *written),
        logprobs=(*beam.logprobs, *[0.0] * len(written)),
        forced=(*beam.forced, *range(start, start + len(written))),
    )


def _extended_by(beam: _Beam, added: Completion) -> _Beam:
    start = len(beam.token_ids)
    return replace(
        beam,
        token_ids=(*beam.token_ids, *added.token_ids),
        logprobs=(*beam.logprobs, *added.logprobs),
        forced=(*beam.forced, *(start + index for index in added.forced)),
        finish_reason=added.finish_reason,
    )


def _chain(engine: Engine, beam: _Beam, marks: StepMarks) -> Chain:
    ids = list(beam.token_ids)
    text = decoded(engine.tokenizer, ids[:-1] if beam.finish_reason == "stop" else ids)
    completion = Completion(beam.prompt_index, 0, ids, text, list(beam.logprobs), None, beam.forced, beam.finish_reason)
    return chain_of(engine.tokenizer, completion, marks)
