"""Sets what trains: only the head, all weights, the layers above N, or LoRA adapters (peft). Also loads, merges and
saves adapters.

peft is imported lazily: it takes seconds, and only runs with adapters need it. `lora_layers` has the products of a
layer, `active_adapters` which adapters run.
Letters: K inputs, N outputs, r rank, s = alpha / r.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loopos.config.diagnostics import UserError
from loopos.config.sections import LoraSection, TrainingSection
from loopos.models.active_adapters import ADAPTER, RESIDUAL, activate
from loopos.models.adapter_folder import ADAPTER_WEIGHTS, PREFIX, open_adapter_folder
from loopos.models.lora_layers import make_lean
from loopos.storage.tensor_files import save_tensors
from loopos.storage.whole_folder import whole_folder

# Imported lazily at run time: see the module docstring.
if TYPE_CHECKING:
    from peft import LoraConfig


def set_trained(model: PreTrainedModel, settings: TrainingSection) -> list[nn.Parameter]:
    """Sets `requires_grad` on a headless model, in place; returns the parameters that `freeze_layers` freezes."""
    if settings.trainable == "lora":
        add_lora(model, settings.lora or LoraSection(), seed=settings.seed)
    elif settings.trainable == "head":
        model.requires_grad_(False)
    elif settings.freeze_layers:
        return freeze_lower(model, settings.freeze_layers)
    return []


def set_trained_language_model(
    causal: PreTrainedModel, base: PreTrainedModel, settings: TrainingSection
) -> list[nn.Parameter]:
    """`set_trained` for a causal language model and its headless base. With adapters the output embedding is frozen."""
    if settings.trainable == "lora":
        causal.requires_grad_(False)
    return set_trained(base, settings)


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers, lowest first. Raises `UserError` for a model without a list of `num_hidden_layers`
    layers.
    """
    expected = model.config.get_text_config().num_hidden_layers
    if (found := find_layers(model, expected)) is not None:
        return found
    raise UserError(
        f"{type(model).__name__}: no stack of {expected} layers found, so layers cannot be frozen by number; use "
        "training.freeze_layers = 0"
    )


def find_layers(model: nn.Module, expected: int) -> nn.ModuleList | None:
    """The first module list with `expected` members."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((each for each in lists if len(each) == expected), None)


def freeze_lower(model: PreTrainedModel, num_layers: int) -> list[nn.Parameter]:
    """Freezes the embeddings and the lowest `num_layers` layers; returns the frozen parameters. Raises `UserError` if
    there are fewer layers.
    """
    layers = layer_list(model)
    if num_layers > len(layers):
        raise UserError(
            f"training.freeze_layers: got {num_layers}, expected at most {len(layers)}, the layers of this "
            f"{type(model).__name__}"
        )
    initially_frozen = [*_embeddings(model, layers), *layers[:num_layers]]
    frozen = [parameter for module in initially_frozen for parameter in module.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _embeddings(model: PreTrainedModel, layers: nn.ModuleList) -> list[nn.Module]:
    """Everything before the layers: an encoder's module `embeddings` (with its norm), else all embeddings outside the
    layers.
    """
    together = getattr(model, "embeddings", None)
    if isinstance(together, nn.Module):
        return [together]
    inside = set(layers.modules())
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module not in inside]


def add_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int, name: str = ADAPTER) -> None:
    """Freezes the model, including earlier adapters, and replaces each target linear layer by `W + s·B·A` (Hu et al.
    2021) or a variant of it, in place: rsLoRA (s = alpha / √r, Kalajdzievski 2023), DoRA (Liu et al. 2024), PiSSA (Meng
    et al. 2024) and OLoRA (Büyükakyüz 2024).

    The model's outputs do not change: B starts at 0, or B₀·A₀ is taken out of W and kept as the frozen adapter
    `RESIDUAL`. Raises `UserError` if no module has a requested name, and for a rank that the start does not have.
    """
    model.requires_grad_(False)
    config = _lora_config(model, lora)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _inject(config, model, name)
            if moves_base(lora):
                _check_ranks(model, lora)
                _keep_start(model, RESIDUAL)
    except ValueError as problem:
        reason = str(problem).splitlines()[0]
        key = "training.lora.target_modules" if "arget module" in reason else "training.lora"
        raise UserError(f"{key}: {reason}; {_linear_layers(model)}") from problem


def moves_base(lora: LoraSection) -> bool:
    """Whether the adapters' start is taken out of the base."""
    return isinstance(lora.init_lora_weights, str) and lora.init_lora_weights.startswith(("pissa", "olora"))


