"""Generation with ensembles: hand-computed mixtures, plain forwards, and a model mixed with itself."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from pico_language_models import VOCABULARY, Scripted, mixed_prompts, pico_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.functional.mixing import MixtureMethod, mixed_logits
from loopos.functional.packing import PackedLayout
from loopos.generation.beam import BeamSettings, beam_search
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.models.language_ensemble import LanguageEnsemble, TokenScores, check_one_vocabulary
from loopos.models.language_model import LanguageModel

PROMPTS = mixed_prompts(6)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=12, seed=3, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    """Another family, which lays out its weights and positions in its own way."""
    return pico_model("gpt2")


def ensemble(
    *members: PreTrainedModel, method: MixtureMethod = "mean", weights: tuple[float, ...] = ()
) -> LanguageEnsemble:
    return LanguageEnsemble(members, weights or (1 / len(members),) * len(members), method)


def test_a_mixture_worked_by_hand() -> None:
    one, other = torch.tensor([[math.log(0.9), math.log(0.1)]]), torch.tensor([[math.log(0.2), math.log(0.8)]])
    mean = mixed_logits([one, other], [0.5, 0.5], "mean")
    assert mean.softmax(-1).tolist() == [pytest.approx([0.55, 0.45])]
    uneven = mixed_logits([one + 7, other - 3], [0.75, 0.25], "mean")
    assert uneven.softmax(-1).tolist() == [pytest.approx([0.725, 0.275])]
    # √(.9·.2) : √(.1·.8) = 3 : 2.
    together = mixed_logits([one, other], [0.5, 0.5], "logits").softmax(-1)
    assert together.tolist() == [pytest.approx([0.6, 0.4])]


def test_a_weight_of_nothing_is_nothing() -> None:
    one, never = torch.tensor([[1.0, 2.0]]), torch.tensor([[-math.inf, 0.0]])
    assert mixed_logits([one, never], [1.0, 0.0], "logits").tolist() == [[1.0, 2.0]]
    # What one member rules out, the mean still allows, and the product does not.
    assert mixed_logits([one, never], [0.5, 0.5], "mean").isfinite().all()
    assert mixed_logits([one, never], [0.5, 0.5], "logits")[0, 0] == -math.inf


def test_two_tokens_by_two_tables(tokenizer: PreTrainedTokenizerBase) -> None:
    """A gives 5 a probability of .6 and B none; both give 7 at least .4: the ensemble generates 7."""
    tables = []
    for five, seven in ((0.6, 0.4), (1e-30, 1.0)):
        table = torch.full((1, VOCABULARY), -80.0)
        table[0, 5], table[0, 7] = math.log(five), math.log(seven)
        tables.append(Scripted(table, by_position=True))
    summary = [Engine(model, tokenizer).generate([[3]], SamplingParams(max_new_tokens=1))[0] for model in tables]
    assert [each.token_ids for each in summary] == [[5], [7]]
    [together] = Engine(ensemble(*tables), tokenizer).generate([[3]], SamplingParams(max_new_tokens=1))
    assert (together.token_ids, together.logprobs) == ([7], [pytest.approx(math.log(0.7), abs=1e-5)])


@pytest.mark.parametrize("method", ["mean", "logits"])
@pytest.mark.parametrize("settings", [SamplingParams(max_new_tokens=12), SAMPLED], ids=["greedy", "sampled"])
def test_a_model_with_itself_is_the_model(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: MixtureMethod, settings: SamplingParams
) -> None:
    separate = Engine(llama, tokenizer, max_rows=4).generate(PROMPTS, settings)
    twice = Engine(ensemble(llama, llama, method=method), tokenizer, max_rows=4).generate(PROMPTS, settings)
    assert [each.token_ids for each in twice] == [each.token_ids for each in separate]
    for one, other in zip(twice, separate, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("path", ["cached", "plain"])
def test_logprobs_are_those_of_the_mean_of_plain_softmaxes(
    llama: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str
) -> None:
    engine = Engine(ensemble(llama, other, weights=(0.3, 0.7)), tokenizer, max_rows=3)
    assert (engine.path, engine.embeds) == ("cached", False)
    engine.path = path
    settings = SamplingParams(temperature=1.0, max_new_tokens=10, seed=1)
    for prompt, found in zip(PROMPTS, engine.generate(PROMPTS, settings), strict=True):
        ids = [*prompt, *found.token_ids]
        expected = []
        with torch.no_grad():
            first, second = (model(torch.tensor([ids])).logits[0].softmax(-1) for model in (llama, other))
        mixture = (0.3 * first + 0.7 * second).log()
        for index in range(len(prompt), len(ids)):
            expected.append(float(mixture[index - 1, ids[index]]))
        assert found.logprobs == pytest.approx(expected, abs=1e-4)


def test_greedy_and_beams_by_plain_forwards(
    llama: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = Engine(ensemble(llama, other), tokenizer, max_rows=8)
    prompt = PROMPTS[0]
    ids = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            mean = sum(model(torch.tensor([ids])).logits[0, -1].softmax(-1) for model in (llama, other))
        ids.append(int(mean.argmax()))
    [found] = engine.generate([prompt], SamplingParams(max_new_tokens=8, stop_at_end=False))
    assert found.token_ids == ids[len(prompt) :]
    [beams] = beam_search(engine, [prompt], BeamSettings(num_beams=3, max_new_tokens=6))
    greedy = engine.generate([prompt], SamplingParams(max_new_tokens=6))[0]
    assert beams[0].score >= sum(greedy.logprobs) / len(greedy.token_ids) - 1e-4


def test_rows_join_and_leave_and_prefixes_are_reused(
    llama: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Shared prefixes, more prompts than rows, and a second turn: the text equals that of each separate prompt."""
    shared = mixed_prompts(1, longest=40, seed=5)[0] * 3
    prompts = [[*shared, *each] for each in PROMPTS]
    engine = Engine(ensemble(llama, other), tokenizer, max_rows=3)
    together = [each.token_ids for each in engine.generate(prompts, SAMPLED)]
    assert together == [engine.generate([each], SAMPLED)[0].token_ids for each in prompts]
    with engine.reuse_prefixes():
        first = engine.generate([prompts[0]], SAMPLED)[0].token_ids
        again = engine.generate([[*prompts[0], *first, 9]], SAMPLED)[0].token_ids
    assert again == engine.generate([[*prompts[0], *first, 9]], SAMPLED)[0].token_ids


