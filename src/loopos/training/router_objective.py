"""An objective with the auxiliary loss of a mixture of experts beside its own.

Enters: an objective over packed rows, and the recorder of its model's routers. Leaves: the same sums, with
"router_aux_loss" and "expert_load". Left out: what the routers did (`models.routers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from loopos.config.faults import UserError
from loopos.functional.packing import PackedLayout
from loopos.training.update import Objective


class Routing(Protocol):
    """How the routers spread the tokens of a pass, as `models.routers.Routing`."""

    @property
    def auxiliary_loss(self) -> Tensor: ...

    @property
    def load(self) -> Tensor: ...


class Recorder(Protocol):
    """What keeps the routing of a model's last pass."""

    def take(self, layout: PackedLayout) -> Routing: ...


class Routed(Protocol):
    """A model, and the recorder of its routers; None for one without."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def routers(self) -> Recorder | None: ...


class Packed(Protocol):
    """A batch whose rows lie behind one another."""

    @property
    def layout(self) -> PackedLayout: ...


BatchT = TypeVar("BatchT", bound=Packed)


@dataclass(frozen=True)
class RouterObjective(Generic[BatchT]):
    """loss + c·(E·Σ_e f_e·P_e), with f_e the share of the tokens that expert e gets and P_e its mean probability
    (Fedus et al. 2021, equations 4 to 6; over k experts a token and all layers together, as in transformers).

    f and P are those of a forward pass, and passes count by their tokens.
    """

    objective: Objective[BatchT]
    recorder: Recorder
    coefficient: float

    @property
    def weights(self) -> Mapping[str, float]:
        extra = {"router_aux_loss": self.coefficient} if self.coefficient else {}
        return {**self.objective.weights, **extra}

    def counts(self, batch: BatchT) -> Mapping[str, float]:
        tokens = float(batch.layout.num_tokens)
        return {**self.objective.counts(batch), "router_aux_loss": tokens, "expert_load": tokens}

    def loss(self, batch: BatchT) -> Mapping[str, Tensor]:
        sums = self.objective.loss(batch)
        routing = self.recorder.take(batch.layout)
        tokens = batch.layout.num_tokens
        return {**sums, "router_aux_loss": routing.auxiliary_loss * tokens, "expert_load": routing.load * tokens}

    def idle(self, batch: BatchT) -> Tensor:
        return self.objective.idle(batch)


def with_router_loss(objective: Objective[BatchT], backbone: Routed, coefficient: float) -> Objective[BatchT]:
    """The objective with the loss and the load of the model's routers, and as it is for a model without routers.
    Raises `UserError` where a loss is configured that the model cannot have.
    """
    if backbone.routers is not None:
        return RouterObjective(objective, backbone.routers, coefficient)
    if coefficient:
        raise UserError(
            f"training.router_aux_loss: got {coefficient:g}, but {type(backbone.model).__name__} has no routers of "
            "experts whose logits are known; set it to 0"
        )
    return objective
