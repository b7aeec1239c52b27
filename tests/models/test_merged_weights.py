"""The weights that an engine without adapters gets: those of the model's files, with the trained adapter merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import slow_but
from safetensors.torch import load, load_file
from test_lora_variants import VARIANTS, adapted, disturb, logits, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from loopos.models.active_adapters import ADAPTER, active_adapter
from loopos.models.merged_weights import merged_weights
from loopos.rl.workers.worker import packed
from loopos.storage.tensor_files import stream_chunks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def sent(model: PreTrainedModel) -> dict[str, Tensor]:
    """As the bytes of a safetensors file and back."""
    return load(packed(stream_chunks(*merged_weights(model))))


@pytest.mark.parametrize(
    ("architecture", "variant"),
    slow_but(
        [("llama", "patterns"), ("llama", "dora"), ("gpt2", "pissa with dora")],
        [(kind, each) for each in VARIANTS for kind in ("llama", "gpt2") if (kind, each) != ("gpt2", "olora")],
    ),
)
def test_they_are_the_policy_and_the_model_trains_on(architecture: str, variant: str) -> None:
    model = adapted(architecture, **VARIANTS[variant][0])
    disturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = sent(model)
    base = tiny(architecture)
    tied = {"lm_head.weight"} if base.config.tie_word_embeddings else set()
    assert set(weights) == {name for name, _ in base.named_parameters()} - tied
    missing, unexpected = base.load_state_dict(weights, strict=False)
    assert set(missing) <= tied
    assert not unexpected
    with active_adapter(model, ADAPTER):
        torch.testing.assert_close(logits(base), logits(model), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name and ".default." in name
    }


def test_in_bf16_the_sum_is_rounded_once() -> None:
    """W = 1 and s·B·A = 2⁻⁸ + 2⁻⁹ in two terms: 1.00586 lies nearer to 1 + 2⁻⁷ than to 1, the neighbors in bf16."""
    model: Any = adapted("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    layer = model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight.data.fill_(1.0)
    layer.lora_A.default.weight.data.zero_()[:2].fill_(1.0)
    layer.lora_B.default.weight.data.zero_()[:, 0] = 2.0**-8 / layer.scaling["default"]
    layer.lora_B.default.weight.data[:, 1] = 2.0**-9 / layer.scaling["default"]
    found = sent(model)["model.layers.0.self_attn.q_proj.weight"]
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, torch.full_like(found, 1 + 2.0**-7))


@pytest.mark.parametrize("architecture", ["llama", "experts"])
def test_without_adapters_they_are_the_tensors_of_the_files(architecture: str, tmp_path: Path) -> None:
    """Also where the model holds experts as one tensor, which files have one by one."""
    if architecture == "llama":
        model = tiny("llama")
    else:
        config = Qwen3MoeConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = sent(model)
    assert set(weights) == set(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in weights.items())
    if architecture == "experts":
        assert any(".experts.3." in name for name in weights)
