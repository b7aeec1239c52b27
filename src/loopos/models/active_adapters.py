"""Which of the adapters over one copy of the weights run: several models that share a base.

    the trained adapter        the policy
    none of them               the reference, the weights that training starts from
    another one                a reward model or value model over the same base

Some starts move a part of the base into the adapter (PiSSA, OLoRA). The base is then what is left of it with the frozen
adapter `RESIDUAL`, and runs as that. peft is imported lazily: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from loopos.functional.packing import PackedLayout
from loopos.models.backbone import Backbone

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "default"
"""The name of a run's single trained adapter: peft's default."""
RESIDUAL = "residual"
"""The name of a frozen copy of the trained adapter's start, B₀·A₀, where the start was taken out of the base."""
START = "start"
"""The name of a frozen copy of the trained adapter's start, where that is an adapter that another run trained."""


def peft_config_of(model: nn.Module) -> LoraConfig:
    """The config of the trained adapter as peft resolved it: it may replace layer names by names of fused tensors."""
    known = (getattr(module, "peft_config", None) for module in model.modules())
    found: LoraConfig = next(configs[ADAPTER] for configs in known if isinstance(configs, dict))
    return found


def _running(layer: BaseTunerLayer, name: str | None) -> list[str]:
    """The adapters of a layer that make the model `name`: the trained adapter, another one, or with None the start."""
    if name == ADAPTER:
        return [ADAPTER]
    base = [RESIDUAL] if _has(layer, RESIDUAL) else []
    if name is None:
        return [START] if _has(layer, START) else base
    return [*base, name]


def _has(layer: BaseTunerLayer, name: str) -> bool:
    return any(name in getattr(layer, own, ()) for own in layer.adapter_layer_names)


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the context the model runs with only this adapter, or with None as before the trained adapter trained.
    `requires_grad` does not change.
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
            running = _running(layer, name)
            put(layer, running or names, not running)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
        yield
    finally:
        for layer, names, disabled in before:
            put(layer, names, disabled)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)


def activate(model: nn.Module, trained: list[str]) -> None:
    """Activates the trained adapter, and makes the adapters in `trained` trainable."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(True)
            module.set_adapter([ADAPTER])
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(any(f".{adapter}." in name for adapter in trained))


class AdapterView:
    """A backbone with only one of its adapters, or with None as before training: several models over one copy of the
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
