"""Self-consistency, best-of-n and step beam search, on models with known probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from pico_language_models import Scripted
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.generation.engine import Engine
from loopos.generation.search import best_of_n, self_consistency, step_beam_search, vote
from loopos.generation.settings import SamplingParams
from loopos.generation.steps import Chain, Step, StepLimits

SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=30)


@dataclass(frozen=True)
class Marks:
    opening: str = ""
    closing: str = ">"
    delimiter: str = "\n"
    answer_marker: str = ""


def chain_model(tokenizer: PreTrainedTokenizerBase, chances: dict[str, dict[str, float]]) -> PreTrainedModel:
    """A Markov chain over characters; "." is the end token."""
    logits = torch.full((400, 400), -40.0)
    for before, after in chances.items():
        for character, chance in after.items():
            logits[identifier(tokenizer, before), identifier(tokenizer, character)] = torch.tensor(chance).log()
    return Scripted(logits, by_position=False)


def identifier(tokenizer: PreTrainedTokenizerBase, character: str) -> int:
    [found] = [2] if character == "." else tokenizer.encode(character, add_special_tokens=False)
    return found


def answered(text: str, *, well_formed: bool = True) -> Chain:
    return Chain(0, 0, [1], text, [0.0], (), (), Step(text, 0.0, 1), well_formed, "stop")


def test_a_vote_by_hand() -> None:
    chains = [answered("7"), answered("8 "), answered(" 8"), answered("none"), answered("7", well_formed=False)]
    got = vote(chains, lambda text: None if text == "none" else text.strip())
    assert (got.answer, got.fraction, got.counts) == ("8", 0.4, {"7": 1, "8": 2})
    tied = vote([answered("b"), answered("a"), answered("a"), answered("b")])
    assert (tied.answer, tied.fraction) == ("b", 0.5)
    nothing = vote([answered("x", well_formed=False)])
    assert (nothing.answer, nothing.fraction, nothing.counts) == (None, 0.0, {})


def test_self_consistency_finds_the_likelier_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    """The answer is 3 with chance 0.7: of 300 votes between 0.62 and 0.78, three standard errors."""
    model = chain_model(tokenizer, {"1": {">": 1.0}, ">": {"3": 0.7, "4": 0.3}, "3": {".": 1.0}, "4": {".": 1.0}})
    prompt = [identifier(tokenizer, "1")]
    [got] = self_consistency(Engine(model, tokenizer, max_rows=128), [prompt], Marks(), SAMPLED, n=300)
    assert got.answer == "3"
    assert 0.62 < got.fraction < 0.78
    assert got.counts["3"] + got.counts["4"] == len(got.chains) == 300


def by_answer(chains: Sequence[Chain]) -> list[float]:
    return [float(chain.answer.text) for chain in chains]


def test_best_of_n_ranks_by_the_score(tokenizer: PreTrainedTokenizerBase) -> None:
    model = chain_model(
        tokenizer,
        {"1": {">": 1.0}, ">": {"3": 0.8, "4": 0.15, "5": 0.05}, "3": {".": 1.0}, "4": {".": 1.0}, "5": {".": 1.0}},
    )
    engine, prompt = Engine(model, tokenizer), [identifier(tokenizer, "1")]
    [by_number] = best_of_n(engine, [prompt], Marks(), SAMPLED, n=100, scores=by_answer)
    assert [chain.answer.text for chain in by_number] == sorted((c.answer.text for c in by_number), reverse=True)
    assert by_number[0].answer.text == "5"
    [by_logprob] = best_of_n(engine, [prompt], Marks(), SAMPLED, n=100)
    assert by_logprob[0].answer.text == "3"


STEPS = {
    "0": {"1": 0.5, "2": 0.5},
    "1": {"\n": 1.0},
    "2": {"\n": 1.0},
    "\n": {"1": 0.4, "2": 0.4, ">": 0.2},
    ">": {"9": 1.0},
    "9": {".": 1.0},
}


def twos(chain: Chain) -> float:
    return chain.text.count("2") - chain.text.count("1")


def test_step_beams_keep_the_best_steps(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Engine(chain_model(tokenizer, STEPS), tokenizer, max_rows=16)
    prompts = [[identifier(tokenizer, "0")], [identifier(tokenizer, "\n")]]
    ranked = step_beam_search(
        engine,
        prompts,
        Marks(),
        SAMPLED,
        beams=2,
        candidates=8,
        scores=lambda chains: list(map(twos, chains)),
        limits=StepLimits(max_steps=4),
    )
    assert [chains[0].prompt_index for chains in ranked] == [0, 1]
    for chains in ranked:
        assert 1 <= len(chains) <= 2
        best = chains[0]
        assert best.text == "2\n2\n2\n2\n>9"
        assert [step.text for step in best.steps] == ["2"] * 4
        # The closing after the last step was forced, not sampled.
        assert (best.answer.text, best.forced, best.finish_reason) == ("9", (8,), "stop")
        assert twos(best) >= twos(chains[-1])


def test_step_beams_are_scored_together_and_each_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """One call a step for all prompts; a beam that waits, finished, is not scored again."""
    engine = Engine(chain_model(tokenizer, STEPS), tokenizer, max_rows=16)
    calls: list[list[tuple[int, str]]] = []

    def scores(chains: Sequence[Chain]) -> list[float]:
        calls.append([(chain.prompt_index, chain.text) for chain in chains])
        return [twos(chain) for chain in chains]

    prompts = [[identifier(tokenizer, "0")], [identifier(tokenizer, "\n")]]
    limits = StepLimits(max_steps=3)
    step_beam_search(engine, prompts, Marks(), SAMPLED, beams=3, candidates=8, scores=scores, limits=limits)
    assert 3 <= len(calls) <= 4
    assert {index for index, _ in calls[0]} == {0, 1}
    finished = [each for call in calls[:-1] for each in call if ">9" in each[1]]
    assert finished
    assert len(finished) == len(set(finished))


def test_a_beam_that_answers_early_stays_in_the_race(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Engine(chain_model(tokenizer, STEPS), tokenizer)
    [chains] = step_beam_search(
        engine, [[identifier(tokenizer, "0")]], Marks(), SAMPLED, beams=3, candidates=20,
        scores=lambda chains: [-len(chain.steps) for chain in chains], limits=StepLimits(max_steps=5),
    )  # fmt: skip
    assert chains[0].text in ("1\n>9", "2\n>9")
    assert chains[0].forced == ()


def test_sampling_several_greedy_chains_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="temperature"):
        self_consistency(Engine(llama, tokenizer), [[5]], Marks(), SamplingParams(), n=2)
