"""What a run sends and what its tensors take, counted where torch does it: collectives by their bytes, storages while
they live.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import train_here

from loopos.config.methods import config_classes
from loopos.training.update import Update

# Which argument of a collective holds the whole tensors: the gathered output, or what is reduced.
WHOLE = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0}


class SentBytes(TorchDispatchMode):
    """Bytes of whole tensors by collective; `large` leaves counts and metrics out, which are of fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            assert name in WHOLE or name in ("barrier", "allgather_"), f"a collective that is not counted: {name}"
            if name in WHOLE:
                tensors = [each for each in tree_leaves(args[WHOLE[name]]) if isinstance(each, torch.Tensor)]
                self.bytes[name] += sum(t.numel() * t.itemsize for t in tensors if t.dtype != torch.float64)
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made since it was entered, now and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        actual = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._meet(each.untyped_storage(), actual)
        return made

    def _meet(self, storage: torch.UntypedStorage, actual: set[int]) -> None:
        place = storage._cdata
        if place in self._known or place in actual or storage.nbytes() == 0:
            return
        self._known.add(place)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, storage.nbytes())

    def _forget(self, index: int, size: int) -> None:
        self._known.discard(index)
        self.now -= size


def counting(counter: Any) -> Any:
    """Every optimizer step of a run goes through `counter()`."""
    step = Update.__call__

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        with counter():
            return step(self, *arguments, **named)

    return patch.object(Update, "__call__", counted)


def train(config: dict[str, Any]) -> None:
    chosen = config_classes()[config["computation"]["mode"], config["computation"]["method"]]
    train_here(chosen.model_validate(config))


def sharded_step(weights: str, *, reshard: bool) -> dict[str, int]:
    """One forward and backward pass of a language model whose layers are sharded by FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard if reshard is False else None)
    ids = torch.arange(3, 35)[None]
    with SentBytes() as sent:
        model(input_ids=ids, labels=ids).loss.backward()
    return dict(sent.bytes)


def count(configs: dict[str, dict[str, Any]], weights: str, answer: Path) -> None:
    """Runs in one of two processes: trains the configs, then a sharded model; the first process writes the bytes sent."""
    found: dict[str, Any] = {}
    for name, config in configs.items():
        sent: list[SentBytes] = []

        def counter(sent: list[SentBytes] = sent) -> SentBytes:
            sent.append(SentBytes())
            return sent[-1]

        with counting(counter):
            train(config)
        found[name] = [dict(each.bytes) for each in sent]
    torch.distributed.init_process_group("gloo")
    found["shard"] = [sharded_step(weights, reshard=True), sharded_step(weights, reshard=False)]
    if torch.distributed.get_rank() == 0:
        answer.write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()