def _check_ranks(model: PreTrainedModel, lora: LoraSection) -> None:
    """Raises `UserError` for a rank above the sides of a weight, which has no more singular vectors."""
    for name, module in model.named_modules():
        if ADAPTER in getattr(module, "lora_A", ()):
            layer: Any = module
            rank, found = layer.r[ADAPTER], min(layer.in_features, layer.out_features)
            if rank > found:
                raise UserError(
                    f"training.lora.rank: got {rank} for {name}, a weight with a side of {found}; expected at most "
                    f'{found} with init_lora_weights "{lora.init_lora_weights}" (rank_pattern sets it by layer)'
                )


@torch.no_grad()
def _keep_start(model: PreTrainedModel, name: str) -> None:
    """Adds a frozen copy of the trained adapter as it is now, in place. As `RESIDUAL` it is only B·A."""
    own = _peft_config(model)
    dora = own.use_dora and name != RESIDUAL
    _inject(dataclasses.replace(own, init_lora_weights=True, lora_dropout=0.0, use_dora=dora), model, name)
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        if f".{name}." in key:
            parameter.copy_(parameters[key.replace(f".{name}.", f".{ADAPTER}.")])
    activate(model, [ADAPTER])


def _peft_config(model: nn.Module) -> LoraConfig:
    """The config of the trained adapter as peft resolved it: it may replace layer names by names of fused tensors."""
    known = (getattr(module, "peft_config", None) for module in model.modules())
    found: LoraConfig = next(configs[ADAPTER] for configs in known if isinstance(configs, dict))
    return found


def _linear_layers(model: nn.Module) -> str:
    return f"linear layers of this {type(model).__name__}: {', '.join(linear_names(model))}"


def linear_names(model: nn.Module) -> list[str]:
    """Names of a model's linear layers for `target_modules`, including those under adapters: the last part of the
    module name, with more parts if other modules end with the same part.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules())
    wrapped = {name for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    linear = {
        name
        for name, module in modules.items()
        if name in wrapped
        or (_is_linear(module) and not any(name.startswith(f"{outer}.") for outer in _outer(name, wrapped)))
    }
    inside = {name for name in modules if _outer(name, wrapped)}
    others = [name for name in modules if name not in linear | inside]
    return sorted({_shortest_suffix(name, others) for name in linear})


def _shortest_suffix(name: str, others: Sequence[str]) -> str:
    """The shortest suffix of a module's name, in whole parts, that no other name ends with."""
    parts = name.split(".")
    suffixes = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
    taken = {end for other in others for end in _ends(other)}
    return next((suffix for suffix in suffixes if suffix not in taken), name)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _outer(name: str, wrapped: set[str]) -> list[str]:
    """The wrapped layers that contain a module."""
    parts = name.split(".")
    return [outer for end in range(1, len(parts)) if (outer := ".".join(parts[:end])) in wrapped]


def _inject(config: LoraConfig, model: PreTrainedModel, name: str) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # Several adapters over one copy of the weights are intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name)
    make_lean(model)


def _is_linear(module: nn.Module) -> bool:
    """Whether the layer is exactly a matrix product. Subclasses may do more, such as one product per group."""
    return type(module) in (nn.Linear, Conv1D)


def _lora_config(model: PreTrainedModel, lora: LoraSection) -> LoraConfig:
    """The config for peft, with every expression resolved to names: a written folder then means the same layers
    wherever the model has a head. Raises `UserError` for names and expressions without a layer.
    """
    from peft import LoraConfig

    targets = linear_names(model) if lora.target_modules == "all-linear" else lora.target_modules
    names = _adapted(model, targets, lora.exclude_modules)
    if isinstance(targets, str) or lora.exclude_modules is not None:
        if not names:
            raise UserError(
                f"training.lora.target_modules: {lora.target_modules!r} matches no linear layer that exclude_modules "
                f"leaves; {_linear_layers(model)}"
            )
        targets = names
    modules = dict(model.named_modules())
    # peft must know about layers with transposed weights, such as GPT-2's.
    transposed = any(_is_transposed(modules[name]) for name in names)
    if transposed and lora.init_lora_weights == "olora":
        raise UserError(
            f'training.lora.init_lora_weights: got "olora" for {type(model).__name__}, whose weights are stored '
            'transposed, which peft\'s decomposition does not know; expected "pissa"'
        )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's own code divides it; only its annotation says int
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        rank_pattern=_by_name("rank_pattern", lora.rank_pattern, names),
        alpha_pattern=_by_name("alpha_pattern", lora.alpha_pattern, names),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,  # type: ignore[arg-type]  # checked with the config
        fan_in_fan_out=transposed,
    )


