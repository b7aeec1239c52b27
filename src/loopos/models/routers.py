"""The routers of a mixture of experts: how they spread the tokens of a pass, and the loss that evens it out.

Enters: a headless transformer with routers. Leaves: after each of its passes, the auxiliary loss and the load. Left
out: what is trained with them (`training.router_objective`).
Letters: T tokens of the pass, E experts, k experts that a token is sent to, L layers with a router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopos.functional.packing import PackedLayout


@dataclass(frozen=True)
class Routing:
    """auxiliary_loss: 1·k where every expert gets as many tokens as another, up to E·k where one gets all. load: tokens
    of the busiest expert of a layer over those of an even spread, the mean over the layers; 1 is even.
    """

    auxiliary_loss: Tensor
    load: Tensor


@dataclass(frozen=True)
class _Pass:
    """logits `[T, E]`; chosen `[T, k]`: the experts that each token was sent to."""

    logits: Tensor
    chosen: Tensor


class RouterRecorder:
    """Keeps what the routers of a model decide in its last pass."""

    def __init__(self, model: PreTrainedModel, num_chosen: int) -> None:
        self._passes: list[_Pass] = []
        self._num_chosen = num_chosen
        model.register_forward_pre_hook(lambda *_: self._passes.clear())
        for index, module in _routers(model):
            module.register_forward_hook(self._hook(index))

    @classmethod
    def of(cls, model: PreTrainedModel) -> RouterRecorder | None:
        """The recorder of a headless model; None for one without routers that transformers records the logits of."""
        config = model.config.get_text_config()
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
        chosen = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
        return None if chosen is None or not _routers(model) else cls(model, chosen)

    def take(self, layout: PackedLayout) -> Routing:
        """The routing of the pass that has just ended. Sequences that ran side by side had pads, which do not count."""
        passes = [self._without_pads(each, layout) for each in self._passes]
        self._passes.clear()
        assert passes, "no pass since the last one was taken"
        probabilities = torch.cat([each.logits.float() for each in passes]).softmax(-1)
        num_experts = probabilities.shape[-1]
        shares = [_shares(each.chosen, num_experts) for each in passes]
        lengths = torch.tensor([len(each.chosen) for each in passes], device=probabilities.device)
        share = (torch.stack(shares) * (lengths / lengths.sum())[:, None]).sum(0)
        auxiliary = num_experts * (share * probabilities.mean(0)).sum()
        busiest = torch.stack([each.max() / each.sum() for each in shares])
        return Routing(auxiliary, num_experts * busiest.mean())

    def _hook(self, index: int) -> Any:
        def record(module: nn.Module, inputs: object, output: Any) -> None:
            logits = (output[index] if isinstance(output, tuple) else output).flatten(0, -2)
            last = output[-1] if isinstance(output, tuple) else None
            if isinstance(last, Tensor) and not last.is_floating_point() and last.shape[-1] == self._num_chosen:
                chosen = last.flatten(0, -2)
            else:
                chosen = logits.topk(self._num_chosen, dim=-1).indices
            self._passes.append(_Pass(logits, chosen.detach()))

        return record

    @staticmethod
    def _without_pads(each: _Pass, layout: PackedLayout) -> _Pass:
        if len(each.logits) == layout.num_tokens:
            return each
        real = torch.arange(max(layout.lengths), device=layout.device)[None] < layout.lengths_tensor()[:, None]
        assert real.numel() == len(each.logits), (real.shape, each.logits.shape)
        return _Pass(each.logits[real.flatten()], each.chosen[real.flatten()])


def _routers(model: PreTrainedModel) -> list[tuple[int, nn.Module]]:
    """The modules whose output holds router logits `[T, E]`, and at which place, as transformers records them."""
    recorded = getattr(model, "_can_record_outputs", None) or {}
    recorder = recorded.get("router_logits") if isinstance(recorded, dict) else None
    if recorder is None or isinstance(recorder, list):
        return []
    kind, index = (recorder, 0) if isinstance(recorder, type) else (recorder.target_class, recorder.index)
    return [(index, module) for module in model.modules() if isinstance(module, kind)]


def _shares(chosen: Tensor, num_experts: int) -> Tensor:
    """The share of the tokens that each expert gets, `[E]`; they sum to k."""
    return torch.bincount(chosen.flatten(), minlength=num_experts).float() / len(chosen)
