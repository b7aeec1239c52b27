"""Optimizers by name over the fp32 master weights: torch's own, with fused kernels where torch has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer

from loopos.config.sections import TrainingSection
from loopos.training.slices import RowSpan, rows_of

RowsT = TypeVar("RowsT", bound=RowSpan)
_SEPARATOR = "|"


@dataclass(frozen=True)
class OptimizerSettings:
    """`name`: sgd, adam, adamw, adafactor or muon. `learning_rate`: the peak. `head_learning_rate`: the peak for the
    head, None = the same. `lora_plus_ratio`: the peak for B of LoRA adapters / `learning_rate`.
    """

    name: str
    learning_rate: float
    head_learning_rate: float | None = None
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    lora_plus_ratio: float = 1.0

    @classmethod
    def of(cls, settings: TrainingSection) -> OptimizerSettings:
        """From a config's `training` section."""
        return cls(
            settings.optimizer,
            settings.learning_rate,
            settings.head_learning_rate,
            settings.momentum,
            settings.betas,
            settings.epsilon,
            settings.weight_decay,
            settings.lora.lora_plus_ratio if settings.lora is not None else 1.0,
        )

    def peak(self, name: str, *, is_head: bool) -> float:
        """The peak learning rate of a parameter. LoRA+ (Hayou et al. 2024): η_B = ratio · η_A."""
        if is_head and self.head_learning_rate is not None:
            return self.head_learning_rate
        return self.learning_rate * (self.lora_plus_ratio if ".lora_B." in name else 1.0)


class OptimizerSet:
    """One update rule over all parameters. Weight decay skips biases, norms and every other parameter with fewer than
    two dimensions. It shrinks weights by learning rate × decay; with sgd and adam it is added to the gradient.

    Muon orthogonalizes the update of the backbone's weight matrices (Jordan et al. 2024); embeddings, heads, norms and
    biases use AdamW, as its authors recommend.
    """

    def __init__(
        self,
        settings: OptimizerSettings,
        parameters: Mapping[str, nn.Parameter],
        *,
        head: Collection[str],
        embeddings: Collection[str] = (),
        without_decay: Collection[str] = (),
    ) -> None:
        """head: names with the head's learning rate. embeddings: names of embedding matrices, which use AdamW with
        Muon. without_decay: names of matrices that do not decay.
        """
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        matrices = {
            n
            for n, p in parameters.items()
            if settings.name == "muon" and p.ndim == 2 and n not in head and n not in embeddings
        }
        rest = {n: p for n, p in parameters.items() if n not in matrices}
        parts = {"muon": {n: parameters[n] for n in parameters if n in matrices}}
        parts["adamw" if settings.name == "muon" else settings.name] = rest
        self._optimizers: list[Optimizer] = [
            _build(settings, _groups(settings, part, head, without_decay), name) for name, part in parts.items() if part
        ]

    def set_factor(self, factor: float) -> None:
        """Sets every learning rate to its peak times `factor`."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor

    def step(self) -> None:
        """Applies the gradients. Parameters without a gradient do not change."""
        for optimizer in self._optimizers:
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors by `parameter|key`, for a checkpoint. Plain numbers are 0-d fp64 tensors."""
        tensors: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if value is not None:
                        tensors[f"{self._names[id(parameter)]}{_SEPARATOR}{key}"] = (
                            value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                        )
        return tensors

    def rows(self, rows: Mapping[str, RowsT]) -> dict[str, RowsT]:
        """Name → rows, for the state of parameters that are rows of larger tensors."""
        named = {entry: rows.get(entry.rpartition(_SEPARATOR)[0]) for entry, t in self.tensors().items() if t.ndim}
        return {entry: found for entry, found in named.items() if found is not None}

    def load(self, tensors: Mapping[str, Tensor], rows: Mapping[str, RowSpan] = MappingProxyType({})) -> None:
        """Restores what `tensors` returned, or the rows of it that belong to this process. Every entry must belong to a
        parameter of this set.
        """
        owner = {
            name: (optimizer, p)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            for name in [self._names[id(p)]]
        }
        for entry in tensors:
            name, _, key = entry.rpartition(_SEPARATOR)
            value = rows_of(tensors, entry, rows.get(name))
            optimizer, parameter = owner[name]
            if value.ndim == 0 and value.dtype == torch.float64:
                optimizer.state[parameter][key] = value.item()
            else:
                # Fused kernels read the step count on the device; other optimizers count on the CPU. The loaded
                # tensor may be a read-only map of the file, and the optimizer writes into its state.
                on_device = value.ndim > 0 or bool(optimizer.defaults.get("fused"))
                optimizer.state[parameter][key] = value.to(parameter.device if on_device else "cpu", copy=True)


def _groups(
    settings: OptimizerSettings,
    parameters: Mapping[str, nn.Parameter],
    head: Collection[str],
    without_decay: Collection[str],
) -> list[dict[str, object]]:
    """One group for each learning rate, and within it for what decays."""
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        is_head = name in head
        key = (is_head, settings.peak(name, is_head=is_head), parameter.ndim < 2 or name in without_decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[key], "lr": key[1], "peak": key[1], "weight_decay": 0.0 if key[2] else settings.weight_decay}
        for key in sorted(groups)
    ]


def _build(settings: OptimizerSettings, groups: list[dict[str, object]], name: str) -> Optimizer:
    if name == "sgd":
        return SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)
    if name == "adam":
        return Adam(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)
    if name == "adamw":
        return AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)
    if name == "adafactor":
        return Adafactor(groups, lr=settings.learning_rate)
    assert name == "muon", name
    return Muon(groups, lr=settings.learning_rate, momentum=settings.momentum or 0.95, adjust_lr_fn="match_rms_adamw")
