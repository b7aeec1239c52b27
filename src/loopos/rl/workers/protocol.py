"""The interfaces between training and rollout workers, and the rollout engine in the training process.

`dispatch.py` and `ray_transport.py` implement orders and events; `remote.py` uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from transformers import PreTrainedTokenizerBase

from loopos.generation.completions import Completion
from loopos.generation.settings import SamplingParams

# A worker with vLLM does not import it.
if TYPE_CHECKING:
    from loopos.generation.engine import Engine


@dataclass(frozen=True)
class Task:
    """A row of data that an environment plays. `source`: file and line."""

    row: Mapping[str, object]
    source: str


@dataclass(frozen=True)
class Request:
    """`n` completions of every prompt. `settings`: one per prompt; their seeds fix the completions on any worker.
    `tasks`: of each prompt, where an environment plays it; None without one.
    """

    prompts: list[list[int]]
    settings: list[SamplingParams]
    n: int = 1
    tasks: list[Task] | None = None

    def of(self, indices: Sequence[int]) -> Request:
        """The request for some of its prompts."""
        tasks = None if self.tasks is None else [self.tasks[index] for index in indices]
        prompts, settings = [self.prompts[index] for index in indices], [self.settings[index] for index in indices]
        return Request(prompts, settings, self.n, tasks)


@dataclass(frozen=True)
class Written:
    """Completions of a part of a request's prompts; `prompt_index` refers to the whole request. `staleness`: number of
    iterations by which the generating policy is older.
    """

    completions: list[Completion]
    staleness: int = 0


class RolloutEngine(Protocol):
    """Generates responses with the current weights."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def summary(self) -> str:
        """One line that describes the engine."""
        ...

    def write(self, request: Request, *, iteration: int | None = None) -> Written:
        """This process's part of the completions; every process passes the same request. iteration: the training
        iteration of these responses, which may have been requested earlier.
        """
        ...

    def timing(self) -> dict[str, float]:
        """Timing metrics since the last call."""
        ...

    def close(self) -> None:
        """Shuts the engine down."""
        ...


class Player(Protocol):
    """Plays an environment with an engine."""

    def answer(self, request: Request) -> Sequence[Completion]:
        """An episode as a completion for each sample of each task of the request, in order."""
        ...

    def close(self) -> None:
        """Ends what the environment's objects are made by."""
        ...


def answers_of(engine: Engine, player: Player | None, request: Request) -> list[Completion]:
    """The completions of a request: episodes of its tasks, or what the engine generates from its prompts."""
    if player is not None:
        return [*player.answer(request)]
    return engine.generate(request.prompts, request.settings, n=request.n)


class LocalRollouts:
    """The engine over the weights in training."""

    def __init__(
        self, engine: Engine, *, player: Player | None = None, data_parallel: tuple[int, int] = (0, 1)
    ) -> None:
        """player: of an environment, with this engine. data_parallel: (rank, size): this process answers every
        `size`-th prompt.
        """
        self.tokenizer, self._engine, self._player = engine.tokenizer, engine, player
        self._data_parallel = data_parallel

    @property
    def summary(self) -> str:
        return self._engine.summary

    def write(self, request: Request, *, iteration: int | None = None) -> Written:
        rank, ranks = self._data_parallel
        indices = range(rank, len(request.prompts), ranks)
        own = request.of(indices)
        # A rank may have no prompts.
        completions = answers_of(self._engine, self._player, own) if own.prompts else []
        return Written([replace(each, prompt_index=indices[each.prompt_index]) for each in completions])

    def timing(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        if self._player is not None:
            self._player.close()


@dataclass(frozen=True)
class Order:
    """Prompts for one worker. `batch`: the request they belong to; `indices`: of the prompts in it; `version`: of the
    weights.
    """

    batch: int
    version: int
    indices: tuple[int, ...]
    request: Request


@dataclass(frozen=True)
class WorkerReady:
    """A worker has loaded the model and is idle. `where`: process and host."""

    worker: int
    where: str


@dataclass(frozen=True)
class Answered:
    """A worker's completions of an order; `prompt_index` refers to the order's prompts. The worker is idle again."""

    worker: int
    order: Order
    completions: list[Completion]


@dataclass(frozen=True)
class Lost:
    """A worker is gone. `why`: a short reason."""

    worker: int
    why: str


Event: TypeAlias = WorkerReady | Answered | Lost


class Transport(Protocol):
    """Starts and reaches workers by number; numbers are not reused."""

    def start(self) -> int:
        """Starts a worker and returns its number. It accepts orders after its `WorkerReady` event."""
        ...

    def publish(self, version: int, weights: bytes) -> None:
        """Stores weights (the bytes of a safetensors file) for workers to fetch until they are forgotten."""
        ...

    def forget(self, version: int) -> None:
        """Drops a version that no further order uses."""
        ...

    def submit(self, worker: int, order: Order) -> None:
        """Submits an order to an idle worker. The order's version must be published."""
        ...

    def events(self, seconds: float) -> list[Event]:
        """All events so far; waits at most `seconds` for the first. Raises `UserError` for an error that every worker
        would make.
        """
        ...

    def end(self, worker: int) -> None:
        """Ends a worker without further events."""
        ...

    def close(self) -> None:
        """Ends all workers and releases their resources."""
        ...
