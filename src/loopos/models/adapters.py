"""peft's LoRA layers in fewer passes over their outputs.

Enters: a model under adapters. Leaves: the same, its adapters' plain cases computed by functions of ours. Left out:
putting adapters in (`adapters.py`), decoding (`generation/cpu/weights.py`).
Letters: T tokens, K inputs, N outputs, r rank, s = alpha / r.

What trains: the head alone, all weights, the layers above N, or low-rank adapters (LoRA, through peft).

Enters: a headless transformers model. Leaves: the same with `requires_grad` set, or wrapped layers inside it. Left
out: optimizers.
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
    """Lets peft's layers over linear ones compute in fewer passes, in place."""
    lean = _lean_linear()
    for module in model.modules():
        if type(module) is lean.__bases__[0]:
            module.__class__ = lean


@cache
def _lean_linear() -> type[nn.Module]:
    """peft's LoRA over a linear layer, with s scaling the r numbers of a row instead of its N, and the change added
    within its own product: of three passes over `[..., N]` one is left.
    """
    from peft.tuners.lora.layer import Linear

    class LeanLinear(Linear):
        def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
            layer: Any = self
            name = _alone(layer, x)
            if name is None or others or named:
                answer: Tensor = super().forward(x, *others, **named)
                return answer
            low = layer.lora_A[name](layer.lora_dropout[name](x)).mul(layer.scaling[name])
            product: Tensor = layer.base_layer(x)
            product.flatten(0, -2).addmm_(low.flatten(0, -2), layer.lora_B[name].weight.t())
            return product

    return LeanLinear


def _alone(layer: Any, x: Tensor) -> str | None:
    """The one active adapter of a layer, where it is plain LoRA in the format of weights and input."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or type(layer.base_layer) is not nn.Linear:
        return None
    up = layer.lora_B[active[0]]
    # A tensor of another kind, such as one of which each process holds a part, is for the layer's own call.
    bare = all(type(each.weight) is nn.Parameter for each in (layer.base_layer, up))
    plain = active[0] not in layer.lora_variant and up.bias is None and x.dim() > 1 and bare
    same = x.dtype == up.weight.dtype == layer.base_layer.weight.dtype
    return active[0] if plain and same and not torch.is_autocast_enabled(x.device.type) else None


ADAPTER = "default"
"""The name of the adapter that trains where there is one alone: peft's own."""

# peft is imported where it is needed: it takes seconds, and only runs with adapters use it.
if TYPE_CHECKING:
    from peft import LoraConfig


def set_trained(model: PreTrainedModel, settings: TrainingSection) -> list[nn.Parameter]:
    """Sets what trains of a headless model, in place; returns the parameters that `freeze_layers` holds back."""
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
    """`set_trained` for a causal language model and its headless base: adapters leave the output embedding as it is."""
    if settings.trainable == "lora":
        causal.requires_grad_(False)
    return set_trained(base, settings)


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers, lowest first. Raises `UserError` for a model without a plain stack of
    `num_hidden_layers` layers.
    """
    expected = model.config.get_text_config().num_hidden_layers
    if (found := find_layers(model, expected)) is not None:
        return found
    raise UserError(
        f"{type(model).__name__}: no stack of {expected} layers found, so layers cannot be frozen by number; use "
        "training.freeze_layers = 0"
    )


def find_layers(model: nn.Module, expected: int) -> nn.ModuleList | None:
    """The first list of as many modules as there are layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((each for each in lists if len(each) == expected), None)


def freeze_lower(model: PreTrainedModel, num_layers: int) -> list[nn.Parameter]:
    """Freezes the embeddings and the lowest `num_layers` layers; returns what was frozen. Raises `UserError` when
    there are fewer layers.
    """
    layers = layer_list(model)
    if num_layers > len(layers):
        raise UserError(
            f"training.freeze_layers: got {num_layers}, expected at most {len(layers)}, the layers of this "
            f"{type(model).__name__}"
        )
    held_back = [*_embeddings(model, layers), *layers[:num_layers]]
    frozen = [parameter for module in held_back for parameter in module.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _embeddings(model: PreTrainedModel, layers: nn.ModuleList) -> list[nn.Module]:
    """All that comes before the layers: an encoder's module `embeddings` (with its norm), else every embedding outside
    the layers.
    """
    together = getattr(model, "embeddings", None)
    if isinstance(together, nn.Module):
        return [together]
    inside = set(layers.modules())
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module not in inside]


def add_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int, name: str = ADAPTER) -> None:
    """Freezes the model, earlier adapters too, and puts `W + (alpha/rank)·B·A` in the place of each target linear layer
    (Hu et al. 2021), in place.

    B starts at 0, so the model starts unchanged. Raises `UserError` when no module has a name that was asked for.
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
    """The names of a model's linear layers as `target_modules` takes them, those that adapters wrap included, each
    once: the last part of the name, with more parts where other modules have that one too.
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
    """The shortest end of a module's name, in whole parts, that no other name ends with."""
    parts = name.split(".")
    suffixes = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
    taken = {end for other in others for end in _ends(other)}
    return next((suffix for suffix in suffixes if suffix not in taken), name)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _outer(name: str, wrapped: set[str]) -> list[str]:
    """The wrapped layers that a module lies in."""
    parts = name.split(".")
    return [outer for end in range(1, len(parts)) if (outer := ".".join(parts[:end])) in wrapped]


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within, the model runs with the adapter of this name alone, or with None as it is without any; then as before.
    What trains stays as it is.
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
    """A backbone as it is with one of its adapters alone, or with None without any: one copy of the weights, several
    models.
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
        """As `Backbone`."""
        with active_adapter(self.backbone.model, self.name):
            hidden: Tensor = self.backbone(ids, layout, token_types)
        return hidden


def _inject(config: LoraConfig, model: PreTrainedModel, name: str) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # Several adapters over one copy of the weights are what is expected here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name)
    make_lean(model)


def _is_linear(module: nn.Module) -> bool:
    """A layer whose whole work is a matrix product. A subclass may do more, such as one product for each group."""
    return type(module) in (nn.Linear, Conv1D)


def _lora_config(model: nn.Module, lora: LoraSection, *, targets: Sequence[str]) -> LoraConfig:
    from peft import LoraConfig

    # peft asks to be told of layers that keep their weight transposed, as GPT-2's do.
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
    """Puts the adapter of a PEFT folder beside those that the model has, in place, without training it. Raises
    `UserError` for a folder that holds none, one of other layers, and one that is more than LoRA over the weights as
    they are, which the other adapters share.
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
    """Folds every adapter into its layer, W ← W + (alpha/rank)·B·A, and takes the wrappers out, in place.

    The model becomes fp32 first: a low-rank change is small beside the weights, and bf16 would round much of it away
    before it is added.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    # Over the tensors of one module wrappers are nested: each folds its own, and the outermost is taken out.
    for module in reversed(wrappers.values()):
        module.merge(safe_merge=True)
    for name, module in wrappers.items():
        parent_name, _, child = name.rpartition(".")
        if parent_name not in wrappers:
            setattr(model.get_submodule(parent_name), child, module.get_base_layer())


def save_lora(model: PreTrainedModel, folder: Path, *, base: str, task: str = "FEATURE_EXTRACTION") -> None:
    """Writes a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`) that peft opens over the
    base model; replaces the folder at once. task: peft's name of what the model is for ("CAUSAL_LM" for a language
    model). Raises `OSError` when the disk is full.
    """
    # What peft made of the targets: it may have turned names of layers into names of tensors that hold several.
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
