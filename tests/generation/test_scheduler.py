"""Sessions: completions join and leave at any time without changing the others."""

from __future__ import annotations

import math

import pytest
import torch
from pico_language_models import VOCABULARY, Scripted, mixed_prompts, pico_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.generation.completions import Running
from loopos.generation.engine import Engine
from loopos.generation.sampling import NonFiniteLogits
from loopos.generation.scheduler import Scheduler
from loopos.generation.settings import SamplingParams

SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=9, seed=11)


def finished(session: Scheduler) -> int:
    """Runs to the end; the number of steps."""
    steps = 0
    while session.step():
        steps += 1
    return steps


@pytest.mark.parametrize("path", ["cached", "plain"])
@pytest.mark.parametrize("admitted", [None, 1])
def test_a_completion_does_not_depend_on_when_it_joins(
    path: str, admitted: int | None, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = mixed_prompts(7)
    engine = Engine(llama, tokenizer, max_rows=3)
    expected = [engine.generate([prompt], SAMPLED, n=2) for prompt in prompts]
    engine.path = path
    with engine.session(admitted_tokens=admitted) as session:
        handles: list[list[Running]] = []
        for prompt in prompts:
            handles.append(session.add([prompt], SAMPLED, n=2))
            session.step()
            session.step()
        assert session.num_active == 3
        assert session.num_waiting > 0
        finished(session)
        assert (session.num_active, session.num_waiting) == (0, 0)
    found = [[running.completion() for running in pair] for pair in handles]
    assert [[c.token_ids for c in pair] for pair in found] == [[c.token_ids for c in pair] for pair in expected]
    assert [[c.text for c in pair] for pair in found] == [[c.text for c in pair] for pair in expected]


def test_a_finished_request_frees_its_row_and_the_others_continue(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = mixed_prompts(5)
    settings = SamplingParams(temperature=1.0, max_new_tokens=12, stop_at_end=False, seed=2)
    engine = Engine(llama, tokenizer, max_rows=4)
    expected = [completion.token_ids for completion in engine.generate(prompts, settings)]
    with engine.session() as session:
        handles = session.add(prompts, settings)
        for _ in range(3):
            session.step()
        session.cancel(handles[0])
        assert (session.num_active, session.num_waiting) == (3, 1)
        session.cancel(handles[4])
        assert (session.num_active, session.num_waiting) == (3, 0)
        finished(session)
        session.cancel(handles[1])
    assert [running.finish_reason for running in handles] == ["cancelled", "length", "length", "length", "cancelled"]
    assert [running.tokens for running in handles[1:4]] == expected[1:4]
    assert len(handles[0].tokens) == 3
    assert handles[4].tokens == []


def test_prompts_that_come_in_do_not_stop_the_rows(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of five prompts of 20 tokens, at most 40 tokens are admitted per step; a decode step follows each prefill step."""
    engine = Engine(llama, tokenizer, max_rows=8)
    prompts = [[5 + index] * 20 for index in range(5)]
    with engine.session(admitted_tokens=40) as session:
        session.add(prompts, SamplingParams(max_new_tokens=20, stop_at_end=False))
        assert [len(session.step()) for _ in range(6)] == [2, 2, 2, 4, 1, 5]
    with engine.session() as session:
        session.add(prompts, SamplingParams(max_new_tokens=20, stop_at_end=False))
        assert len(session.step()) == 5


def test_non_finite_logits_fail_only_their_completion(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = mixed_prompts(1)[0]
    # No token is left.
    bad = SamplingParams(logit_bias=dict.fromkeys(range(VOCABULARY), -math.inf), max_new_tokens=6)
    engine = Engine(llama, tokenizer)
    with engine.session(spares_others=True) as session:
        failing, fine = session.add([prompt, prompt], [bad, SAMPLED])
        finished(session)
    assert failing.finish_reason == "failed"
    assert fine.completion().token_ids == engine.generate([prompt], SAMPLED)[0].token_ids
    with engine.session() as session:
        session.add([prompt], bad)
        with pytest.raises(NonFiniteLogits):
            session.step()
    assert len(engine.generate([prompt], SAMPLED)) == 1


def test_of_rows_with_the_same_settings_only_the_bad_one_fails(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model whose logits after token 7 are not numbers."""
    logits = torch.full((400, 400), -30.0)
    logits[:, 9] = 20.0
    logits[7] = float("nan")
    engine = Engine(Scripted(logits, by_position=False), tokenizer)
    with engine.session(spares_others=True) as session:
        handles = session.add([[5], [7], [6]], SamplingParams(max_new_tokens=2))
        finished(session)
    assert [running.finish_reason for running in handles] == ["length", "failed", "length"]
    assert [running.tokens for running in handles] == [[9, 9], [], [9, 9]]


def test_a_scheduler_has_exclusive_use_of_the_engine(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = Engine(llama, tokenizer)
    with engine.session() as session:
        session.add(mixed_prompts(1), SAMPLED)
        with pytest.raises(RuntimeError, match="the engine is busy"):
            engine.generate(mixed_prompts(1), SAMPLED)
        session.step()
        assert torch.is_grad_enabled()
    assert llama.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2 soft caps", "mistral sliding window"])
@pytest.mark.parametrize("path", ["cached", "plain"])
def test_embeddings_are_mean_hidden_states_of_each_sequence(
    name: str, path: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = pico_model(name)
    sequences = mixed_prompts(5)
    base = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        separate = [base(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in sequences]
    engine = Engine(model, tokenizer)
    engine.path = path
    expected = engine.generate(sequences, SAMPLED)
    with engine.session() as session:
        handles = session.add(sequences, SAMPLED)
        session.step()
        torch.testing.assert_close(engine.embed(sequences), torch.stack(separate), atol=2e-5, rtol=1e-4)
        finished(session)
    assert [running.tokens for running in handles] == [completion.token_ids for completion in expected]
