"""What is asked of whatever writes a policy's responses, and the writer in this very process.

Enters: prompts with the settings of each. Leaves: completions of this process's share of them, and how far behind the
policy the one that wrote was. Left out: workers elsewhere (`remote.py`).

What workers are to the one who gives them work: orders out, answers and losses back.

Enters: nothing. Leaves: the records and the protocol that `dispatch.py` speaks; `ray_transport.py` is one way to keep
it. Left out: who gets which prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from transformers import PreTrainedTokenizerBase

from loopos.generation.completions import Completion
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingSettings


@dataclass(frozen=True)
class Request:
    """`n` completions of every prompt; `settings`: those of each, whose seeds make its completions what they are
    whoever writes them.
    """

    prompts: list[list[int]]
    settings: list[SamplingSettings]
    n: int = 1

    def of(self, places: Sequence[int]) -> Request:
        """The same of some of its prompts."""
        return Request([self.prompts[place] for place in places], [self.settings[place] for place in places], self.n)


@dataclass(frozen=True)
class Written:
    """Completions of a share of a request's prompts, whose `prompt_index` is the place in the whole request.
    `staleness`: iterations that the policy which wrote them is behind.
    """

    completions: list[Completion]
    staleness: int = 0


class RolloutEngine(Protocol):
    """What writes responses with the weights as they are now."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def summary(self) -> str:
        """What writes, in words."""
        ...

    def write(self, request: Request, *, iteration: int | None = None) -> Written:
        """This process's share: every process of a run asks for the same. iteration: that of training whose responses
        these are, which may have been begun before.
        """
        ...

    def timing(self) -> dict[str, float]:
        """What a clock and chance made of the writing since it was last asked."""
        ...

    def close(self) -> None:
        """Nothing is written any more."""
        ...


class LocalRollouts:
    """The engine over the very weights that train."""

    def __init__(self, engine: Engine, *, share: tuple[int, int] = (0, 1)) -> None:
        """share: (rank, ranks): this process answers every `ranks`-th prompt."""
        self.tokenizer, self._engine, self._share = engine.tokenizer, engine, share

    @property
    def summary(self) -> str:
        return self._engine.summary

    def write(self, request: Request, *, iteration: int | None = None) -> Written:
        rank, ranks = self._share
        places = range(rank, len(request.prompts), ranks)
        mine = request.of(places)
        completions = self._engine.generate(mine.prompts, mine.settings, n=request.n)
        return Written([replace(each, prompt_index=places[each.prompt_index]) for each in completions])

    def timing(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


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
