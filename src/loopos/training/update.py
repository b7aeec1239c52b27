"""One optimizer step, for all methods: accumulate, count, divide, clip, check, step.

A method's loss returns named sums. The count of each name over the whole step (all micro-batches, all ranks) is known
before the first forward, and only this module divides sums by counts. The result does not depend on how rows are split
into micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from loopos.config.diagnostics import UserError
from loopos.config.sections import TrainingSection
from loopos.functional.reductions import weighted_mean
from loopos.training.distributed import World
from loopos.training.optimizers import OptimizerSet, OptimizerSettings
from loopos.training.precision import MasterWeights

BatchT = TypeVar("BatchT", contravariant=True)


class Objective(Protocol[BatchT]):
    """What a method provides to `Update`. Names without a weight are only reported."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Name → weight in the training loss."""
        ...

    def counts(self, batch: BatchT) -> Mapping[str, float]:
        """The count of each name in this batch, without a forward pass."""
        ...

    def loss(self, batch: BatchT) -> Mapping[str, Tensor]:
        """The sum of each name over this batch, as scalars."""
        ...

    def idle(self, batch: BatchT) -> Tensor:
        """Zero, computed through the same modules as `loss`: for a process without rows in this step."""
        ...


class NonFiniteStep(UserError):
    """A loss or gradient is not finite. The weights are those before the step."""

    exit_code = 1


@dataclass(frozen=True)
class StepResult:
    """`losses`: mean of each name over the step. `gradient_norm`: of all trained parameters, before clipping.
    `skipped`: the step was not finite and was not applied.
    """

    losses: dict[str, float]
    gradient_norm: float
    skipped: bool = False


