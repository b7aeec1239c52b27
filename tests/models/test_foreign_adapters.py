"""Adapters that peft wrote, of every kind: as a model they answer as under peft, or are refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from loopos.config.faults import UserError
from loopos.config.merge import MergeConfig
from loopos.deploy.export import export
from loopos.deploy.export_settings import ExportSettings
from loopos.deploy.merge import merge
from loopos.models.language_folder import open_language_model
from loopos.models.load import load_pretrained

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[3, 390, 17, 8, 250, 395, 44, 399, 5, 120]])
ADDED = torch.tensor([[3, 400, 17, 401, 250]])
LINEAR = ["q_proj", "v_proj", "up_proj"]


def lora(**named: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": LINEAR, **named}


KINDS: dict[str, dict[str, Any]] = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"layers.0.*q_proj": 2, "v_proj": 6}, alpha_pattern={"^model.layers.1.*q_proj": 3, "up_proj": 20}),
    "target pattern": lora(target_modules=r".*layers\.1\..*(q|k)_proj"),
    "layers_to_transform": lora(layers_to_transform=[1]),
    "excluded": lora(exclude_modules=["model.layers.0.self_attn.q_proj"]),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa with rslora": lora(init_lora_weights="pissa", use_rslora=True),
    "olora": lora(init_lora_weights="olora"),
    "loftq": lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "bias": lora(bias="all", target_modules=["q_proj"]),
    "lora_only": lora(bias="lora_only", target_modules=["q_proj"]),
    "lora_bias": lora(lora_bias=True, target_modules=["q_proj"]),
    "norms": lora(modules_to_save=["norm"]),
    "head": lora(modules_to_save=["lm_head"]),
    "embeddings": lora(modules_to_save=["embed_tokens"]),
    "embeddings and head": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "lora on embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "lora on the head": lora(target_modules=["lm_head", "q_proj"]),
    "trainable tokens": lora(trainable_token_indices=[3, 8, 399]),
    "tokens of two": lora(trainable_token_indices={"embed_tokens": [3, 8]}),
    "parameters": lora(target_modules=None, target_parameters=["mlp.up_proj.weight"]),
    "replicated layers": lora(layer_replication=[[0, 2], [1, 2]]),
    "adalora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 9, "target_modules": LINEAR},
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "loha": {"peft_type": "LOHA", "r": 4, "alpha": 8, "target_modules": LINEAR},
    "lokr": {"peft_type": "LOKR", "r": 2, "alpha": 8, "target_modules": LINEAR},
    "vera": {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj", "o_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 8, "r": 0, "target_modules": LINEAR},
    "boft": {"peft_type": "BOFT", "boft_block_size": 8, "target_modules": ["q_proj"]},
    "hra": {"peft_type": "HRA", "r": 4, "target_modules": LINEAR},
    "fourierft": {"peft_type": "FOURIERFT", "n_frequency": 20, "target_modules": LINEAR},
    "miss": {"peft_type": "MISS", "r": 4, "target_modules": ["q_proj"]},
    "ln_tuning": {"peft_type": "LN_TUNING", "target_modules": ["norm", "input_layernorm"]},
    "tokens only": {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": [3, 8]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A pico Llama with biases in its attention, with an output embedding of its own or the input's."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    model = AutoModelForCausalLM.from_pretrained(pico_folder)
    config = model.config
    config.tie_word_embeddings, config.attention_bias = request.param == "tied", True
    torch.manual_seed(5)
    made = type(model)(config)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_folder).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, *, rows: int | None = None, task: str | None = "CAUSAL_LM", **named: Any) -> Path:
    """An adapter that training has changed, saved by peft."""
    from peft import PeftConfig, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    torch.manual_seed(1)
    kind: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[named.pop("peft_type")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = get_peft_model(model, kind(task_type=task, **named), autocast_adapter_dtype=False)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.08 * torch.randn(parameter.shape)
        adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def under_peft(base: Path, folder: Path, ids: Tensor = IDS, rows: int | None = None) -> Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        found: Tensor = PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=ids).logits
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids).logits
    return found


def opened(folder: Path) -> PreTrainedModel:
    """As transformers opens it, with no weight missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def merged(models: list[Path], out: Path, **named: Any) -> Path:
    recipe = {"method": "linear", "models": [{"model": str(each)} for each in models], "output_dir": str(out)}
    merge(MergeConfig.model_validate({**recipe, **named}))
    return out


def saved(model: PreTrainedModel, out: Path) -> Path:
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_answers_as_under_peft(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", **KINDS[kind])
    expected = under_peft(base, adapter)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.02
    folded = load_pretrained(str(adapter), causal=True).model
    assert all(parameter.requires_grad for parameter in folded.parameters())
    torch.testing.assert_close(logits(folded), expected, atol=1e-4, rtol=1e-4)
    reopened = opened(saved(folded, tmp_path / "saved"))
    torch.testing.assert_close(logits(reopened), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(opened(merged([adapter], tmp_path / "out"))), expected, atol=1e-4, rtol=1e-4)
