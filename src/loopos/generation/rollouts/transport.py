"""What workers are to the one who gives them work: orders out, answers and losses back.

Enters: nothing. Leaves: the records and the protocol that `dispatch.py` speaks; `ray_transport.py` is one way to keep
it. Left out: who gets which prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from loopos.generation.completions import Completion
from loopos.generation.rollouts.request import Request


@dataclass(frozen=True)
class Order:
    """Prompts for one worker. `batch`: what they are part of, `places`: where in it; `version`: of the weights."""

    batch: int
    version: int
    places: tuple[int, ...]
    request: Request


@dataclass(frozen=True)
class Joined:
    """A worker holds the model and wants work. `where`: process and host, in words."""

    worker: int
    where: str


@dataclass(frozen=True)
class Answered:
    """A worker's completions of an order, `prompt_index` counting the order's prompts; it wants work again."""

    worker: int
    order: Order
    completions: list[Completion]


@dataclass(frozen=True)
class Lost:
    """A worker is gone. `why`: in words."""

    worker: int
    why: str


Event: TypeAlias = Joined | Answered | Lost


class Transport(Protocol):
    """Workers somewhere, by number; no number comes twice."""

    def start(self) -> int:
        """Starts a worker; its number. It can be asked once it has `Joined`."""
        ...

    def publish(self, version: int, weights: bytes) -> None:
        """Keeps weights, a safetensors file's bytes, for workers to fetch until they are forgotten."""
        ...

    def forget(self, version: int) -> None:
        """No further order is of this version."""
        ...

    def ask(self, worker: int, order: Order) -> None:
        """Gives an idle worker an order, whose version has been published."""
        ...

    def events(self, seconds: float) -> list[Event]:
        """All that has happened, waiting so long for the first. Raises `UserError` for a worker's mistake that every
        worker would make.
        """
        ...

    def end(self, worker: int) -> None:
        """Ends a worker, of which nothing is heard again."""
        ...

    def close(self) -> None:
        """Ends all workers, and what was started for them."""
        ...
