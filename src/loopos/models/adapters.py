"""What trains: the head alone, all weights, the layers above N, or low-rank adapters (LoRA, through peft).

Enters: a headless transformers model. Leaves: the same with `requires_grad` set, or wrapped layers inside it. Left
out: optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from loopos.config.faults import UserError


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The transformer layers, lowest first. Raises `UserError` for a model without a plain stack of
    `num_hidden_layers` layers.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise UserError(
        f"{type(model).__name__}: no stack of {wanted} layers found, so layers cannot be frozen by number; use training.freeze_layers = 0"
    )


def freeze_lower(model: PreTrainedModel, num_layers: int) -> list[nn.Parameter]:
    """Freezes the embeddings and the lowest `num_layers` layers; returns what was frozen. Raises `UserError` when
    there are fewer layers.
    """
    layers = layer_list(model)
    if num_layers > len(layers):
        raise UserError(
            f"training.freeze_layers: given {num_layers}, wanted at most {len(layers)}, the layers of this {type(model).__name__}"
        )
    frozen = [
        p for module in [_embeddings(model), *layers[:num_layers]] for p in module.parameters() if p.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _embeddings(model: PreTrainedModel) -> nn.Module:
    """Token embeddings, or for encoders and GPT-2 whatever holds token, position and type embeddings together."""
    for name in ("embeddings", "wpe"):
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return module if name == "embeddings" else nn.ModuleList([model.get_input_embeddings(), module])
    return model.get_input_embeddings()


def add_lora(
    model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, target_modules: str | Sequence[str], seed: int
) -> None:
    """Freezes the model and puts `W + (alpha/rank)·B·A` in the place of each target linear layer (Hu et al. 2021), in
    place.

    B starts at 0, so the model starts unchanged. Raises `UserError` when no module has a name that was asked for.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    if targets == "all-linear":
        targets = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)})
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
    except ValueError as problem:
        names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)})
        raise UserError(
            f"training.lora.target_modules: {problem}; linear layers of this {type(model).__name__}: {', '.join(names)}"
        ) from problem


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def merge_lora(model: PreTrainedModel) -> None:
    """Folds every adapter into its layer, W ← W + (alpha/rank)·B·A, and takes the wrappers out, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, module.get_base_layer())


def save_lora(model: PreTrainedModel, folder: Path, *, base: str, rank: int, alpha: float, dropout: float) -> None:
    """Writes a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`) that peft opens over the
    base model.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    )
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            tensors["base_model.model." + name.replace(".default", "")] = parameter.detach().contiguous().cpu()
    assert tensors, "no adapter in the model"
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        base_model_name_or_path=base,
        task_type="FEATURE_EXTRACTION",
    ).save_pretrained(folder)
