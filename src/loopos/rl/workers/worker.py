"""A rollout worker: opens the policy's model once, receives new weights, and answers orders with LoopOS's engine or
vLLM.

The two engines are imported when a worker opens one: the environment of a worker with vLLM may lack what the other
needs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from loopos.generation.completions import Completion
from loopos.rl.workers.protocol import Order, Request
from loopos.rl.workers.recipes import VllmRecipe, WorkerRecipe


class Writer(Protocol):
    """A model that receives weights and generates."""

    def take(self, weights: Mapping[str, Tensor]) -> None: ...

    def write(self, request: Request) -> list[Completion]: ...


class RolloutWorker:
    """Stores the weights of one version at a time. Raises `UserError` for a model that cannot be loaded on this
    host.
    """

    def __init__(self, recipe: WorkerRecipe) -> None:
        self._writer = _writer_of(recipe)
        self._version: int | None = None

    def write(self, order: Order, fetch: Callable[[], bytes]) -> list[Completion]:
        """The order's completions. fetch: returns the weights of its version; called only for a new version."""
        if order.version != self._version:
            self._version = None
            self._writer.take(load(fetch()))
            self._version = order.version
        return self._writer.write(order.request)


def policy_weights(causal: PreTrainedModel, *, adapter_only: bool) -> dict[str, Tensor]:
    """Name → tensor that LoopOS's engine needs to generate like this model: all parameters, or only those of the
    adapter that trains.
    """
    from loopos.models.active_adapters import ADAPTER

    return {
        name: parameter.detach()
        for name, parameter in causal.named_parameters()
        if not adapter_only or (".lora_" in name and f".{ADAPTER}." in name)
    }


def packed(chunks: Iterable[bytes | memoryview]) -> bytes:
    """The chunks of a safetensors file as one object, without a second copy of them."""
    whole = io.BytesIO()
    for chunk in chunks:
        whole.write(chunk)
    return whole.getvalue()


def _writer_of(recipe: WorkerRecipe) -> Writer:
    if isinstance(recipe, VllmRecipe):
        from loopos.rl.workers.vllm_writer import VllmWriter

        return VllmWriter(recipe)
    from loopos.rl.workers.engine_writer import EngineWriter

    return EngineWriter(recipe)
