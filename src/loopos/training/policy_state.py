"""What a run of PPO carries from step to step besides weights and optimizer.

Enters: its moving parts. Leaves: tensors and JSON for a checkpoint, and the parts put back to where one left them. Left
out: the files (`checkpoint.py`), weights and optimizer (`run_state.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from loopos.functional.advantages import KlController
from loopos.training.distributed import World
from loopos.training.guards import Guards
from loopos.training.policy_objective import PpoObjective
from loopos.training.rollouts import RolloutBatches


class Stateful(Protocol):
    """What gives its state as JSON and takes it back."""

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class WrittenAhead(Protocol):
    """Responses that are begun before the policy gets to them."""

    def drain(self) -> None:
        """Waits for all that is in flight, on every process."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Under names that begin with "ahead-"."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None: ...


@dataclass
class PolicyState:
    """The rollouts in use and the place in them, β, the extremes of the ratio, the guards with the alarms that they
    sounded, what the check of the policy remembers, and the responses of iterations to come.
    """

    batches: RolloutBatches
    controller: KlController
    objective: PpoObjective
    guards: Guards
    check: Stateful | None
    ahead: WrittenAhead | None = None
    alarms: list[str] = field(default_factory=list)

    def synchronise(self, world: World) -> None:
        """What a checkpoint needs, on all ranks: the extremes of the ratio, whole responses of iterations to come."""
        self.join_extremes(world)
        if self.ahead is not None:
            self.ahead.drain()

    def join_extremes(self, world: World) -> None:
        """The extremes of the ratio become those of all ranks."""
        extremes = self.objective.extremes
        gathered = [pair for pair in world.gather((extremes.smallest, extremes.largest)) if isinstance(pair, tuple)]
        extremes.smallest, extremes.largest = min(low for low, _ in gathered), max(high for _, high in gathered)

    def tensors(self) -> Mapping[str, Tensor]:
        return {**self.batches.tensors(), **(self.ahead.tensors() if self.ahead is not None else {})}

    def state(self) -> dict[str, Any]:
        return {
            "rollouts": self.batches.state(),
            "kl_coefficient": self.controller.coefficient,
            "ratios": [self.objective.extremes.smallest, self.objective.extremes.largest],
            "guards": self.guards.state(),
            "alarms": list(self.alarms),
            "check": self.check.state() if self.check is not None else None,
            "ahead": self.ahead.state() if self.ahead is not None else None,
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("ahead-")}
        self.batches.load(own, state["rollouts"])
        if self.ahead is not None and state["ahead"] is not None:
            self.ahead.load(tensors, state["ahead"])
        self.controller.coefficient = state["kl_coefficient"]
        in_use = state["rollouts"]["kl_coefficient"]
        self.objective.kl_coefficient = self.controller.coefficient if in_use is None else in_use
        self.objective.extremes.smallest, self.objective.extremes.largest = state["ratios"]
        self.guards.load(state["guards"])
        self.alarms[:] = state["alarms"]
        if self.check is not None and state["check"] is not None:
            self.check.load(state["check"])
