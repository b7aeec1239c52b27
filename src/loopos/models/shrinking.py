"""A smaller model out of a larger one: whole layers, key-value groups of heads or MLP channels taken out for good.

Enters: a model of transformers and what stays. Leaves: the same model with smaller weights and a config that says so,
so that transformers opens what is saved of it as an ordinary model. Left out: the choice of what stays (`deploy`).
Letters: G key-value groups of r query heads each, of h features a head; d_ff channels of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loopos.config.faults import UserError
from loopos.models.adapters import layer_list
from loopos.models.blocks import Linear

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Families, by `model_type`, whose blocks have q, k, v, o projections and a gated MLP with gate, up and down."""
GPT2 = "gpt2"


@dataclass(frozen=True)
class HeadShape:
    """Of a model's attention: `groups` key-value heads, each read by `queries` query heads of `size` features."""

    groups: int
    queries: int
    size: int

    def outputs(self, kept: Sequence[int], heads_a_group: int) -> torch.Tensor:
        """The rows of a projection that belong to these groups, in order."""
        width = heads_a_group * self.size
        return torch.cat([torch.arange(group * width, (group + 1) * width) for group in kept])


def head_shape(model: PreTrainedModel) -> HeadShape:
    """Raises `UserError` for a family whose heads cannot be taken out."""
    config = model.config.get_text_config()
    if config.model_type == GPT2:
        raise UserError(
            "gpt2: its config derives the size of a head from their number, so a model with fewer heads cannot be "
            f"written; --method channels and layers work. Heads can be taken out of {', '.join(LLAMA_LIKE)}"
        )
    _require(config, LLAMA_LIKE, "heads")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return HeadShape(groups, heads // groups, size)


def possible_groups(model: PreTrainedModel) -> list[int]:
    """How many key-value groups the family's config allows: Llama and Gemma 2 and 3 want a width that their heads
    divide evenly, whatever the size of a head.
    """
    config, shape = model.config.get_text_config(), head_shape(model)
    divides = config.model_type in ("llama", "gemma2", "gemma3_text")
    return [
        groups
        for groups in range(1, shape.groups + 1)
        if not divides or config.hidden_size % (groups * shape.queries) == 0
    ]


def channel_layers(model: PreTrainedModel, block: nn.Module) -> tuple[list[Linear], Linear]:
    """The MLP's layers that make its channels, and the one that reads them. Raises `UserError` for another family."""
    config = model.config.get_text_config()
    _require(config, (*LLAMA_LIKE, GPT2), "channels")
    mlp = block.get_submodule("mlp")
    makes, reads = (("c_fc",), "c_proj") if config.model_type == GPT2 else (("gate_proj", "up_proj"), "down_proj")
    return [_linear(mlp, f"mlp.{name}") for name in makes], _linear(mlp, f"mlp.{reads}")


def output_projection(block: nn.Module) -> Linear:
    """The layer that reads the heads of a block of a Llama-like family."""
    return _linear(block.get_submodule("self_attn"), "self_attn.o_proj")


def keep_groups(model: PreTrainedModel, block: nn.Module, kept: Sequence[int]) -> None:
    """Keeps these key-value groups of one block, with the query heads that read them; the config is left to
    `set_groups`.
    """
    shape, attention = head_shape(model), block.get_submodule("self_attn")
    queries, keys = shape.outputs(kept, shape.queries), shape.outputs(kept, 1)
    _linear(attention, "q_proj").take(outputs=queries)
    _linear(attention, "k_proj").take(outputs=keys)
    _linear(attention, "v_proj").take(outputs=keys)
    _linear(attention, "o_proj").take(inputs=queries)


def set_groups(model: PreTrainedModel, groups: int) -> None:
    """Tells the config that every block has `groups` key-value groups; the size of a head is said, for it can no longer
    be derived.
    """
    shape, config = head_shape(model), model.config.get_text_config()
    config.head_dim = shape.size
    config.num_attention_heads, config.num_key_value_heads = groups * shape.queries, groups


def keep_channels(model: PreTrainedModel, block: nn.Module, kept: torch.Tensor) -> None:
    """Keeps these channels of one block's MLP; the config is left to `set_channels`."""
    makes, reads = channel_layers(model, block)
    for layer in makes:
        layer.take(outputs=kept)
    reads.take(inputs=kept)


def set_channels(model: PreTrainedModel, channels: int) -> None:
    """Tells the config that every block's MLP has so many channels."""
    config = model.config.get_text_config()
    if config.model_type == GPT2:
        config.n_inner = channels
    else:
        config.intermediate_size = channels


def drop_layers(model: PreTrainedModel, dropped: Sequence[int]) -> None:
    """Takes whole layers out, renumbers the others for the cache, and shortens the config's lists of layers. Works for
    any family with one plain stack of layers. Raises `UserError` for another, or where no layer would be left.
    """
    layers = layer_list(model)
    kept = [place for place in range(len(layers)) if place not in set(dropped)]
    if not kept:
        raise UserError(f"all {len(layers)} layers would go; wanted at least one that stays")
    name = next(name for name, module in model.named_modules() if module is layers)
    for new, old in enumerate(kept):
        for module in layers[old].modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new  # type: ignore[assignment]
    above, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(above), attribute, nn.ModuleList(layers[place] for place in kept))
    _shorten(model.config.get_text_config(), len(layers), kept)


def _shorten(config: PreTrainedConfig, num_layers: int, kept: Sequence[int]) -> None:
    """The config's lists with an entry a layer lose those of dropped ones; lists of layer numbers are renumbered."""
    for name, value in list(vars(config).items()):
        if not isinstance(value, list | tuple) or "layer" not in name:
            continue
        if name.endswith("only_layers"):
            setattr(config, name, [kept.index(place) for place in value if place in kept])
        elif len(value) == num_layers:
            setattr(config, name, [value[place] for place in kept])
    # Qwen's number of lowest layers with full attention: their kinds are in layer_types already.
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = sum(place < config.max_window_layers for place in kept)
    config.num_hidden_layers = len(kept)


def _linear(above: nn.Module, name: str) -> Linear:
    module = above.get_submodule(name.rpartition(".")[2])
    assert isinstance(module, nn.Linear | Conv1D), f"{name} is a {type(module).__name__}"
    return Linear(name, module)


def _require(config: PreTrainedConfig, families: Sequence[str], what: str) -> None:
    if config.model_type not in families:
        raise UserError(
            f"{config.model_type}: {what} cannot be taken out of this family; wanted one of {', '.join(families)}. "
            "--method layers, magnitude, wanda and sparsegpt work for any plain stack of layers"
        )
