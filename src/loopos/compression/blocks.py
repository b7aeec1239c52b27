"""Runs a transformer block by block on calibration text, and removes layers, key-value groups or MLP channels.

A pass holds only the inputs of one block, and sums the products of what its linear layers read. A smaller model has a
matching config, so that transformers opens it as an ordinary model. Letters: N rows of L tokens each, d features of the
hidden states, I inputs of a linear layer; G key-value groups of r query heads each, of h features a head; d_ff channels
of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loopos.config.diagnostics import UserError
from loopos.models.adapters import layer_list

_TOLERANCE = 1e-4


class _FirstBlockReached(Exception):
    """Ends a forward pass whose remainder is not needed."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: `nn.Linear`, or GPT-2's `Conv1D`, whose weight is transposed."""

    name: str
    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """W `[O, I]`, a view of the layer's weight."""
        data: Tensor = self.module.weight.data
        return data if isinstance(self.module, nn.Linear) else data.t()

    def take(self, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """Keeps only these outputs and inputs (indices), of the bias too."""
        weight, bias = self.weight, self.module.bias
        if outputs is not None:
            weight = weight[outputs]
            if isinstance(bias, nn.Parameter):
                self.module.bias = nn.Parameter(bias.data[outputs])
        if inputs is not None:
            weight = weight[:, inputs]
        if isinstance(self.module, nn.Linear):
            self.module.weight = nn.Parameter(weight.contiguous())
            self.module.out_features, self.module.in_features = weight.shape
        else:
            self.module.weight = nn.Parameter(weight.t().contiguous())
            self.module.nf, self.module.nx = weight.shape


def linears_of(block: nn.Module) -> list[Linear]:
    """The linear layers of a block, in order."""
    return [Linear(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]


class BlockPass:
    """Walks through a model's blocks with calibration rows. Each block's outputs replace its inputs, so that only one
    tensor `[N, L, d]` is stored.
    """

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList, rows: Tensor) -> None:
        """rows `[N, L]` int64, without pads. Raises `UserError` if the blocks, run one by one, give other hidden states
        than the model: it passes something between them that depends on the text.
        """
        self.blocks, self._device = blocks, model.device
        self._calls = _calls(model, blocks, rows[:1].to(model.device))
        self.hidden = torch.cat([_first_input(model, blocks, row[None].to(model.device)) for row in rows])
        self._check(model, rows[-1:].to(model.device))

    def blocks_in_order(self) -> Iterator[tuple[int, nn.Module]]:
        """Each block with its index. While it is current, `hidden` is its input; afterwards `hidden` becomes its
        output, with the weights that the block has then.
        """
        for index, block in enumerate(self.blocks):
            yield index, block
            for row in range(len(self.hidden)):
                self.hidden[row] = self._run(index, row)

    def products(self, index: int, expected: Sequence[Linear], *, diagonal: bool) -> dict[str, Tensor]:
        """By layer name XXᵀ `[I, I]` over all tokens, or with `diagonal` only its diagonal `[I]`, in fp32. Layers that
        read the same input share one sum.
        """
        twins = self._twins(index, expected)
        sums: dict[str, Tensor] = {}

        def add(name: str, entered: Tensor) -> None:
            flat = entered.detach().reshape(-1, entered.shape[-1]).float()
            product = flat.square().sum(0) if diagonal else flat.t() @ flat
            sums[name] = sums[name] + product if name in sums else product

        leading = [linear for linear in expected if twins.get(linear.name) == linear.name]
        with _Watched(leading, add):
            for row in range(len(self.hidden)):
                self._run(index, row)
        # A layer that no token reached (an expert that was never chosen) has no sums.
        nothing = {linear.name: linear for linear in expected if linear.name not in twins}
        empty = {name: _empty(linear.weight.shape[1], diagonal, self._device) for name, linear in nothing.items()}
        return {**{name: sums[twin] for name, twin in twins.items()}, **empty}

    def _twins(self, index: int, expected: Sequence[Linear]) -> dict[str, str]:
        """By name of a layer that runs, the first one that reads the same input."""
        seen: list[tuple[str, Tensor]] = []
        with _Watched(expected, lambda name, entered: seen.append((name, entered))):
            self._run(index, 0)
        # All inputs stay alive while they are compared: the id of a freed tensor may be reused.
        first_of = {id(entered): name for name, entered in reversed(seen)}
        return {name: first_of[id(entered)] for name, entered in seen}

    @torch.no_grad()
    def _run(self, index: int, row: int) -> Tensor:
        return self._apply(index, self.hidden[row][None])[0]

    def _apply(self, index: int, hidden: Tensor) -> Tensor:
        others, named = self._calls[index]
        return _hidden_of(self.blocks[index](hidden, *others, **named))

    @torch.no_grad()
    def _check(self, model: PreTrainedModel, row: Tensor) -> None:
        found = self.hidden[-1][None]
        for index in range(len(self.blocks)):
            found = self._apply(index, found)
        expected: list[Tensor] = []
        handle = self.blocks[-1].register_forward_hook(lambda _m, _i, output: expected.append(_hidden_of(output)))
        try:
            _forward(model, row)
        finally:
            handle.remove()
        difference = float((found - expected[0]).abs().max() / expected[0].abs().max().clamp_min(1e-6))
        if not difference <= _TOLERANCE:
            raise UserError(
                f"{type(model).__name__}: its blocks, run one by one, give other hidden states than the model (by "
                f"{difference:.1e}); expected a plain stack of blocks, like Llama, Qwen, Mistral, Gemma or GPT-2"
            )


@torch.no_grad()
def block_influence(model: PreTrainedModel, blocks: nn.ModuleList, rows: Tensor) -> list[float]:
    """How much each block changes the hidden states: 1 − E[cos(h_in, h_out)] over all tokens (Men et al. 2024,
    ShortGPT, equation 1). rows `[N, L]`.
    """
    sums = [0.0] * len(blocks)

    def watch(index: int) -> Callable[..., None]:
        def seen(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entered = (args[0] if args else kwargs["hidden_states"]).double()
            sums[index] += float(torch.cosine_similarity(entered, _hidden_of(output).double(), dim=-1).sum())

        return seen

    handles = [block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for row in rows:
            _forward(model, row[None].to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return [1 - total / rows.numel() for total in sums]


class _Watched:
    """Within the context, `callback(name, input)` is called with the input of each of these layers."""

    def __init__(self, linears: Sequence[Linear], callback: Callable[[str, Tensor], None]) -> None:
        self._linears, self._callback = linears, callback

    def __enter__(self) -> None:
        def hook(name: str) -> Callable[..., None]:
            return lambda _module, args: self._callback(name, args[0])

        self._handles = [each.module.register_forward_pre_hook(hook(each.name)) for each in self._linears]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def _calls(
    model: PreTrainedModel, blocks: nn.ModuleList, row: Tensor
) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """The arguments of each block other than the hidden states."""
    found: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        found.append((tuple(args[1:]), others))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        _forward(model, row)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != len(blocks):
        raise UserError(
            f"{type(model).__name__}: runs {len(found)} of its {len(blocks)} blocks; expected a plain stack of blocks"
        )
    return found


@torch.no_grad()
def _first_input(model: PreTrainedModel, blocks: nn.ModuleList, row: Tensor) -> Tensor:
    """The input of the first block, `[1, L, d]`."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _FirstBlockReached

    handle = blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        _forward(model, row)
    except _FirstBlockReached:
        pass
    finally:
        handle.remove()
    return found[0]


def _forward(model: PreTrainedModel, row: Tensor) -> None:
    # Skip the head: the logits of a whole row would be the largest tensor of the pass.
    base = getattr(model, model.base_model_prefix, model)
    extra = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    base(input_ids=row, **extra)


def _hidden_of(output: Any) -> Tensor:
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def _empty(inputs: int, diagonal: bool, device: torch.device) -> Tensor:
    return torch.zeros(inputs if diagonal else (inputs, inputs), device=device)


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Families, by `model_type`, whose blocks have q, k, v, o projections and a gated MLP with gate, up and down."""
GPT2 = "gpt2"


@dataclass(frozen=True)
class HeadShape:
    """Shape of a model's attention: `groups` key-value heads, each read by `queries` query heads of `size` features."""

    groups: int
    queries: int
    size: int

    def outputs(self, keep: Sequence[int], heads_a_group: int) -> torch.Tensor:
        """The rows of a projection that belong to these groups, in order."""
        width = heads_a_group * self.size
        return torch.cat([torch.arange(group * width, (group + 1) * width) for group in keep])


def head_shape(model: PreTrainedModel) -> HeadShape:
    """The head shape. Raises `UserError` for a family whose heads cannot be removed."""
    config = model.config.get_text_config()
    if config.model_type == GPT2:
        raise UserError(
            "gpt2: its config derives the size of a head from their number, so a model with fewer heads cannot be "
            f"written; use --method channels or layers. Heads can be removed from {', '.join(LLAMA_LIKE)}"
        )
    _require(config, LLAMA_LIKE, "heads")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return HeadShape(groups, heads // groups, size)


def possible_groups(model: PreTrainedModel) -> list[int]:
    """The numbers of key-value groups that the family's config allows: for Llama and Gemma 2 and 3 the number of heads
    must divide the width, whatever the size of a head.
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


def keep_groups(model: PreTrainedModel, block: nn.Module, keep: Sequence[int]) -> None:
    """Keeps these key-value groups of one block, with the query heads that read them; `set_groups` changes the
    config.
    """
    shape, attention = head_shape(model), block.get_submodule("self_attn")
    queries, keys = shape.outputs(keep, shape.queries), shape.outputs(keep, 1)
    _linear(attention, "q_proj").take(outputs=queries)
    _linear(attention, "k_proj").take(outputs=keys)
    _linear(attention, "v_proj").take(outputs=keys)
    _linear(attention, "o_proj").take(inputs=queries)


def set_groups(model: PreTrainedModel, groups: int) -> None:
    """Sets the config to `groups` key-value groups per block, and to the size of a head."""
    shape, config = head_shape(model), model.config.get_text_config()
    config.head_dim = shape.size
    config.num_attention_heads, config.num_key_value_heads = groups * shape.queries, groups


def keep_channels(model: PreTrainedModel, block: nn.Module, keep: torch.Tensor) -> None:
    """Keeps these channels of one block's MLP; `set_channels` changes the config."""
    makes, reads = channel_layers(model, block)
    for layer in makes:
        layer.take(outputs=keep)
    reads.take(inputs=keep)


def set_channels(model: PreTrainedModel, channels: int) -> None:
    """Sets the config to this number of channels in every block's MLP."""
    config = model.config.get_text_config()
    if config.model_type == GPT2:
        config.n_inner = channels
    else:
        config.intermediate_size = channels


def drop_layers(model: PreTrainedModel, dropped: Sequence[int]) -> None:
    """Removes whole layers, renumbers the others for the cache, and shortens the config's lists of layers. Works for
    any family with one plain stack of layers. Raises `UserError` for others, or if no layer would be left.
    """
    layers = layer_list(model)
    keep = [index for index in range(len(layers)) if index not in set(dropped)]
    if not keep:
        raise UserError(f"all {len(layers)} layers would be removed; expected at least one to stay")
    name = next(name for name, module in model.named_modules() if module is layers)
    for new, old in enumerate(keep):
        for module in layers[old].modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new  # type: ignore[assignment]
    above, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(above), attribute, nn.ModuleList(layers[index] for index in keep))
    _shorten(model.config.get_text_config(), len(layers), keep)


def _shorten(config: PreTrainedConfig, num_layers: int, keep: Sequence[int]) -> None:
    """Removes the entries of dropped layers from the config's lists, and renumbers lists of layer numbers."""
    for name, value in list(vars(config).items()):
        if not isinstance(value, list | tuple) or "layer" not in name:
            continue
        if name.endswith("only_layers"):
            setattr(config, name, [keep.index(index) for index in value if index in keep])
        elif len(value) == num_layers:
            setattr(config, name, [value[index] for index in keep])
    # Qwen's number of lowest layers with full attention: layer_types contains their kinds already.
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = sum(index < config.max_window_layers for index in keep)
    config.num_hidden_layers = len(keep)


def _linear(above: nn.Module, name: str) -> Linear:
    module = above.get_submodule(name.rpartition(".")[2])
    assert isinstance(module, nn.Linear | Conv1D), f"{name} is a {type(module).__name__}"
    return Linear(name, module)


def _require(config: PreTrainedConfig, families: Sequence[str], what: str) -> None:
    if config.model_type not in families:
        raise UserError(
            f"{config.model_type}: {what} of this family cannot be removed; expected one of {', '.join(families)}. "
            "--method layers, magnitude, wanda and sparsegpt work for any plain stack of layers"
        )
