"""Every filter and penalty against transformers' processors or a number worked by hand; drawn frequencies against the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from loopos.config.diagnostics import UserError
from loopos.generation.sampling import (
    History,
    NonFiniteLogits,
    choose,
    draw,
    filtered,
    only_min_p,
    only_top_k,
    only_top_p,
    only_typical,
    penalized,
    uniforms,
    with_bias,
    with_count_penalties,
    with_repetition_penalty,
    without_repeated_ngrams,
)
from loopos.generation.settings import SamplingParams

CPU = torch.device("cpu")


def some_logits(rows: int = 6, size: int = 500) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(0)) * 3


def some_history() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of one total length (transformers' processors know no other), with repeated n-grams."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 6, (6, 30), generator=generator)
    return tokens[:, :12].tolist(), tokens[:, 12:].tolist()


FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], object]] = {
    "top-k": (lambda x: only_top_k(x, 7), TopKLogitsWarper(7)),
    "top-k above the vocabulary": (lambda x: only_top_k(x, 900), TopKLogitsWarper(900)),
    "top-p": (lambda x: only_top_p(x, 0.8), TopPLogitsWarper(0.8)),
    "top-p of nearly all": (lambda x: only_top_p(x, 0.999), TopPLogitsWarper(0.999)),
    "top-p of the first alone": (lambda x: only_top_p(x, 1e-6), TopPLogitsWarper(1e-6)),
    "min-p": (lambda x: only_min_p(x, 0.05), MinPLogitsWarper(0.05)),
    "min-p of 1": (lambda x: only_min_p(x, 1.0), MinPLogitsWarper(1.0)),
    "typical": (lambda x: only_typical(x, 0.6), TypicalLogitsWarper(0.6)),
    "typical after top-k": (lambda x: only_typical(only_top_k(x, 20), 0.6),
                            LogitsProcessorList([TopKLogitsWarper(20), TypicalLogitsWarper(0.6)])),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_those_of_transformers(name: str) -> None:
    actual_tokens, expected_tokens = FILTERS[name]
    logits = some_logits()
    assert torch.equal(actual_tokens(logits), expected_tokens(torch.zeros(6, 1, dtype=torch.long), logits.clone()))  # type: ignore[operator]


def test_top_p_that_needs_more_than_the_first_thousand() -> None:
    logits = torch.randn(3, 4000, generator=torch.Generator().manual_seed(2)) * 0.1
    expected = TopPLogitsWarper(0.9)(torch.zeros(3, 1, dtype=torch.long), logits.clone())
    assert int(expected.isfinite().sum(-1).min()) > 1024
    assert torch.equal(only_top_p(logits, 0.9).isfinite(), expected.isfinite())


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_forbidden_ngrams_equal_those_of_transformers(n: int) -> None:
    prompts, completions = some_history()
    history = History.of(prompts, completions, CPU)
    expected = NoRepeatNGramLogitsProcessor(n)(history.tokens, some_logits())
    got = without_repeated_ngrams(some_logits(), history, n)
    assert torch.equal(got, expected)
    assert n == 40 or bool(got.isinf().any())


def test_forbidden_ngrams_of_rows_of_different_length() -> None:
    """By hand: 5 6 7 5 6 forbids 7 after 5 6; 8 9 8 forbids 9 after 8; a row of one token forbids nothing."""
    history = History.of([[5, 6, 7], [8, 9], [4]], [[5, 6], [8], []], CPU)
    got = [without_repeated_ngrams(torch.zeros(3, 10), history, n).isinf().nonzero().tolist() for n in (2, 3)]
    assert got == [[[0, 7], [1, 9]], [[0, 7]]]


def test_repetition_penalty_equals_that_of_transformers() -> None:
    prompts, completions = some_history()
    history = History.of(prompts, completions, CPU)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(history.tokens, some_logits())
    assert torch.equal(with_repetition_penalty(some_logits(), history, 1.3), expected)


def test_repetition_penalty_leaves_out_the_padding() -> None:
    history = History.of([[3], [1, 2]], [[], [1]], CPU)
    got = with_repetition_penalty(torch.tensor([[2.0, 2.0, 2.0, 2.0], [2.0, -2.0, 2.0, 2.0]]), history, 2.0)
    assert got.tolist() == [[2.0, 2.0, 2.0, 1.0], [2.0, -4.0, 1.0, 2.0]]


def test_presence_and_frequency_by_hand() -> None:
    """mu[j] − c[j] · frequency − [c[j] > 0] · presence, with counts over only the completion."""
    history = History.of([[0, 0, 3]], [[1, 1, 2]], CPU)
    got = with_count_penalties(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), history, presence=0.5, frequency=0.25)
    assert got.tolist() == [[1.0, 0.0, 0.25, 1.0]]


def test_bias_equals_that_of_transformers() -> None:
    expected = SequenceBiasLogitsProcessor({(3,): 1.5, (7,): -4.0})(torch.zeros(6, 1, dtype=torch.long), some_logits())
    assert torch.equal(with_bias(some_logits(), {3: 1.5, 7: -4.0}), expected)


def test_the_order_is_that_of_transformers() -> None:
    prompts, completions = some_history()
    history = History.of(prompts, completions, CPU)
    processors = LogitsProcessorList(
        [SequenceBiasLogitsProcessor({(3,): 1.5}), RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(2),
         TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02), TypicalLogitsWarper(0.9)]
    )  # fmt: skip
    settings = SamplingParams(
        logit_bias={3: 1.5}, repetition_penalty=1.4, no_repeat_ngram=2, temperature=0.7, top_k=40, top_p=0.9, min_p=0.02,
        typical_p=0.9,
    )  # fmt: skip
    got = filtered(penalized(some_logits(), settings, history) / 0.7, settings)
    assert torch.equal(got.isfinite(), processors(history.tokens, some_logits()).isfinite())
    assert 6 < int(got.isfinite().sum()) < 6 * 40


SAMPLERS: dict[str, SamplingParams] = {
    "plain": SamplingParams(temperature=1.0),
    "hot": SamplingParams(temperature=1.7),
    "top-k": SamplingParams(temperature=1.0, top_k=5),
    "top-p": SamplingParams(temperature=0.9, top_p=0.7),
    "min-p": SamplingParams(temperature=1.3, min_p=0.1),
    "typical": SamplingParams(temperature=1.0, typical_p=0.7),
    "biased": SamplingParams(temperature=1.0, logit_bias={2: 1.0, 9: -8.0}),
    "presence": SamplingParams(temperature=1.0, presence_penalty=0.8, frequency_penalty=0.3),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawn_frequencies_match_the_distribution(name: str) -> None:
    """Chi-square of 20,000 draws against the softmax of transformers' processors' scores."""
    settings, number = SAMPLERS[name], 20_000
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(4)) * 2
    logits[:, 20:] -= 6
    history = History.of([[1]], [[2, 2, 5]], CPU)
    expected = _transformers_probabilities(logits, settings)
    many = History.of([[1]] * number, [[2, 2, 5]] * number, CPU)
    choice = choose(
        logits.expand(number, -1),
        settings,
        history=many,
        uniforms=uniforms([99] * number, range(number)),
        with_logprobs=True,
    )
    counts = np.bincount(choice.tokens.numpy(), minlength=300)
    assert counts[expected == 0].sum() == 0
    # Cells that expect fewer than five are merged, as the test's approximation requires.
    often = expected * number >= 5
    seen = np.append(counts[often], counts[~often].sum())
    cell_counts = np.append(expected[often], expected[~often].sum()) * number
    assert often.sum() >= 3
    cells = cell_counts > 0
    scale = seen[cells].sum() / cell_counts[cells].sum()
    assert stats.chisquare(seen[cells], cell_counts[cells] * scale).pvalue > 0.01
    full = torch.log_softmax(logits[0] / settings.temperature, -1)
    torch.testing.assert_close(choice.logprobs, full[choice.tokens], atol=1e-5, rtol=0)
    if name in ("plain", "hot"):
        assert choice.filtered_logprobs is None
    else:
        assert choice.filtered_logprobs is not None
        drawn = torch.tensor(np.log(expected[choice.tokens.numpy()]), dtype=torch.float32)
        torch.testing.assert_close(choice.filtered_logprobs, drawn, atol=1e-4, rtol=0)
    assert history.generated().sum() == 3


def _transformers_probabilities(logits: Tensor, settings: SamplingParams) -> np.ndarray:
    processors = LogitsProcessorList()
    if settings.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in settings.logit_bias.items()}))
    processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(MinPLogitsWarper(settings.min_p))
    if settings.typical_p < 1:
        processors.append(TypicalLogitsWarper(settings.typical_p))
    scores = logits.clone()
    if settings.presence_penalty:
        # The completion is 2 2 5: two occurrences and one.
        scores[0, 2] -= 0.8 + 2 * 0.3
        scores[0, 5] -= 0.8 + 0.3
    return torch.softmax(processors(torch.ones(1, 1, dtype=torch.long), scores).double(), -1)[0].numpy()


def test_draw_by_hand() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(5, 1)
    got = draw(probabilities, torch.tensor([0.0, 0.2499, 0.25, 0.9999, 1 - 2**-53], dtype=torch.float64))
    assert got.tolist() == [1, 1, 3, 3, 3]


def test_draw_never_gives_a_token_of_probability_zero() -> None:
    """The ends of every block, where rounding could step over, over a vocabulary that is no multiple of the block."""
    generator = torch.Generator().manual_seed(5)
    probabilities = torch.rand(1, 1000, generator=generator) * (torch.rand(1, 1000, generator=generator) < 0.02)
    cumulative = (probabilities.double().cumsum(-1) / probabilities.double().sum())[0]
    middles = (cumulative + torch.cat([torch.zeros(1), cumulative[:-1]])) / 2
    edges = torch.cat([cumulative - 2**-52, cumulative, cumulative + 2**-52, middles]).clamp(0, 1 - 2**-53)
    got = draw(probabilities.expand(len(edges), -1), edges)
    assert bool((probabilities[0, got] > 0).all())
    assert len(set(got.tolist())) == int((probabilities > 0).sum())


def test_greedy_takes_the_first_of_equals_and_its_logprob_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3), math.log(3)], [math.log(2), 0.0, 0.0]])
    choice = choose(logits, SamplingParams(), history=None, uniforms=None, with_logprobs=True)
    assert choice.tokens.tolist() == [1, 0]
    assert choice.logprobs is not None
    assert choice.logprobs.tolist() == pytest.approx([math.log(3 / 7), math.log(1 / 2)])
    half = choose(logits.bfloat16(), SamplingParams(), history=None, uniforms=None, with_logprobs=False)
    assert half.tokens.tolist() == [1, 0]


@pytest.mark.parametrize("settings", [SamplingParams(), SamplingParams(temperature=1.0)])
def test_logits_that_are_no_numbers_are_refused(settings: SamplingParams) -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])
    with pytest.raises(NonFiniteLogits, match="not finite"):
        choose(logits, settings, history=None, uniforms=torch.zeros(2, dtype=torch.float64), with_logprobs=False)


def test_settings_out_of_range_are_all_named() -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(temperature=-1.0, top_p=0.0, max_new_tokens=0, stop=("",))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "temperature",
        "top_p",
        "max_new_tokens",
        "stop",
    ]


def test_rows_are_sampled_together_where_only_limits_differ() -> None:
    one = SamplingParams(temperature=0.5, logit_bias={3: 1.0})
    assert one.of_choice() == replace(one, max_new_tokens=9, stop=("x",), seed=4).of_choice()
    assert one.of_choice() != replace(one, logit_bias={3: 2.0}).of_choice()
    assert hash(one.of_choice()) == hash(replace(one, seed=5).of_choice())
