"""Weights in the kernel layout: the same products, one copy, and restored bit for bit, also after errors."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from pico_language_models import FAMILIES, mixed_prompts, pico_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.sections import LoraSection
from loopos.generation.cpu.layers import kernel_layout
from loopos.generation.cpu.weights import PackedWeight, own_layer, packed
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.models.active_adapters import active_adapter
from loopos.models.adapters import add_lora

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bf16 on this processor"
)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.detach().clone().view(torch.int16).numpy().tobytes() for name, tensor in model.named_parameters()
    }


def bf16(name: str) -> PreTrainedModel:
    model = pico_model(name).to(torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    return model


def moved(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) and bool(layer.weight.isnan().all())]


class TestLayers:
    def test_products_are_those_of_the_dense_weight(self) -> None:
        torch.manual_seed(0)
        for rows, features, biased in ((1, 64, True), (3, 32, False), (40, 96, True)):
            layer = nn.Sequential(nn.Linear(48, features, bias=biased, dtype=torch.bfloat16))
            actual = torch.randn(rows, 2, 48, dtype=torch.bfloat16)
            exact = actual.double() @ layer[0].weight.double().t() + (layer[0].bias.double() if biased else 0)
            with torch.inference_mode(), kernel_layout(layer):
                assert moved(layer)
                torch.testing.assert_close(layer(actual).double(), exact, atol=0.01, rtol=0.01)

    def test_there_is_one_copy_and_it_comes_back_to_where_it_was(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 32, dtype=torch.bfloat16))
        before, parameters = bits(model), list(model.parameters())
        also_there = model[0].weight.data
        with kernel_layout(model):
            assert len(moved(model)) == 2
            assert also_there.untyped_storage().nbytes() == 0
            assert model[0].weight.shape == (64, 64)
        assert bits(model) == before
        assert [a is b for a, b in zip(model.parameters(), parameters, strict=True)] == [True] * 4
        # Whoever else holds the weight still holds the same memory.
        with torch.no_grad():
            model[0].weight[0, 0] = 3.0
        assert also_there[0, 0] == 3.0

    def test_it_can_train_afterwards_as_before(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16))
        actual = torch.randn(4, 32, dtype=torch.bfloat16)
        model(actual).sum().backward()
        expected = model[0].weight.grad
        model.zero_grad()
        with torch.inference_mode(), kernel_layout(model):
            model(actual)
        model(actual).sum().backward()
        assert torch.equal(model[0].weight.grad, expected)

    def test_what_is_not_a_layers_own_stays(self) -> None:
        model: Any = nn.Module()
        model.one, model.other = (nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
        model.one.weight = model.other.weight
        flat = torch.randn(2 * 32 * 32, dtype=torch.bfloat16)
        model.part = nn.Linear(32, 32, dtype=torch.bfloat16)
        model.part.weight.data = flat[: 32 * 32].view(32, 32)
        model.wide = nn.Linear(32, 32)
        with kernel_layout(model):
            assert moved(model) == []

    def test_an_output_layer_tied_to_the_embedding_is_copied(self) -> None:
        torch.manual_seed(0)
        model: Any = nn.Module()
        model.embedding = nn.Embedding(48, 32, dtype=torch.bfloat16)
        model.tied = nn.Linear(32, 48, bias=False, dtype=torch.bfloat16)
        model.tied.weight = model.embedding.weight
        actual = torch.randn(5, 32, dtype=torch.bfloat16)
        expected = actual.double() @ model.embedding.weight.double().t()
        with torch.inference_mode(), kernel_layout(model):
            assert moved(model) == []
            assert "forward" in vars(model.tied)
            assert torch.equal(model.embedding(torch.tensor([7]))[0], model.embedding.weight[7])
            torch.testing.assert_close(model.tied(actual).double(), expected, atol=0.02, rtol=0.01)
        assert "forward" not in vars(model.tied)
        assert model.tied.weight is model.embedding.weight

    def test_a_second_one_within_does_nothing(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16))
        before = bits(model)
        with kernel_layout(model):
            with kernel_layout(model):
                pass
            assert len(moved(model)) == 1
        assert bits(model) == before

    def test_weights_come_back_after_an_error(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16))
        before = bits(model)
        with pytest.raises(KeyError), kernel_layout(model):
            raise KeyError
        assert bits(model) == before
        assert "forward" not in vars(model[0])


def with_lora(name: str, targets: list[str] | str) -> PreTrainedModel:
    """A model under two adapters with numbers in them, of which the first is active."""
    model = bf16(name)
    for number, adapter in enumerate(("default", "other")):
        add_lora(model, LoraSection(rank=4, alpha=6, target_modules=targets), seed=number, name=adapter)
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = (0.1 * torch.randn(parameter.shape)).to(torch.bfloat16)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter("default")
    model.requires_grad_(False)
    return model.eval()


class TestAdapters:
    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
    @pytest.mark.parametrize("name", ["llama", "qwen2 with biases", "qwen3"])
    def test_a_model_under_lora_decodes_in_few_kernels(
        self, name: str, targets: list[str] | str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model = with_lora(name, targets)
        before = bits(model)
        seen: list[bool] = []
        layer = next(module for module in model.modules() if type(module).__name__.endswith("DecoderLayer"))
        handle = model.register_forward_hook(lambda *_: seen.append("forward" in vars(layer)))
        prompts = mixed_prompts(5, longest=12)
        settings = SamplingParams(temperature=1.0, max_new_tokens=8, stop_at_end=False, seed=3)
        completions = Engine(model, tokenizer).generate(prompts, settings)
        handle.remove()
        assert all(seen[-8:])
        assert bits(model) == before
        plain = bf16(name)
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logprobs, without = (
                    each(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                    for each in (model, plain)
                )
            chosen = torch.tensor(completion.token_ids)[:, None]
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), logprobs.gather(1, chosen)[:, 0], atol=0.15, rtol=0.0
            )
            assert float((logprobs - without).abs().max()) > 0.6

    def test_another_adapter_and_none(self) -> None:
        """What is active when the layout is taken is what counts; one that drops inputs out keeps its own forward."""
        torch.manual_seed(0)
        model = with_lora("llama", ["q_proj", "gate_proj"])
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        actual = torch.randn(6, layers[0].in_features, dtype=torch.bfloat16)
        for active in ("other", None):
            with active_adapter(model, active):
                expected = layers[0](actual)
                found = packed([layers[0]])
                assert isinstance(found, PackedWeight) == (active is None)
                torch.testing.assert_close(found.product(actual), expected, atol=0.03, rtol=0.03)
                more = torch.randn_like(expected)
                torch.testing.assert_close(found.product_with(actual, more), expected + more, atol=0.05, rtol=0.03)
                found.back()
                assert torch.equal(layers[0](actual), expected)
        layers[0].lora_dropout["default"] = nn.Dropout(0.5).train()
        assert own_layer(layers[0]) is None


class TestEngines:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_logprobs_are_those_of_a_plain_forward(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        model = bf16(name)
        engine, before = Engine(model, tokenizer), bits(model)
        seen: list[int] = []
        handle = model.register_forward_hook(lambda *_: seen.append(len(moved(model))))
        prompts = mixed_prompts(5, longest=12)
        settings = SamplingParams(temperature=1.0, max_new_tokens=8, stop_at_end=False, seed=3)
        completions = engine.generate(prompts, settings)
        handle.remove()
        # GPT-2's layers are of another kind: all others decode in the kernel's layout.
        assert min(seen) > 0 or name == "gpt2"
        assert bits(model) == before
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=0.15, rtol=0.0)

    def test_weights_are_back_when_a_stream_is_closed_and_prefixes_are_let_go(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model = bf16("llama")
        engine, before = Engine(model, tokenizer), bits(model)
        prompts = mixed_prompts(4, longest=6)
        with closing(engine.stream(prompts, SamplingParams(max_new_tokens=5))) as stream:
            next(stream)
            assert moved(model)
        assert bits(model) == before
        with engine.reuse_prefixes():
            for _ in range(2):
                engine.generate(prompts, SamplingParams(max_new_tokens=2))
                assert moved(model)
        assert bits(model) == before

    def test_few_rows_decode_with_the_weights_as_they_lie(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = bf16("llama")
        engine = Engine(model, tokenizer)
        seen: list[int] = []
        model.register_forward_hook(lambda *_: seen.append(len(moved(model))))
        engine.generate(mixed_prompts(2, longest=6), SamplingParams(max_new_tokens=3))
        assert set(seen) == {0}