class Update:
    """Applies optimizer steps. In fp16 the loss is scaled by a dynamic factor (Micikevicius et al. 2018); an overflow
    lowers the factor and is not an error.
    """

    def __init__(
        self,
        master_weights: MasterWeights,
        optimizer: OptimizerSet,
        *,
        max_gradient_norm: float | None,
        on_nonfinite: str = "stop",
        world: World = World(),
        autocast: tuple[str, torch.dtype] | None = None,
    ) -> None:
        """autocast: device type and number format, for fp16 with fp32 weights; None if the weights have the format
        themselves.
        """
        self.master_weights, self.optimizer, self.world = master_weights, optimizer, world
        self.max_gradient_norm, self.on_nonfinite = max_gradient_norm, on_nonfinite
        self._autocast = autocast
        self.loss_scale = 2.0**16 if autocast is not None and autocast[1] == torch.float16 else 1.0
        self._scales = self.loss_scale != 1.0
        self.steps_since_overflow = 0

    def __call__(
        self,
        batches: Sequence[BatchT],
        objective: Objective[BatchT],
        learning_rate_factor: float,
        *,
        idle: Callable[[], BatchT] | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """One step over this rank's micro-batches, which may be none. idle: provides a batch for the extra passes of a
        rank that has fewer micro-batches than others, if the model is sharded. before_step: called before the weights
        change.

        Raises `NonFiniteStep` if a loss or gradient is not finite and `on_nonfinite` is "stop".
        """
        counts = self._counts(batches, objective)
        self.master_weights.begin()
        totals: dict[str, Tensor] = {}
        for batch in batches:
            with self._format():
                parts = objective.loss(batch)
            weighted_loss = weighted_mean(parts, counts, objective.weights)
            torch.autograd.backward(weighted_loss * self.loss_scale)
            for name, part in parts.items():
                # Summed where it is: reading a number waits for the device, so all are read together, once a step.
                value = part.detach().to(torch.float32 if part.device.type == "mps" else torch.float64)
                totals[name] = totals[name] + value if name in totals else value
        self._run_along(len(batches), objective, idle)
        self.master_weights.finish()
        gradients = [parameter.grad for parameter in self.master_weights.trained() if parameter.grad is not None]
        summed = self.world.sum_floats(dict.fromkeys(counts, 0.0) | _read(totals))
        losses = {name: total / counts[name] if counts[name] else 0.0 for name, total in summed.items()}
        norm = self._norm(gradients) / self.loss_scale
        before_step()
        return self._apply(gradients, losses, norm, learning_rate_factor)

    def _format(self) -> AbstractContextManager[object]:
        return torch.autocast(self._autocast[0], self._autocast[1]) if self._autocast else nullcontext()

    def _run_along(self, num_batches: int, objective: Objective[BatchT], idle: Callable[[], BatchT] | None) -> None:
        """With a sharded model, runs as many passes as the rank with the most micro-batches."""
        if self.master_weights.sharding is None:
            return
        assert idle is not None, "a sharded model needs batches for idle passes"
        for _ in range(num_batches, self.world.all_reduce_max(num_batches)):
            with self._format():
                nothing = objective.idle(idle())
            torch.autograd.backward(nothing)

    def _norm(self, gradients: Sequence[Tensor]) -> float:
        """The L2 norm of all gradients, summed over the ranks."""
        if self.master_weights.sharding is None:
            self.world.sum_tensors(gradients)
            return float(torch.nn.utils.get_total_norm(gradients))
        return math.sqrt(self.world.sum_all({"squares": self.master_weights.squares()})["squares"])

    def _counts(self, batches: Sequence[BatchT], objective: Objective[BatchT]) -> dict[str, float]:
        names = dict.fromkeys(objective.weights, 0.0)
        for batch in batches:
            for name, count in objective.counts(batch).items():
                names[name] = names.get(name, 0.0) + count
        return self.world.sum_floats(names)

    def _apply(self, gradients: Sequence[Tensor], losses: dict[str, float], norm: float, factor: float) -> StepResult:
        finite = all(math.isfinite(loss) for loss in losses.values())
        if not (finite and math.isfinite(norm)):
            # At a scale of 1 the gradients themselves overflow: a smaller scale cannot make them finite.
            if finite and self.loss_scale > 1.0:
                self.loss_scale, self.steps_since_overflow = self.loss_scale / 2, 0
                return StepResult(losses, norm, skipped=True)
            if self.on_nonfinite == "skip":
                return StepResult(losses, norm, skipped=True)
            named = ", ".join(f"{name} {loss}" for name, loss in losses.items())
            raise NonFiniteStep(f"not a finite number: {named}, gradient norm {norm}; the step was not applied")
        scale = 1.0 / self.loss_scale
        if self.max_gradient_norm is not None and norm > self.max_gradient_norm:
            scale *= self.max_gradient_norm / (norm + 1e-6)
        if scale != 1.0:
            torch._foreach_mul_(list(gradients), scale)
        self.optimizer.set_factor(factor)
        self.optimizer.step()
        self.master_weights.write_back()
        if self._scales:
            self.steps_since_overflow += 1
            if self.steps_since_overflow % 2000 == 0:
                self.loss_scale *= 2
        return StepResult(losses, norm)


def _read(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of scalars on one device, read together."""
    return dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True)) if totals else {}


def build_update(
    model: nn.Module,
    master_weights: MasterWeights,
    settings: TrainingSection,
    precision: str,
    world: World,
    *,
    head: Collection[str],
) -> Update:
    """The update that a config's `training` section describes. head: names of parameters with the head's learning
    rate.
    """
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    # Shards may be offloaded to host memory, so their device is not where the model runs.
    device = master_weights.sharding.device if master_weights.sharding is not None else next(model.parameters()).device
    return Update(
        master_weights,
        OptimizerSet(
            OptimizerSettings.of(settings),
            master_weights.parameters,
            head=head,
            embeddings=embeddings,
            without_decay=master_weights.partly_trained,
        ),
        max_gradient_norm=settings.max_grad_norm,
        on_nonfinite=settings.on_nonfinite,
        world=world,
        autocast=(device.type, torch.float16) if precision == "fp16" else None,
    )
