"""Rows over our cache give the logits of plain forwards after packing, continuing, cutting, copying and selecting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico_language_models import COMMON, FAMILIES, mixed_prompts, pico_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from loopos.generation.cache import IMPLEMENTATION
from loopos.generation.decoders import probed
from loopos.generation.rows import PLAIN, CachedRows, PlainRows, Rows, serving
from loopos.generation.scheduler import fill


def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits after the last token by a forward of the whole, transformers' own attention."""
    with serving(model, PLAIN):
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


def assert_same(model: PreTrainedModel, got: Tensor, sequences: list[list[int]]) -> None:
    expected = torch.stack([plain_logits(model, ids) for ids in sequences])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["cached", "plain"])
def test_prompts_and_steps_equal_plain_forwards(name: str, kind: str) -> None:
    model = pico_model(name)
    assert probed(model).why_plain == ""
    prompts = mixed_prompts(5, longest=12)
    follow = mixed_prompts(5, longest=1, seed=1), mixed_prompts(5, longest=1, seed=2)
    implementation = IMPLEMENTATION if kind == "cached" else PLAIN
    with serving(model, implementation):
        rows: Rows = CachedRows(model, 5) if kind == "cached" else PlainRows(model, 5)
        logits = [rows.extend(range(5), prompts)]
        logits += [rows.step([token for [token] in tokens]) for tokens in follow]
        logits.append(rows.extend([3, 1], [[7, 8, 9], [10]]))
    assert model.config._attn_implementation == "eager"
    assert_same(model, logits[0], prompts)
    once = [prompt + new for prompt, new in zip(prompts, follow[0], strict=True)]
    twice = [prompt + new for prompt, new in zip(once, follow[1], strict=True)]
    assert_same(model, logits[1], once)
    assert_same(model, logits[2], twice)
    assert_same(model, logits[3], [[*twice[3], 7, 8, 9], [*twice[1], 10]])


@pytest.mark.parametrize("kind", ["cached", "plain"])
def test_cut_copy_and_select(kind: str, llama: PreTrainedModel) -> None:
    prompts = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]
    with serving(llama, IMPLEMENTATION if kind == "cached" else PLAIN):
        rows: Rows = CachedRows(llama, 4) if kind == "cached" else PlainRows(llama, 4)
        rows.extend([0, 1, 2], prompts)
        rows.cut(0, 2)
        rows.copy(0, 3, 1)
        assert rows.fed == [[5, 6], [5, 6, 9], [11, 12], [5]]
        assert_same(llama, rows.step([20, 21, 22, 23]), [[5, 6, 20], [5, 6, 9, 21], [11, 12, 22], [5, 23]])
        rows.select([1, 0, 0])
        assert rows.fed == [[5, 6, 9, 21], [5, 6, 20], [5, 6, 20], [5, 23]]
        assert_same(llama, rows.step([30, 31, 32]), [[5, 6, 9, 21, 30], [5, 6, 20, 31], [5, 6, 20, 32]])


class Counting:
    """Rows that count the tokens of every forward."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.fed = rows, rows.fed
        self.forwards: list[int] = []
        self.cut, self.copy, self.select, self.step = rows.cut, rows.copy, rows.select, rows.step

    def extend(self, rows: Any, tokens: Any) -> Tensor:
        self.forwards.append(sum(map(len, tokens)))
        return self.rows.extend(rows, tokens)


def filled(model: PreTrainedModel, prompts: list[list[int]], *, most: int = 1000) -> tuple[Counting, Tensor]:
    rows = Counting(CachedRows(model, 8))
    return rows, fill(rows, range(len(prompts)), prompts, most_tokens=most)


def test_equal_prompts_are_computed_once(llama: PreTrainedModel) -> None:
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [5, 6, 7]]
    with serving(llama, IMPLEMENTATION):
        rows, logits = filled(llama, prompts)
        assert rows.forwards == [5]
        assert_same(llama, logits, prompts)
        assert_same(
            llama, rows.step([3, 4, 5, 6]), [[*ids, token] for ids, token in zip(prompts, (3, 4, 5, 6), strict=True)]
        )


def test_a_common_prefix_is_computed_once(llama: PreTrainedModel) -> None:
    examples = mixed_prompts(1, longest=200, seed=3)[0][:40]
    assert len(examples) == 40
    prompts = [[*examples, 5, 6], [*examples, 7], [*examples, 8, 9, 10]]
    with serving(llama, IMPLEMENTATION):
        rows, logits = filled(llama, prompts)
    assert rows.forwards == [40, 6]
    assert_same(llama, logits, prompts)


def test_what_a_row_holds_is_not_computed_again(llama: PreTrainedModel) -> None:
    first = mixed_prompts(1, longest=200, seed=3)[0][:30]
    with serving(llama, IMPLEMENTATION):
        rows, _ = filled(llama, [[1, 2], first])
        again = [[*first, 4, 5], [*first[:20], 9]]
        logits = fill(rows, [0, 1], again, most_tokens=1000)
    assert rows.forwards[1:] == [3]
    assert_same(llama, logits, again)


@pytest.mark.parametrize("most", [1, 5, 16])
def test_long_prompts_run_in_parts(most: int, llama: PreTrainedModel) -> None:
    prompts = mixed_prompts(4, longest=20, seed=6)
    with serving(llama, IMPLEMENTATION):
        rows, logits = filled(llama, prompts, most=most)
    assert max(rows.forwards) == most
    assert sum(rows.forwards) == sum(map(len, prompts))
    assert_same(llama, logits, prompts)


def test_the_model_is_unchanged(llama: PreTrainedModel) -> None:
    llama.train()
    with serving(llama, IMPLEMENTATION):
        assert not llama.training
        assert not torch.is_grad_enabled()
    assert llama.training
    assert torch.is_grad_enabled()
    llama.eval()


# A bias on distances, attention sinks, recurrent states, frequencies that depend on the batch.
UNSERVED: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4),
    "gpt-oss sinks": GptOssConfig(**COMMON, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "mamba": MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4),
    "dynamic rotary": LlamaConfig(
        **COMMON, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
}


@pytest.mark.parametrize("name", UNSERVED)
@pytest.mark.filterwarnings("ignore")
def test_a_model_without_cache_support_is_reported_and_runs_row_by_row(name: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(UNSERVED[name], attn_implementation="eager", dtype=torch.float32).eval()
    assert probed(model).why_plain
    with serving(model, PLAIN):
        rows = PlainRows(model, 2)
        rows.extend([0, 1], [[5, 6, 7], [8, 9]])
        rows.step([3, 4])
        rows.cut(0, 2)
        logits = rows.step([5, 6])
    assert_same(model, logits, [[5, 6, 5], [8, 9, 4, 6]])
