"""Linear layers split among processes that run each pass together, by the plan that transformers carries for the model.

Enters: a model, whole on every process, and the processes. Leaves: the same modules, each with a part of the weights
that the plan names: rows (`colwise`: each process makes some of the output's features) or columns (`rowwise`: each adds
up some of the input's, and the sums are added over the processes). After Shoeybi et al. 2019 (Megatron-LM). An adapter
of LoRA is split as its layer is, on the side that the layer is. What the plan leaves out (embeddings, norms, heads) is
the same on all of these processes, and so is all that it computes. Left out: the rows of a part that further processes
share (`sharding.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from loopos.config.faults import UserError

_HEADS = ("num_attention_heads", "num_key_value_heads")


def split_layers(root: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Splits all models under `root` over `mesh`, in place, and returns the layers, whose `forward` is now one of their
    own. Raises `UserError` for a model without a plan, or of a size that cannot be split so.
    """
    split = []
    for model in root.modules():
        # A model with a head holds the one that has the layers.
        if isinstance(model, PreTrainedModel) and model.base_model is model:
            for module, style in _planned(model, mesh.size()):
                layer = ALL_PARALLEL_STYLES[style]
                for name, parameter in list(module.named_parameters(recurse=False)):
                    layer.validate_param(module, parameter, mesh, parameter_name=name)
                    layer.shard_param(module, name, mesh)
                layer.install_forward(module, mesh)
                split.append(module)
    return split


def whole_again(split: list[nn.Module]) -> None:
    """The layers run by their class's own `forward`: for weights that have become whole."""
    for module in split:
        del module.forward


def _planned(model: PreTrainedModel, size: int) -> list[tuple[nn.Module, str]]:
    config = model.config.get_text_config()
    plan: dict[str, str] | None = getattr(config, "base_model_tp_plan", None)
    given = f"distributed.tensor_parallel: given {size} for a model of type {config.model_type}"
    if not plan:
        raise UserError(f"{given}, for which transformers has no plan; wanted tensor_parallel 1, and mode shard")
    for name in _HEADS:
        number = getattr(config, name, size)
        if number % size:
            raise UserError(f"{given} with {name} {number}; wanted a divisor of it")
    found = []
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))
        if style is not None:
            found += list(_layers(module, style))
    for module, style in found:
        if style in ("colwise", "rowwise"):
            width = getattr(module, "out_features" if style == "colwise" else "in_features", size)
            if width % size:
                raise UserError(f"{given}, one of whose layers is {width} wide; wanted a divisor of it")
    return found


def _layers(module: nn.Module, style: str) -> Iterator[tuple[nn.Module, str]]:
    """The layer itself, or the one under an adapter with the adapter's matrix on the split side."""
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Module):
        yield module, style
        return
    yield base, style
    side = module.get_submodule("lora_B" if style == "colwise" else "lora_A")
    for matrix in side.children():
        yield matrix, style
