"""LoRA starts as the unchanged model, merges exactly, and peft opens what is saved; freezing takes the right layers."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from pico_runs import class_rows, config_of, prepared, save_pico, train
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.config.sections import LoraSection
from loopos.models.active_adapters import active_adapter
from loopos.models.adapters import add_lora, freeze_lower, layer_list
from loopos.models.saved_adapters import merge_lora, save_lora

# peft reads a property that transformers has renamed; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 9, 3, 17, 8, 2]])


def tiny(architecture: str) -> PreTrainedModel:
    torch.manual_seed(3)
    configs = {
        "llama": LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
        ),
        "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2),
        "bert": BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
        ),
    }
    model = AutoModel.from_config(configs[architecture], dtype=torch.float32).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        states: Tensor = model(input_ids=IDS).last_hidden_state
    return states


def disturb(model: nn.Module) -> None:
    """Gives the adapters values as training would."""
    generator = torch.Generator().manual_seed(7)
    changed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                changed += 1
    assert changed >= 12


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_an_adapted_model_starts_unchanged_merges_and_opens_with_peft(architecture: str, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = LoraSection(rank=3, alpha=12.0)
    model = tiny(architecture)
    model.save_pretrained(tmp_path / "base")
    before = hidden(model)
    add_lora(model, lora, seed=1)
    torch.testing.assert_close(hidden(model), before, atol=0, rtol=0)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    disturb(model)
    adapted = hidden(model)
    assert (adapted - before).abs().max() > 0.05
    save_lora(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    merge_lora(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert set(model.state_dict()) == set(tiny(architecture).state_dict())
    torch.testing.assert_close(hidden(model), adapted, atol=1e-5, rtol=0)
    opened = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(hidden(opened), adapted, atol=1e-5, rtol=0)


def test_an_adapter_folder_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora, folder = tiny("llama"), LoraSection(rank=2), tmp_path / "adapter"
    add_lora(model, lora, seed=0)
    save_lora(model, folder, base="base")
    before = (folder / "adapter_model.safetensors").read_bytes()
    add_lora(other := tiny("llama"), lora, seed=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("loopos.models.saved_adapters.save_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            save_lora(other, folder, base="base")
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    save_lora(other, folder, base="base")
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loopos-manifest.json",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("active", ["default", "other", None])
def test_outputs_and_gradients_are_those_of_pefts_own_layers(architecture: str, active: str | None) -> None:
    """Under two adapters too, of which one is active or none; of a copy as of the model itself."""
    model = tiny(architecture)
    for number, name in enumerate(("other", "default")):
        add_lora(model, LoraSection(rank=3, alpha=4, target_modules="all-linear"), seed=number, name=name)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.3)

    def found(one: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        one.zero_grad()
        with active_adapter(one, active):
            hidden: Tensor = one(input_ids=IDS).last_hidden_state
        if hidden.requires_grad:
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
            (hidden * weights).sum().backward()
        return hidden.detach(), {name: p.grad for name, p in one.named_parameters() if p.grad is not None}

    twin = copy.deepcopy(model)
    actual_output, of_twin = found(model), found(twin)
    lean = [module for module in model.modules() if type(module).__name__ == "LeanLinear"]
    for module in lean:
        module.__class__ = type(module).__bases__[0]
    expected = found(model)
    assert torch.equal(actual_output[0], of_twin[0])
    torch.testing.assert_close(actual_output[0], expected[0], rtol=1e-5, atol=1e-6)
    assert actual_output[1].keys() == expected[1].keys()
    assert bool(expected[1]) == (active == "default")
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual_output[1][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    assert lean


def test_the_merged_weight_by_hand() -> None:
    model = tiny("llama")
    name = "layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    add_lora(model, LoraSection(rank=2, alpha=6.0, target_modules=["up_proj"]), seed=1)
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.copy_(torch.arange(48.0).view(24, 2) / 48)
    # alpha / rank = 3.
    expected = weight + 3.0 * (b.detach() @ a.detach())
    merge_lora(model)
    torch.testing.assert_close(model.get_submodule(name).weight, expected)


def test_names_that_no_layer_has_are_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"training\.lora\.target_modules.*down_proj.*q_proj"):
        add_lora(tiny("llama"), LoraSection(target_modules=["query"]), seed=1)


def test_the_same_seed_gives_the_same_adapters_without_the_global_generator() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(11)
        model = tiny("gpt2")
        state = torch.get_rng_state()
        add_lora(model, LoraSection(rank=2), seed=4)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append({name: p.detach() for name, p in model.named_parameters() if "lora_A" in name})
    assert len(drawn[0]) == 12
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


@pytest.mark.parametrize(
    ("architecture", "frozen_prefixes"),
    [
        ("llama", ("embed_tokens.", "layers.0.", "layers.1.")),
        ("gpt2", ("wte.", "wpe.", "h.0.", "h.1.")),
        ("bert", ("embeddings.", "encoder.layer.0.", "encoder.layer.1.")),
    ],
)
def test_freezing_takes_the_embeddings_and_the_lowest_layers(
    architecture: str, frozen_prefixes: tuple[str, ...]
) -> None:
    model = tiny(architecture)
    assert len(layer_list(model)) == 3
    initially_frozen = freeze_lower(model, 2)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(frozen_prefixes)}
    assert len(initially_frozen) == len(frozen)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_adapter_of_a_run_is_its_model(tmp_path: Path, pico_tokenizer: Path) -> None:
    """The exported model, and the base under the exported adapter, give equal hidden states."""
    from peft import PeftModel

    weights = save_pico("gpt2", tmp_path / "gpt2", pico_tokenizer)
    settings = {"trainable": "lora", "lora": {"rank": 4, "dropout": 0.1}, "num_epochs": 1}
    train(config_of(tmp_path / "run", weights, class_rows(24), training=settings))
    merged = AutoModel.from_pretrained(tmp_path / "run" / "model").eval()
    base = AutoModel.from_pretrained(weights)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(hidden(adapted), hidden(merged), atol=1e-5, rtol=0)
    assert (hidden(merged) - hidden(AutoModel.from_pretrained(weights).eval())).abs().max() > 1e-3


def test_only_adapters_and_head_are_in_the_checkpoint(tmp_path: Path, pico_folder: Path) -> None:
    tuner = prepared(config_of(tmp_path / "run", pico_folder, class_rows(16), training={"trainable": "lora"}))
    names = set(tuner.trained.master_weights.parameters)
    assert len(names) == 2 * 2 * 7 + 1
    assert all("lora_" in name or name == "head.weight" for name in names)
