"""The language model over packed rows equals transformers' own, for every way in which logits are made; what is no causal
language model is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from loopos.config.diagnostics import UserError
from loopos.functional.packing import PackedLayout
from loopos.models.folders import open_language_model, save_language_model
from loopos.models.language_model import LanguageModel
from loopos.models.load import load_pretrained
from loopos.training.precision import MasterWeights

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
LENGTHS = (9, 1, 17, 5)


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    found: PreTrainedModel
    match name:
        case "llama, tied":
            found = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
        case "llama, not tied":
            found = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
        case "gemma 2, capped logits":
            found = Gemma2ForCausalLM(
                Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=50.0)
            )
        case "granite, divided logits":
            found = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))
        case "cohere, multiplied logits":
            found = CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))
        case _:
            dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            found = GPT2LMHeadModel(
                GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128, **dropouts)
            )
    return found


def row(seed: int = 0) -> tuple[Tensor, PackedLayout, Tensor]:
    """Ids, layout, and weights of which some are 0; the first of each sequence is."""
    generator = torch.Generator().manual_seed(seed)
    layout = PackedLayout(LENGTHS)
    ids = torch.randint(3, 400, (sum(LENGTHS),), generator=generator)
    weights = torch.rand(sum(LENGTHS), generator=generator)
    weights[torch.rand(sum(LENGTHS), generator=generator) < 0.4] = 0.0
    weights[layout.starts()] = 0.0
    return ids, layout, weights


def reference_loss(model: PreTrainedModel, ids: Tensor, weights: Tensor) -> Tensor:
    """Every sequence by itself through transformers, log-softmax over all its logits."""
    total = torch.zeros(())
    for part, factors in zip(ids.split(LENGTHS), weights.split(LENGTHS), strict=True):
        logprobs = model(input_ids=part[None]).logits[0].float().log_softmax(-1)
        total = total - (logprobs[:-1].gather(1, part[1:, None])[:, 0] * factors[1:]).sum()
    return total


@pytest.mark.parametrize(
    "name",
    [
        "llama, tied",
        "llama, not tied",
        "gemma 2, capped logits",
        "granite, divided logits",
        "cohere, multiplied logits",
        "gpt2",
    ],
)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    ids, layout, weights = row()
    reference = model_of(name)
    reference.get_input_embeddings().padding_idx = None
    expected = reference_loss(reference, ids, weights)
    expected.backward()
    model = LanguageModel(model_of(name))
    loss = model(ids, layout, weights)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    actual_loss = dict(model.causal.named_parameters())
    for parameter, expected_loss in reference.named_parameters():
        torch.testing.assert_close(actual_loss[parameter].grad, expected_loss.grad, rtol=1e-4, atol=1e-4, msg=parameter)


def test_without_weights_every_next_token_counts() -> None:
    ids, layout, _ = row()
    every = torch.ones(sum(LENGTHS))
    every[layout.starts()] = 0.0
    model = LanguageModel(model_of("llama, tied"))
    assert float(model(ids, layout).detach()) == pytest.approx(float(model(ids, layout, every).detach()))


def test_bf16_gradients_of_a_tied_embedding_are_summed_in_fp32() -> None:
    """One token, five hundred times: in bf16 the sum of its row's gradient would stop growing at 256 equal terms."""
    ids = torch.full((500,), 7)
    layout = PackedLayout((500,))
    norms = {}
    for half in (None, torch.bfloat16):
        causal = LlamaForCausalLM(LlamaConfig(**{**SIZES, "max_position_embeddings": 512}, tie_word_embeddings=True))
        causal.load_state_dict(_small_state())
        model = LanguageModel(causal)
        named = dict(model.named_parameters())
        master_weights = MasterWeights(named, may_train=set(named), half=lambda _name, half=half: half)
        master_weights.begin()
        (model(ids, layout) / 499).backward()
        master_weights.finish()
        gradient = master_weights.parameters["causal.model.embed_tokens.weight"].grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        norms[half] = float(gradient[7].norm())
    assert norms[torch.bfloat16] == pytest.approx(norms[None], rel=0.01)


def _small_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "max_position_embeddings": 512}, tie_word_embeddings=True)
    ).state_dict()


def test_the_pad_tokens_row_learns_where_it_is_a_real_token() -> None:
    """Many models pad with their end token; here no pads are fed, so its embedding has its gradient."""
    ids, layout = torch.tensor([5, 0, 9, 0, 11]), PackedLayout((5,))
    causal = model_of("llama, not tied")
    LanguageModel(causal)(ids, layout).backward()
    gradient = causal.get_input_embeddings().weight.grad
    assert float(gradient[0].abs().sum()) > 0


def test_an_output_layer_with_a_bias_is_refused() -> None:
    names = ("num_key_value_heads", "pad_token_id")
    causal = PhiForCausalLM(PhiConfig(**{key: value for key, value in SIZES.items() if key not in names}))
    with torch.no_grad():
        causal.lm_head.bias.fill_(0.5)
    with pytest.raises(UserError, match="an unsupported way"):
        LanguageModel(causal)


def test_a_model_that_sees_what_comes_is_refused(tmp_path: Path, pico_tokenizer: Path) -> None:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    bert = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    with pytest.raises(UserError, match="attends to later tokens"):
        LanguageModel(BertLMHeadModel(bert))
    BertModel(bert).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(pico_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing|does not fill|attends to later tokens"):
        LanguageModel(load_pretrained(str(tmp_path), causal=True).model)


@pytest.mark.parametrize("bare_names", [False, True])
def test_a_single_file_fills_a_causal_model(tmp_path: Path, pico_folder: Path, bare_names: bool) -> None:
    """With the names of the whole model or of its base; a tied output embedding may be absent, an untied one not."""
    tensors = load_file(pico_folder / "model.safetensors")
    whole = load_pretrained(str(pico_folder), causal=True).model
    tied = whole.config.tie_word_embeddings
    if bare_names:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((pico_folder / name).read_bytes())
    save_file(tensors, tmp_path / "weights.safetensors")
    opened = load_pretrained(str(tmp_path / "weights.safetensors"), causal=True).model
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(opened.state_dict()[name], tensor)
    assert not tied
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_pretrained(str(tmp_path / "weights.safetensors"), causal=True)


def test_a_folder_out_and_in(tmp_path: Path, pico_folder: Path) -> None:
    opened = open_language_model(str(pico_folder))
    assert opened.description == {}
    before = opened.model.state_dict()["model.norm.weight"].clone()
    save_language_model(
        tmp_path / "run" / "model", opened.model, opened.tokenizer, {"precision": "fp32", "stop_tokens": [2, 5]}
    )
    again = open_language_model(str(tmp_path / "run"))
    assert again.description["stop_tokens"] == [2, 5]
    assert again.model.generation_config is not None
    assert again.model.generation_config.eos_token_id == [2, 5]
    torch.testing.assert_close(again.model.state_dict()["model.norm.weight"], before)