def _adapted(model: PreTrainedModel, targets: Sequence[str] | str, exclude: Sequence[str] | str | None) -> list[str]:
    """The names of the modules that get adapters, as peft chooses them. An expression matches a whole name, with or
    without the name of the headless model ("model.layers.0…"), and only layers that can be adapted.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules())
    wrapped = {name for name, module in modules.items() if isinstance(module, BaseTunerLayer)}

    def chosen(name: str, patterns: Sequence[str] | str | None) -> bool:
        if isinstance(patterns, str):
            whole = (name, f"{model.base_model_prefix}.{name}")
            return any(re.fullmatch(patterns, each) is not None for each in whole)
        return any(name == each or name.endswith(f".{each}") for each in patterns or ())

    kinds = (nn.Linear, Conv1D, nn.Embedding, BaseTunerLayer)
    return [
        name
        for name, module in modules.items()
        if isinstance(module, kinds)
        and not _outer(name, wrapped)
        and chosen(name, targets)
        and not chosen(name, exclude)
    ]


def _by_name(key: str, patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Name of a module → value of the first expression that matches its end. Raises `UserError` for an expression that
    matches none.
    """
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        own = [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]
        if not own:
            raise UserError(
                f"training.lora.{key}: {pattern!r} matches no layer with adapters: {', '.join(names[:4])} …"
            )
        for name in own:
            found.setdefault(name, value)
    # peft takes the first name that another one ends with.
    return {name: found[name] for name in sorted(found, key=len, reverse=True)}


def _is_transposed(module: nn.Module) -> bool:
    base = getattr(module, "base_layer", module)
    return isinstance(base, Conv1D)


def load_adapter(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Adds the adapter of a PEFT folder to a model without training it, in place. Raises `UserError` for a folder
    without an adapter, one for other layers, and one that is more than LoRA, because the adapters share the base
    weights.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    adapter = open_adapter_folder(folder)
    if beyond := adapter.beyond_lora:
        raise UserError(
            f"{folder}: an adapter with {', '.join(beyond[:3])}, which cannot share its base with other adapters; "
            "expected plain LoRA"
        )
    adapter.check_patterns([each for each, _ in model.named_modules()])
    tensors = {key.removeprefix(PREFIX): stored.read() for key, stored in adapter.tensors.items()}
    try:
        _inject(LoraConfig.from_pretrained(str(folder)), model, name)
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
        wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{name}." in key)]
    except (ValueError, TypeError, KeyError, RuntimeError) as problem:
        wrong = [repr(problem) if not str(problem) else str(problem).splitlines()[-1].strip()]
    if wrong:
        raise UserError(f"{folder}: an adapter of other layers than this {type(model).__name__} has: {wrong[0]}")
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(False)


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


def save_lora(model: PreTrainedModel, folder: Path, *, base: str, task: str = "FEATURE_EXTRACTION") -> None:
    """Writes a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`) for the base model; replaces
    the folder atomically. task: peft's task type ("CAUSAL_LM" for a language model). Raises `OSError` when the disk is
    full.

    An adapter whose start was taken out of the base is written as one over the base itself, of twice the rank:
    B·A − B₀·A₀ = [B | −B₀]·[A; A₀] (as peft converts it).
    """
    config = dataclasses.replace(_peft_config(model), base_model_name_or_path=base, task_type=task)
    tensors = adapter_tensors(model, ADAPTER)
    assert tensors, "no adapter in the model"
    if start := adapter_tensors(model, RESIDUAL):
        config = _of_twice_the_rank(config)
        for name, other in start.items():
            down = ".lora_A." in name
            tensors[name] = torch.cat([tensors[name], other if down else -other], dim=0 if down else 1)
    with whole_folder(folder) as partial:
        save_tensors(partial / ADAPTER_WEIGHTS, tensors)
        config.save_pretrained(str(partial))


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
