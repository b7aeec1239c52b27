"""Writes the trained adapter as a PEFT folder over the base, and merges it into the weights.

Letters: A, B the matrices of an adapter, s its scale alpha / r (alpha / √r for rsLoRA), r its rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.models.active_adapters import ADAPTER, RESIDUAL, peft_config_of
from loopos.models.adapter_folder import ADAPTER_WEIGHTS, PREFIX, AdapterFolder, is_adapter, open_adapter_folder
from loopos.storage.tensor_files import save_tensors
from loopos.storage.whole_folder import whole_folder

# Imported lazily at run time: it takes seconds.
if TYPE_CHECKING:
    from peft import LoraConfig


def merge_lora(model: PreTrainedModel) -> None:
    """Merges every adapter into its layer, W ← W + (alpha/rank)·B·A, and removes the wrappers, in place.

    The model is cast to fp32 first: a low-rank change is small relative to the weights, and bf16 would round much of it
    away.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    # Wrappers over the tensors of one module are nested: each merges its own, and the outermost is removed.
    for module in reversed(wrappers.values()):
        module.merge(safe_merge=True)
    for name, module in wrappers.items():
        parent_name, _, child = name.rpartition(".")
        if parent_name not in wrappers:
            setattr(model.get_submodule(parent_name), child, module.get_base_layer())


def save_lora(
    model: PreTrainedModel,
    folder: Path,
    *,
    base: str,
    task: str = "FEATURE_EXTRACTION",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`) for the base model; replaces
    the folder atomically. task: peft's task type ("CAUSAL_LM" for a language model). Raises `OSError` when the disk is
    full.

    An adapter whose start was taken out of the base is written as one over the base itself, of twice the rank:
    B·A − B₀·A₀ = [B | −B₀]·[A; A₀] (as peft converts it). So is one over a base that is itself an adapter's folder: the
    two are one adapter over the weights under both, where both are plain LoRA. Embeddings with rows that train are
    written with it, and the tokenizer whose tokens they are, as peft does for a larger vocabulary.
    """
    config = dataclasses.replace(peft_config_of(model), task_type=task)
    tensors = adapter_tensors(model, ADAPTER)
    assert tensors, "no adapter in the model"
    if start := adapter_tensors(model, RESIDUAL):
        config = _of_twice_the_rank(config)
        for name, other in start.items():
            down = ".lora_A." in name
            tensors[name] = torch.cat([tensors[name], other if down else -other], dim=0 if down else 1)
    while is_adapter(base) and (whole := _over_both(model, config, tensors, open_adapter_folder(base))) is not None:
        config, tensors, base = whole
    config = dataclasses.replace(config, base_model_name_or_path=base)
    rows = {PREFIX + name: each.detach() for name, each in model.named_parameters() if _trains_rows(model, each)}
    with whole_folder(folder) as partial:
        save_tensors(partial / ADAPTER_WEIGHTS, {**tensors, **rows})
        if rows and tokenizer is not None:
            tokenizer.save_pretrained(partial)
        config.save_pretrained(str(partial))


def _trains_rows(model: PreTrainedModel, parameter: nn.Parameter) -> bool:
    modules = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    weights = [module.weight for module in modules if module is not None and hasattr(module, "weight")]
    return parameter.requires_grad and any(parameter is each for each in weights)


def _over_both(
    model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor], under: AdapterFolder
) -> tuple[LoraConfig, dict[str, Tensor], str] | None:
    """The adapter `tensors` and the one of the folder under it as one: [B | B′·s′/s]·[A; A′], with its base. None where
    they cannot be: one of them is more than LoRA, or the lower one changes what the model does not have.
    """
    if under.beyond_lora or config.use_dora or under.base is None:
        return None
    lower, modules = under.lora_pairs(), dict(model.named_modules())
    if any(name not in modules for name in lower):
        return None
    ranks, alphas, found = {}, {}, {}
    own = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    for name in dict.fromkeys([*own, *lower]):
        downs, ups, scale = [], [], lower[name][2] if name in lower else 0.0
        if name in own:
            scale = _scale(config, name, tensors[f"{PREFIX}{name}.lora_A.weight"])
            downs, ups = [tensors[f"{PREFIX}{name}.lora_A.weight"]], [tensors[f"{PREFIX}{name}.lora_B.weight"]]
        if name in lower:
            down, up, other = lower[name]
            downs.append(down.read())
            ups.append(up.read() * (other / scale))
        found[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([each.float().cpu() for each in downs])
        found[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([each.float().cpu() for each in ups], dim=1)
        ranks[name] = sum(len(each) for each in downs)
        alphas[name] = scale * ranks[name]
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = dataclasses.replace(
        config,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft's own code divides it; only its annotation says int
        target_modules=list(ranks),
        rank_pattern={name: each for name, each in ranks.items() if each != rank},
        alpha_pattern={name: each for name, each in alphas.items() if each != alpha},
        use_rslora=False,
        init_lora_weights=True,
    )
    return config, found, under.base


def _scale(config: LoraConfig, name: str, down: Tensor) -> float:
    """s of one module: its alpha / its rank, or / the root of the rank."""
    by_name = [a for own, a in (config.alpha_pattern or {}).items() if name == own or name.endswith(f".{own}")]
    alpha = by_name[0] if by_name else config.lora_alpha
    return float(alpha) / (math.sqrt(len(down)) if config.use_rslora else len(down))


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter under the names of its PEFT folder."""
    # A DoRA length is a module of peft's whose file has only its name.
    return {
        PREFIX + key.replace(f".{name}", "").replace("_magnitude_vector.weight", "_magnitude_vector"): value.detach()
        for key, value in model.named_parameters()
        if ".lora_" in key and f".{name}." in key
    }


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The config of the same scale at twice the rank, and without a start of its own."""
    factor = math.sqrt(2.0) if config.use_rslora else 2.0
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,  # type: ignore[arg-type]  # as in `_lora_config`
        rank_pattern={name: 2 * rank for name, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()},
        init_lora_weights=True,
    )
