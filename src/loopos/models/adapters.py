"""Sets what trains: only the head, all weights, the layers above N, or LoRA adapters (peft). Also loads, merges and
saves adapters, and computes LoRA layers in fewer passes.

peft is imported lazily: it takes seconds, and only runs with adapters need it.
Letters: T tokens, K inputs, N outputs, r rank, s = alpha / r.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loopos.config.diagnostics import UserError
from loopos.config.sections import LoraSection, TrainingSection
from loopos.functional.packing import PackedLayout
from loopos.models.adapter_folder import ADAPTER_WEIGHTS, PREFIX, open_adapter_folder
from loopos.models.backbone import Backbone
from loopos.storage.tensor_files import save_tensors
from loopos.storage.whole_folder import whole_folder


def make_lean(model: nn.Module) -> None:
    """Makes peft's LoRA layers over linear layers compute in fewer passes, in place."""
    lean = _lean_linear()
    for module in model.modules():
        if type(module) is lean.__bases__[0]:
            module.__class__ = lean


@cache
def _lean_linear() -> type[nn.Module]:
    """peft's LoRA over a linear layer, with s applied to the r numbers of a row instead of its N, and the change added
    within its own product: one pass over `[..., N]` instead of three.
    """
    from peft.tuners.lora.layer import Linear

    class LeanLinear(Linear):
        def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
            layer: Any = self
            name = _single_lora(layer, x)
            if name is None or others or named:
                answer: Tensor = super().forward(x, *others, **named)
                return answer
            low = layer.lora_A[name](layer.lora_dropout[name](x)).mul(layer.scaling[name])
            product: Tensor = layer.base_layer(x)
            product.flatten(0, -2).addmm_(low.flatten(0, -2), layer.lora_B[name].weight.t())
            return product

    return LeanLinear


def _single_lora(layer: Any, x: Tensor) -> str | None:
    """The single active adapter of a layer if it is plain LoRA in the format of weights and input; otherwise None."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or type(layer.base_layer) is not nn.Linear:
        return None
    up = layer.lora_B[active[0]]
    # Other tensor types, such as a sharded tensor, need the layer's own forward.
    bare = all(type(each.weight) is nn.Parameter for each in (layer.base_layer, up))
    plain = active[0] not in layer.lora_variant and up.bias is None and x.dim() > 1 and bare
    same = x.dtype == up.weight.dtype == layer.base_layer.weight.dtype
    return active[0] if plain and same and not torch.is_autocast_enabled(x.device.type) else None


ADAPTER = "default"
"""The name of a run's single trained adapter: peft's default."""

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
    """Freezes the model, including earlier adapters, and replaces each target linear layer by `W + (alpha/rank)·B·A`
    (Hu et al. 2021), in place.

    B starts at 0, so the model's outputs do not change. Raises `UserError` if no module has a requested name.
    """
    targets = lora.target_modules
    if targets == "all-linear":
        targets = linear_names(model)
    model.requires_grad_(False)
    config = _lora_config(model, lora, targets=list(targets))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _inject(config, model, name)
    except ValueError as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(
            f"training.lora.target_modules: {reason}; linear layers of this {type(model).__name__}: "
            f"{', '.join(linear_names(model))}"
        ) from problem


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


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the context the model runs with only this adapter, or with None without adapters. `requires_grad` does not
    change.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    trains = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]

    def put(layer: BaseTunerLayer, names: list[str], disabled: bool) -> None:
        layer.set_adapter(names)
        layer.enable_adapters(not disabled)

    try:
        for layer, names, _ in before:
            put(layer, names if name is None else [name], name is None)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
        yield
    finally:
        for layer, names, disabled in before:
            put(layer, names, disabled)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)


class AdapterView:
    """A backbone with only one of its adapters, or with None without adapters: several models over one copy of the
    weights.
    """

    def __init__(self, backbone: Backbone, name: str | None) -> None:
        self.backbone, self.name = backbone, name

    @property
    def model(self) -> PreTrainedModel:
        return self.backbone.model

    @property
    def hidden_size(self) -> int:
        return self.backbone.hidden_size

    def __call__(self, ids: Tensor, layout: PackedLayout, token_types: Tensor | None = None) -> Tensor:
        """See `Backbone`."""
        with active_adapter(self.backbone.model, self.name):
            hidden: Tensor = self.backbone(ids, layout, token_types)
        return hidden


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


def _lora_config(model: nn.Module, lora: LoraSection, *, targets: Sequence[str]) -> LoraConfig:
    from peft import LoraConfig

    # peft must know about layers with transposed weights, such as GPT-2's.
    transposed = any(name.rsplit(".", 1)[-1] in targets and _is_transposed(m) for name, m in model.named_modules())
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's own code divides it; only its annotation says int
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        fan_in_fan_out=transposed,
    )


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
    """
    # The config as peft resolved it: it may replace layer names by names of fused tensors.
    known = (getattr(module, "peft_config", None) for module in model.modules())
    config: LoraConfig = next(configs[ADAPTER] for configs in known if isinstance(configs, dict))
    config = dataclasses.replace(config, base_model_name_or_path=base, task_type=task)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{ADAPTER}." in name:
            tensors[PREFIX + name.replace(f".{ADAPTER}", "")] = parameter.detach()
    assert tensors, "no adapter in the model"
    with whole_folder(folder) as partial:
        save_tensors(partial / ADAPTER_WEIGHTS, tensors)
        config.save_pretrained(str(partial))
