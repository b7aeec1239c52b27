"""Variants of LoRA beside peft's own: the same layers, outputs and gradients; folders that peft opens over the base."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pico_runs import slow_but
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.config.sections import LoraSection
from loopos.models.active_adapters import RESIDUAL, active_adapter
from loopos.models.adapters import add_lora
from loopos.models.backbone import headless
from loopos.models.saved_adapters import merge_lora, save_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 9, 3, 17, 8, 2]])
# Our settings → those of peft.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "pissa": ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa by iterations": ({"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "pissa_niter_4"}),
    "olora": ({"init_lora_weights": "olora"}, {"init_lora_weights": "olora"}),
    "gaussian": ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "pissa with rslora": (
        {"init_lora_weights": "pissa", "use_rslora": True},
        {"init_lora_weights": "pissa", "use_rslora": True},
    ),
    "pissa with dora": (
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "pissa", "use_dora": True},
    ),
    "pissa with patterns": (
        {"init_lora_weights": "pissa", "rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 20.0}},
        {"init_lora_weights": "pissa", "rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 20.0}},
    ),
    "patterns": (
        {"rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 20.0}},
        {"rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 20.0}},
    ),
}
# The others combine these.
QUICK = ["rslora", "dora", "pissa", "olora", "patterns"]
CHANGED_BASE = [name for name, (ours, _) in VARIANTS.items() if ours.get("init_lora_weights", "gaussian") != "gaussian"]


def tiny(architecture: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if architecture == "llama":
        config: Any = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            attention_bias=True,
        )  # fmt: skip
    else:
        zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2, **zero)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        # The initial values are so small that a rank-4 change would be all of them.
        parameter.data.normal_(0.0, 0.2)
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def disturb(model: nn.Module) -> int:
    """Changes what trains as training would; returns how many tensors did."""
    generator, changed = torch.Generator().manual_seed(7), 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
                changed += 1
    return changed


def adapted(architecture: str, **settings: Any) -> PreTrainedModel:
    """A causal language model with adapters on its headless model, as a run has them."""
    model = tiny(architecture)
    model.requires_grad_(False)
    add_lora(headless(model), LoraSection(rank=4, alpha=12.0, **settings), seed=1)
    return model


@pytest.mark.parametrize(
    ("architecture", "variant"),
    slow_but(
        [("llama", each) for each in QUICK] + [("gpt2", "pissa with dora")],
        [("llama", each) for each in VARIANTS] + [("gpt2", each) for each in VARIANTS if each != "olora"],
    ),
)
def test_it_starts_unchanged_merges_and_opens_over_the_base(variant: str, architecture: str, tmp_path: Path) -> None:
    base = tiny(architecture)
    base.save_pretrained(tmp_path / "base")
    before = logits(base)
    model = adapted(architecture, **VARIANTS[variant][0])
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name and ".default." in name}
    assert disturb(model) >= 12
    after = logits(model)
    assert (after - before).abs().max() > 0.1
    save_lora(model, tmp_path / "adapter", base=str(tmp_path / "base"), task="CAUSAL_LM")
    merge_lora(model)
    assert set(model.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(logits(model), after, atol=2e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
    torch.testing.assert_close(logits(opened.eval()), after, atol=2e-4, rtol=0)


@pytest.mark.parametrize("variant", slow_but(QUICK, VARIANTS))
def test_outputs_and_gradients_are_those_of_peft(variant: str) -> None:
    """The same start from the same seed, and the same outputs and gradients after a change."""
    ours, theirs = VARIANTS[variant]
    model = adapted("llama", **ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = tiny("llama")
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **theirs)
        twin = get_peft_model(base, config).eval()
    own = {name: each for name, each in model.named_parameters() if each.requires_grad}
    other = {name.removeprefix("base_model.model."): e for name, e in twin.named_parameters() if e.requires_grad}
    assert own.keys() == other.keys()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter, other[name], atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            other[name].copy_(parameter)
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-4, rtol=1e-4)
    for each in (model, twin):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in own.items():
        largest = float(other[name].grad.abs().max())
        assert largest > 0
        torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-4 * largest, rtol=1e-3)


@pytest.mark.parametrize("variant", CHANGED_BASE)
def test_the_reference_is_the_start_although_the_weights_are_not(variant: str) -> None:
    """What was taken out of the base is a frozen adapter: with it the model is its start, whatever trains."""
    base = tiny("llama")
    model = adapted("llama", **VARIANTS[variant][0])
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    own = base.get_submodule("model.layers.1.mlp.up_proj")
    assert (layer.base_layer.weight - own.weight).abs().max() > 0.05
    start = logits(model)
    with active_adapter(model, None):
        reference = logits(model)
    if "dora" in variant:
        torch.testing.assert_close(reference, start, atol=1e-5, rtol=0)
    else:
        assert torch.equal(reference, start)
    disturb(model)
    with active_adapter(model, None):
        assert torch.equal(logits(model), reference)
    assert not torch.equal(logits(model), reference)
    residual = [name for name, _ in model.named_parameters() if f".{RESIDUAL}." in name]
    assert len(residual) == 2 * 7 * 3


def test_a_dora_of_twice_the_rank_by_hand(tmp_path: Path) -> None:
    """The written folder, opened by hand: m·(W + s·B·A) / ‖W + s·B·A‖ over the weight of the base."""
    from safetensors.torch import load_file

    model = adapted("llama", init_lora_weights="pissa", use_dora=True)
    disturb(model)
    save_lora(model, tmp_path, base="base", task="CAUSAL_LM")
    tensors, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 24.0, True)
    name = "model.layers.2.self_attn.k_proj"
    weight = tiny("llama").get_submodule(name).weight.detach()
    a, b, m = (tensors[f"base_model.model.{name}.lora_{part}"] for part in ("A.weight", "B.weight", "magnitude_vector"))
    whole = weight + 3.0 * b @ a
    expected = m[:, None] * whole / whole.norm(dim=1, keepdim=True)
    merge_lora(model)
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), expected, atol=1e-5, rtol=1e-4)


def test_the_norms_of_dora_are_exact_in_bf16() -> None:
    """Adapters that change nothing scale no output, in the format that training uses."""
    model = adapted("llama", use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude_vector" not in name:
            parameter.data = parameter.data.bfloat16()
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        ours, plain = layer(x), layer.base_layer(x)
        exact = layer.lora_magnitude_vector["default"]
        exact.__class__ = type(exact).__bases__[0]
        theirs = layer(x)
    ours_off, theirs_off = ((each.float() - plain.float()).abs().mean() for each in (ours, theirs))
    assert ours_off < 0.3 * theirs_off


@pytest.mark.parametrize(
    ("settings", "pattern", "number"),
    [
        ({"target_modules": r".*layers\.[02]\..*(q|v)_proj"}, r"layers\.[02]\..*(q|v)_proj", 4),
        ({"target_modules": r"model\.layers\.1\..*"}, r"layers\.1\.(self_attn|mlp)\..*", 7),
        ({"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}, r"(?!.*k_proj)(?!layers\.0\.mlp\.up_proj)layers.*", 17),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.1\..*"}, r"layers\.[02].*(q|o)_proj", 4),
    ],
)  # fmt: skip
def test_layers_are_chosen_by_names_and_expressions(
    settings: dict[str, Any], pattern: str, number: int, tmp_path: Path
) -> None:
    model = adapted("llama", **settings)
    found = {name.split(".lora_A")[0] for name, _ in headless(model).named_parameters() if ".lora_A." in name}
    names = [name for name, each in headless(tiny("llama")).named_modules() if type(each) is nn.Linear]
    assert found == {name for name in names if re.fullmatch(pattern, name)}
    assert len(found) == number
    # The folder names layers, so that it means the same ones under a model with another head.
    save_lora(model, tmp_path / "adapter", base="base", task="CAUSAL_LM")
    tiny("llama").save_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    theirs = {name.split(".lora_A")[0] for name, _ in opened.named_parameters() if ".lora_A." in name}
    assert theirs == {f"base_model.model.model.{name}" for name in found}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ".*query"}, "training.lora.target_modules: '.*query' matches no linear layer"),
        ({"rank_pattern": {"query": 2}}, "training.lora.rank_pattern: 'query' matches no layer with adapters"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"up_proj": 2.0}}, "training.lora.alpha_pattern: 'up_proj'"),
        ({"init_lora_weights": "pissa", "rank_pattern": {".*": 17}}, "training.lora.rank: got 17 for layers.0"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as problem:
        adapted("llama", **settings)
    assert message in str(problem.value)


@pytest.mark.parametrize("variant", ["pissa", "olora", "dora"])
def test_a_plan_counts_the_same_parameters(variant: str) -> None:
    """On shapes without numbers, as `loopos plan` and `--dry-run` build the model."""
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(tiny("llama").config, dtype=torch.float32)
    add_lora(headless(shapes), LoraSection(rank=4, alpha=12.0, **VARIANTS[variant][0]), seed=1)
    model = adapted("llama", **VARIANTS[variant][0])
    assert {name: each.shape for name, each in shapes.named_parameters()} == {
        name: each.shape for name, each in model.named_parameters()
    }


def test_olora_over_transposed_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r'training.lora.init_lora_weights: got "olora" for .* expected "pissa"'):
        adapted("gpt2", init_lora_weights="olora")


def test_a_copy_of_a_model_with_dora_computes_the_same() -> None:
    model = adapted("llama", use_dora=True)
    disturb(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