@pytest.mark.parametrize("method", ["mean", "logits"])
def test_scores_of_packed_tokens(llama: PreTrainedModel, other: PreTrainedModel, method: MixtureMethod) -> None:
    layout, ids = (
        PackedLayout(tuple(map(len, PROMPTS)), torch.device("cpu")),
        torch.tensor([token for each in PROMPTS for token in each]),
    )
    weights = torch.tensor([float(index % 3) if index else 0.0 for each in PROMPTS for index in range(len(each))])
    # A model with itself is the model.
    for actual in (None, weights):
        twice = TokenScores(ensemble(deepcopy(llama), deepcopy(llama), method=method))(ids, layout, actual)
        assert float(twice) == pytest.approx(
            float(LanguageModel(deepcopy(llama))(ids, layout, actual).detach()), rel=1e-5
        )
    total = 0.0
    for each in PROMPTS:
        with torch.no_grad():
            logits = [model(torch.tensor([each])).logits[0].float() for model in (llama, other)]
        mixture = (
            sum(z.softmax(-1) for z in logits).div(2).log() if method == "mean" else (sum(logits) / 2).log_softmax(-1)
        )
        total -= float(sum(mixture[index - 1, each[index]] for index in range(1, len(each))))
    assert float(TokenScores(ensemble(deepcopy(llama), deepcopy(other), method=method))(ids, layout)) == pytest.approx(
        total, rel=1e-5
    )


def test_other_tokens_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    grown = deepcopy(tokenizer)
    grown.add_tokens(["<tool>"])
    with pytest.raises(UserError, match=r'b: other tokens than a: 1 that a lacks \("<tool>"\)'):
        check_one_vocabulary(["a", "b"], [tokenizer, grown], [400, 400])
    with pytest.raises(UserError, match="b: 512 output tokens, a 400"):
        check_one_vocabulary(["a", "b"], [tokenizer, tokenizer], [400, 512])
    check_one_vocabulary(["a", "b"], [tokenizer, tokenizer], [400, 400])


def test_an_ensemble_embeds_nothing(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Engine(ensemble(llama, llama), tokenizer)
    with engine.session(), pytest.raises(UserError, match="no hidden states of its own"):
        engine.embed([[3, 4]])
