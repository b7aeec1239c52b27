"""The engine: greedy tokens as transformers, draws independent of the batch, stopping, streaming, reused rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pico_language_models import FAMILIES, Scripted, mixed_prompts, pico_model
from pico_runs import slow_but
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.generation.completions import Completion
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams

NEW = 9
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=NEW, seed=11)


def greedy_of_transformers(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("number", slow_but(12, [12, 64]))
@pytest.mark.parametrize("name", slow_but(["llama", "gpt2", "gemma2 soft caps"], FAMILIES))
def test_greedy_tokens_equal_those_of_transformers(name: str, number: int, tokenizer: PreTrainedTokenizerBase) -> None:
    model = pico_model(name)
    prompts = mixed_prompts(number)
    expected = [greedy_of_transformers(model, prompt) for prompt in prompts]
    engine = Engine(model, tokenizer)
    assert engine.path == "cached", engine.reason
    together = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
    assert [completion.token_ids for completion in together] == expected
    separate = [engine.generate([prompt], SamplingParams(max_new_tokens=NEW))[0].token_ids for prompt in prompts]
    assert separate == expected
    few = Engine(model, tokenizer, max_rows=5, prefill_tokens=16).generate(prompts, SamplingParams(max_new_tokens=NEW))
    assert [completion.token_ids for completion in few] == expected
    assert len({tuple(ids) for ids in expected}) > number / 2


def test_the_plain_path_gives_the_same_tokens(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = mixed_prompts(6)
    cached, plain = Engine(llama, tokenizer), Engine(llama, tokenizer)
    plain.path = "plain"
    assert tokens(plain.generate(prompts, SAMPLED)) == tokens(cached.generate(prompts, SAMPLED))


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_equal_a_fresh_forward(
    temperature: float, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = mixed_prompts(9)
    settings = SamplingParams(temperature=temperature, max_new_tokens=NEW)
    compared = 0
    for prompt, completion in zip(
        prompts, Engine(llama, tokenizer, max_rows=4).generate(prompts, settings), strict=True
    ):
        with torch.no_grad():
            logits = llama(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        full = (logits / (temperature or 1.0)).log_softmax(-1)
        expected = full.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
        assert completion.filtered_logprobs is None
        compared += len(expected)
    assert compared > 45


def test_filtered_logprobs_are_those_of_what_is_left(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of two tokens that are left, the filtered probabilities add up to one, in the ratio of the full ones."""
    prompt = mixed_prompts(1)[0]
    settings = SamplingParams(temperature=1.0, top_k=2, max_new_tokens=1)
    found = {c.token_ids[0]: c for c in Engine(llama, tokenizer).generate([prompt], settings, n=40)}
    assert len(found) == 2
    full = torch.tensor([c.logprobs[0] for c in found.values()])
    drawn = torch.tensor([c.filtered_logprobs[0] for c in found.values() if c.filtered_logprobs is not None])
    torch.testing.assert_close(drawn, full.log_softmax(0), atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_text_in_any_batch(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = mixed_prompts(12)
    whole = tokens(Engine(llama, tokenizer).generate(prompts, SAMPLED))
    refilled = tokens(Engine(llama, tokenizer, max_rows=3).generate(prompts, SAMPLED))
    turned = tokens(Engine(llama, tokenizer, max_rows=5).generate(prompts[::-1], SAMPLED))[::-1]
    separate = [tokens(Engine(llama, tokenizer).generate([prompt], SAMPLED))[0] for prompt in prompts[:4]]
    assert whole == refilled == turned
    assert separate == whole[:4]
    other = SamplingParams(temperature=1.0, max_new_tokens=NEW, seed=12)
    assert tokens(Engine(llama, tokenizer).generate(prompts, other)) != whole


def test_samples_of_one_prompt_differ_and_are_those_of_the_prompt_repeated(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = mixed_prompts(2)
    engine = Engine(llama, tokenizer, max_rows=3)
    sampled = engine.generate(prompts, SAMPLED, n=4)
    assert [(c.prompt_index, c.sample_index) for c in sampled] == [(p, s) for p in range(2) for s in range(4)]
    assert len({tuple(ids) for ids in tokens(sampled)}) == 8
    repeated = engine.generate([prompts[0]] * 4 + [prompts[1]] * 4, SAMPLED)
    assert tokens(repeated) == tokens(sampled)


def test_settings_of_each_prompt(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = mixed_prompts(4)
    each = [
        SamplingParams(max_new_tokens=3),
        SamplingParams(temperature=1.0, max_new_tokens=7, seed=5),
        SamplingParams(max_new_tokens=9, no_repeat_ngram=1, stop_at_end=False),
        SamplingParams(temperature=0.5, top_p=0.8, repetition_penalty=1.2, max_new_tokens=5),
    ]
    together = Engine(llama, tokenizer).generate(prompts, each)
    separate = [Engine(llama, tokenizer).generate([p], s)[0].token_ids for p, s in zip(prompts, each, strict=True)]
    assert tokens(together) == separate
    third = [*prompts[2], *together[2].token_ids]
    assert len(together[2].token_ids) == 9
    assert not set(together[2].token_ids) & set(prompts[2])
    assert len(set(third)) == len(set(prompts[2])) + 9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_penalties_equal_those_of_transformers(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = pico_model(name)
    settings = SamplingParams(max_new_tokens=NEW, repetition_penalty=1.3, no_repeat_ngram=2, logit_bias={7: 2.0})
    prompts = mixed_prompts(4)
    got = Engine(model, tokenizer).generate(prompts, settings)
    for prompt, completion in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, repetition_penalty=1.3,
            no_repeat_ngram_size=2, sequence_bias={(7,): 2.0}, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_frequencies_through_the_engine_match_the_softmax(tokenizer: PreTrainedTokenizerBase) -> None:
    """First and second tokens of 4000 samples from a model that is a known Markov chain."""
    from scipy import stats

    logits = torch.full((400, 400), -30.0)
    logits[:, 3:11] = torch.randn(400, 8, generator=torch.Generator().manual_seed(8))
    engine = Engine(Scripted(logits, by_position=False), tokenizer, max_rows=256)
    settings = SamplingParams(temperature=1.0, max_new_tokens=2)
    sampled = torch.tensor(tokens(engine.generate([[5]], settings, n=4000)))
    chain = torch.softmax(logits.double(), -1)[:, 3:11]
    expected = chain[5][:, None] * chain[3:11]
    seen = torch.bincount((sampled[:, 0] - 3) * 8 + sampled[:, 1] - 3, minlength=64)
    expected = expected.flatten().numpy() * 4000
    often = expected >= 5
    assert often.sum() > 40
    observed = seen.numpy()
    assert (
        stats.chisquare(
            [*observed[often], observed[~often].sum()], [*expected[often], 4000 - expected[often].sum()]
        ).pvalue
        > 0.01
    )


def test_stop_tokens_and_limits(says: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> None:
    model, prompt = says("the box was open")
    engine = Engine(model, tokenizer)
    whole = engine.generate([prompt])[0]
    assert (whole.text, whole.finish_reason, whole.token_ids[-1]) == ("the box was open", "stop", 2)
    assert len(whole.logprobs) == len(whole.token_ids)
    short = engine.generate([prompt], SamplingParams(max_new_tokens=2))[0]
    assert (len(short.token_ids), short.finish_reason) == (2, "length")
    second = whole.token_ids[1]
    early = engine.generate([prompt], SamplingParams(stop_token_ids=(second,)))[0]
    assert (early.token_ids, early.finish_reason) == (whole.token_ids[:2], "stop")
    assert early.text == tokenizer.decode(whole.token_ids[:1])
    on = engine.generate([prompt], SamplingParams(stop_at_end=False, max_new_tokens=len(whole.token_ids) + 3))[0]
    assert on.finish_reason == "length"
    assert on.token_ids[-3:] == [2, 2, 2]


@pytest.mark.parametrize(
    ("stop", "keep_stop", "text"),
    [("x wa", False, "the bo"), ("x wa", True, "the box wa"), ("<eos>", False, "the box was open")],
)
def test_stop_strings(
    stop: str, keep_stop: bool, text: str, says: Callable[..., Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    model, prompt = says("the box was open")
    got = Engine(model, tokenizer).generate(
        [prompt], SamplingParams(stop=(stop, "zzz"), keep_stop=keep_stop, stop_at_end=False)
    )[0]
    assert got.text == text
    assert got.finish_reason == "stop string"
    assert not got.token_ids or tokenizer.decode(got.token_ids[:-1]) in "the box was open"


@pytest.mark.parametrize(
    "settings", [SAMPLED, SamplingParams(temperature=1.0, max_new_tokens=NEW, stop=("e", "\u0120"), seed=3)]
)
def test_a_stream_makes_up_the_batch(
    settings: SamplingParams, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = mixed_prompts(6)
    engine = Engine(llama, tokenizer, max_rows=4)
    batch = engine.generate(prompts, settings, n=2)
    streamed: dict[tuple[int, int], list[Any]] = {}
    for delta in engine.stream(prompts, settings, n=2):
        assert torch.is_grad_enabled()
        streamed.setdefault((delta.prompt_index, delta.sample_index), []).append(delta)
    assert llama.config._attn_implementation == "eager"
    assert len(streamed) == 12
    for completion in batch:
        deltas = streamed[completion.prompt_index, completion.sample_index]
        assert [delta.token for delta in deltas] == completion.token_ids
        assert "".join(delta.text for delta in deltas) == completion.text
        assert [delta.logprob for delta in deltas] == pytest.approx(completion.logprobs, abs=1e-5)
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [completion.finish_reason]


def test_a_stream_can_be_closed_and_the_engine_used_again(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = Engine(llama, tokenizer)
    stream = engine.stream(mixed_prompts(2), SAMPLED)
    next(stream)
    with pytest.raises(RuntimeError, match="the engine is busy"):
        engine.generate(mixed_prompts(1), SAMPLED)
    stream.close()  # type: ignore[attr-defined]
    assert len(engine.generate(mixed_prompts(1), SAMPLED)) == 1


def test_rows_are_reused_and_the_longest_go_first(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Completions of 4 and 12 tokens in two rows: 12 beside 4, 4 and 4 take 12 steps, not the 16 of two batches."""
    calls: list[int] = []
    handle = llama.register_forward_hook(lambda _module, _args, output: calls.append(output.logits.shape[0]))
    prompts = mixed_prompts(4)
    each = [SamplingParams(max_new_tokens=limit, stop_at_end=False) for limit in (4, 4, 4, 12)]
    try:
        engine = Engine(llama, tokenizer, max_rows=2)
        calls.clear()
        got = engine.generate(prompts, each)
    finally:
        handle.remove()
    assert [len(completion.token_ids) for completion in got] == [4, 4, 4, 12]
    # Three forwards of prompts (two together, one, one), and 3 decodes beside each short row and 2 that are left.
    assert len(calls) == 3 + 3 * 3 + 2
    assert calls.count(2) == 9


def test_positions_run_out(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Engine(llama, tokenizer)
    prompt = [5] * 254
    got = engine.generate([prompt], SamplingParams(max_new_tokens=50, stop_at_end=False))[0]
    # 254 tokens and two new ones fill 256 positions; the third new one is never fed.
    assert (len(got.token_ids), got.finish_reason) == (3, "length")
    with pytest.raises(UserError, match="257 tokens: the model has 256 positions"):
        engine.generate([[5] * 257])


@pytest.mark.parametrize(
    ("prompt", "settings", "summary"),
    [([], SamplingParams(), "empty prompt"), ([5, 400], SamplingParams(), "token 400"),
     ([5], SamplingParams(logit_bias={999: 1.0}), "logit_bias for token 999")],
)  # fmt: skip
def test_what_the_model_cannot_take_is_named(
    prompt: list[int],
    settings: SamplingParams,
    summary: str,
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(UserError, match=summary):
        Engine(llama, tokenizer).generate([prompt], settings)


def test_the_weights_are_the_models_own(tokenizer: PreTrainedTokenizerBase) -> None:
    """The engine has no copy of the weights: after a change it generates with the new ones."""
    model = pico_model("llama")
    engine = Engine(model, tokenizer)
    prompts = mixed_prompts(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.9)
    assert tokens(engine.generate(prompts, SamplingParams(max_new_tokens=NEW))) == [
        greedy_of_transformers(model, prompt) for prompt in prompts
    ]


def test_reused_prefixes_change_nothing_and_are_dropped_at_exit(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = Engine(llama, tokenizer)
    prompt = mixed_prompts(1, longest=200, seed=3)[0][:40]
    seen: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    try:
        first = engine.generate([prompt], SamplingParams(max_new_tokens=6))[0]
        longer = [*prompt, *first.token_ids, 5, 6]
        expected = engine.generate([longer], SamplingParams(max_new_tokens=6))[0]
        with engine.reuse_prefixes():
            engine.generate([prompt], SamplingParams(max_new_tokens=6))
            seen.clear()
            assert engine.generate([longer], SamplingParams(max_new_tokens=6))[0].token_ids == expected.token_ids
            # The last of the six tokens was never fed.
            assert seen[0] == 3
        seen.clear()
        engine.generate([longer], SamplingParams(max_new_tokens=1))
        assert seen == [len(longer)]
    finally:
        handle.remove()
