"""Rollout workers in the test's own process, on a clock of their own: they answer, die, are late, hang or answer twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from loopos.generation.completions import Completion
from loopos.rl.workers.protocol import Answered, Event, Lost, Order, WorkerReady

Worker = Callable[[Order, Callable[[], bytes]], list[Completion]]


def echo(order: Order, fetch: Callable[[], bytes]) -> list[Completion]:
    """The prompt, its seed and the sample, as tokens."""
    return [
        Completion(
            index, sample, [*prompt, settings.seed, sample], "text", [-0.5] * (len(prompt) + 2), None, (), "length"
        )
        for index, (prompt, settings) in enumerate(zip(order.request.prompts, order.request.settings, strict=True))
        for sample in range(order.request.n)
    ]


class FakeWorkers:
    """`behave(worker, how many orders it had before)` is "answer", "die", "twice", "hang", or seconds until the answer;
    `joins_at(worker)`: the time at which a worker has started.
    """

    def __init__(
        self,
        make: Callable[[], Worker] = lambda: echo,
        behave: Callable[[int, int], str | float] = lambda worker, order: "answer",
        joins_at: Callable[[int], float] = lambda worker: 0.0,
    ) -> None:
        self.now = 0.0
        self.submitted: list[tuple[int, Order]] = []
        self.published: list[int] = []
        self.weights: dict[int, bytes] = {}
        self.ended: list[int] = []
        self.closed = False
        self._make, self._behave, self._joins_at = make, behave, joins_at
        self._workers: dict[int, Worker] = {}
        self._started = 0
        self._orders: Counter[int] = Counter()
        self._coming: list[tuple[float, Event]] = []

    def start(self) -> int:
        worker, self._started = self._started, self._started + 1
        self._workers[worker] = self._make()
        self._coming.append((self._joins_at(worker), WorkerReady(worker, f"fake {worker}")))
        return worker

    def publish(self, version: int, weights: bytes) -> None:
        self.published.append(version)
        self.weights[version] = weights

    def forget(self, version: int) -> None:
        del self.weights[version]

    def submit(self, worker: int, order: Order) -> None:
        assert order.indices
        assert worker in self._workers, "a worker that is gone was asked"
        what = self._behave(worker, self._orders[worker])
        self._orders[worker] += 1
        self.submitted.append((worker, order))
        if what == "hang":
            return
        if what == "die":
            del self._workers[worker]
            self._coming.append((self.now, Lost(worker, "killed")))
            return
        after = what if isinstance(what, float) else 0.0
        answer = Answered(worker, order, self._workers[worker](order, lambda: self.weights[order.version]))
        self._coming += [(self.now + after, answer)] * (2 if what == "twice" else 1)

    def events(self, seconds: float) -> list[Event]:
        first = min((due for due, _ in self._coming), default=float("inf"))
        if first > self.now:
            self.now = min(first, self.now + seconds)
        due = [event for at, event in self._coming if at <= self.now]
        self._coming = [(at, event) for at, event in self._coming if at > self.now]
        return due

    def end(self, worker: int) -> None:
        self.ended.append(worker)
        self._workers.pop(worker, None)
        self._coming = [(at, event) for at, event in self._coming if event.worker != worker]

    def close(self) -> None:
        self.closed = True
