"""Sets what trains: only the head, all weights, the layers above N, or LoRA adapters (peft). Also loads
adapters, to run or to continue them.

peft is imported lazily: it takes seconds, and only runs with adapters need it. `lora_layers` has the products of a
layer, `active_adapters` which adapters run.
Letters: K inputs, N outputs, r rank, s = alpha / r.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded
from loopos.config.sections import LoraSection, TrainingSection
from loopos.models.active_adapters import ADAPTER, RESIDUAL, START, activate, peft_config_of
from loopos.models.adapter_folder import PREFIX, AdapterFolder, is_adapter, open_adapter_folder
from loopos.models.lora_layers import make_lean

# Imported lazily at run time: see the module docstring.
if TYPE_CHECKING:
    from peft import LoraConfig


def set_trained(model: PreTrainedModel, settings: TrainingSection, adapter: str | None = None) -> list[nn.Parameter]:
    """Sets `requires_grad` on a headless model, in place; returns the parameters that `freeze_layers` freezes. adapter:
    the folder of an adapter to continue.
    """
    if settings.trainable == "lora":
        train_adapters(model, settings, adapter)
    elif settings.trainable == "head":
        model.requires_grad_(False)
    elif settings.freeze_layers:
        return freeze_lower(model, settings.freeze_layers)
    return []


def train_adapters(model: PreTrainedModel, settings: TrainingSection, adapter: str | None) -> None:
    """Adds the adapters of a run to a headless model: new ones, or those of the folder `adapter`."""
    lora = settings.lora or LoraSection()
    if adapter is None:
        add_lora(model, lora, seed=settings.seed)
    else:
        continue_adapter(model, continued_folder(adapter), dropout=lora.dropout)


def set_trained_language_model(
    causal: PreTrainedModel, base: PreTrainedModel, settings: TrainingSection, adapter: str | None = None
) -> list[nn.Parameter]:
    """`set_trained` for a causal language model and its headless base. With adapters the output embedding is frozen."""
    if settings.trainable == "lora":
        causal.requires_grad_(False)
    return set_trained(base, settings, adapter)


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
    if next(model.parameters()).is_meta:
        # Shapes without numbers, of which a plan counts the parameters, cannot be decomposed.
        config = dataclasses.replace(config, init_lora_weights=True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _inject(config, model, name)
            if moves_base(lora):
                _check_ranks(model, lora)
                copy_adapter(model, RESIDUAL)
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
def copy_adapter(model: PreTrainedModel, name: str) -> None:
    """Adds a frozen copy of the trained adapter as it is now under another name, in place. As `RESIDUAL` it is only
    B·A.
    """
    config = peft_config_of(model)
    dora = config.use_dora and name != RESIDUAL
    _inject(dataclasses.replace(config, init_lora_weights=True, lora_dropout=0.0, use_dora=dora), model, name)
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        if f".{name}." in key and not (own := parameters[key.replace(f".{name}.", f".{ADAPTER}.")]).is_meta:
            parameter.copy_(own)
    activate(model, [ADAPTER])


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


# A tensor of LoRA or DoRA: its module and its part.
_TENSOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")


def continued_folder(source: str) -> AdapterFolder:
    """The adapter that `data.adapter` names: a PEFT folder, or a run with one. Raises `UserError` for what is not LoRA
    or DoRA over an unchanged base.
    """
    path = Path(expanded(source))
    adapter = open_adapter_folder(path / "adapter" if is_adapter(path / "adapter") else path)
    beyond = [each for each in adapter.beyond_lora if not each.startswith(("use_dora", "the tensor"))]
    beyond += [f"the tensor {key}" for key in adapter.tensors if _TENSOR.fullmatch(key) is None]
    if beyond:
        raise UserError(
            f"data.adapter: {source}: an adapter with {', '.join(beyond[:3])}, which cannot be continued; expected "
            "LoRA or DoRA. To train new adapters on top of it, name it in data.pretrained_weights"
        )
    return adapter


@torch.no_grad()
def continue_adapter(model: PreTrainedModel, adapter: AdapterFolder, *, dropout: float) -> None:
    """Adds an adapter of another run to a headless model as the one that trains, and a frozen copy as its start
    (`START`), in place. Raises `UserError` for an adapter of other layers.
    """
    model.requires_grad_(False)
    own = _names_in(model, adapter)
    _inject(_continued_config(model, adapter, own, dropout), model, ADAPTER)
    parameters = dict(model.named_parameters())
    expected = {name for name in parameters if f".{ADAPTER}." in name}
    for key, stored in adapter.tensors.items():
        name, part = _parts(key)
        parameter, value = parameters[f"{own[name]}.{part}.{ADAPTER}.weight"], stored.read()
        if parameter.shape != value.shape:
            raise UserError(
                f"data.adapter: {adapter.source}: {key}: got {list(value.shape)}; expected {list(parameter.shape)} for "
                f"this {type(model).__name__}"
            )
        parameter.copy_(value)
        expected.discard(f"{own[name]}.{part}.{ADAPTER}.weight")
    if expected:
        raise UserError(f"data.adapter: {adapter.source}: its weights lack {min(expected)}; expected a whole adapter")
    copy_adapter(model, START)


def _parts(key: str) -> tuple[str, str]:
    match = _TENSOR.fullmatch(key)
    assert match is not None, key
    return match[1], match[2]


def _names_in(model: PreTrainedModel, adapter: AdapterFolder) -> dict[str, str]:
    """Module of an adapter, which may be one of a language model → its name in the headless model. Raises `UserError`
    for a module that the model lacks.
    """
    modules, head, found = dict(model.named_modules()), f"{model.base_model_prefix}.", {}
    for name in dict.fromkeys(_parts(key)[0] for key in adapter.tensors):
        own = name if name in modules else name.removeprefix(head)
        if not isinstance(modules.get(own), (nn.Linear, Conv1D)):
            raise UserError(
                f"data.adapter: {adapter.source}: changes {name}, which is no linear layer of {type(model).__name__}; "
                f"expected an adapter of its layers. {_linear_layers(model)}"
            )
        found[name] = own
    return found


def _continued_config(
    model: PreTrainedModel, adapter: AdapterFolder, own: Mapping[str, str], dropout: float
) -> LoraConfig:
    """An adapter's config with every expression resolved to names. own: as `_names_in` returns them."""
    from peft import LoraConfig

    config, names = adapter.config, list(own)

    def by_name(key: str, usual: Any) -> dict[str, Any]:
        return {own[name]: value for name, value in adapter.by_pattern(key, usual, names).items() if value != usual}

    return LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=dropout,
        target_modules=list(own.values()),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        fan_in_fan_out=any(_is_transposed(model.get_submodule(name)) for name in own.values()),
        rank_pattern=by_name("rank_pattern", config["r"]),
        alpha_pattern=by_name("alpha_pattern", config["lora_alpha"]),
    )
