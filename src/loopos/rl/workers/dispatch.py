"""Distributes prompts over workers that may die, be slow, answer twice or start late. Each prompt is completed exactly
once.

Prompts of a lost or late worker are given to another; duplicate answers are dropped. `ray_transport.py` reaches the
workers; `remote.py` chooses the weights.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loopos.config.diagnostics import MissingRequirement
from loopos.generation.completions import Completion
from loopos.rl.workers.protocol import Answered, Event, Order, Request, Transport, WorkerReady

# Seconds between two checks for late workers.
_LOOK = 1.0
# A worker that is silent for this many timeouts counts as lost.
_LOST_AFTER = 3


class _Batch:
    """A request and its completions so far. `waiting`: indices of prompts that no worker has."""

    def __init__(self, request: Request, version: int) -> None:
        self.request, self.version = request, version
        self.waiting = deque(range(len(request.prompts)))
        self.completed: dict[int, list[Completion]] = {}

    @property
    def is_whole(self) -> bool:
        return len(self.completed) == len(self.request.prompts)

    def order(self, number: int, most: int) -> Order:
        """An order of at most `most` waiting prompts."""
        indices = tuple(self.waiting.popleft() for _ in range(min(most, len(self.waiting))))
        return Order(number, self.version, indices, self.request.of(indices))

    def put_back(self, indices: Sequence[int]) -> int:
        """Puts unfinished prompts back to the front of the queue; returns their number."""
        missing = [index for index in indices if index not in self.completed and index not in self.waiting]
        self.waiting.extendleft(reversed(missing))
        return len(missing)

    def take(self, order: Order, completions: Sequence[Completion]) -> int:
        """Stores new completions; returns the number of prompts that were complete already."""
        answers: dict[int, dict[int, Completion]] = {index: {} for index in order.indices}
        for each in completions:
            index = order.indices[each.prompt_index]
            assert each.sample_index not in answers[index], "a sample twice in one answer"
            answers[index][each.sample_index] = replace(each, prompt_index=index)
        doubled = 0
        for index, samples in answers.items():
            assert sorted(samples) == list(range(order.request.n)), f"{sorted(samples)} of {order.request.n} samples"
            if index in self.completed:
                doubled += 1
                continue
            self.completed[index] = [samples[sample] for sample in range(order.request.n)]
            if index in self.waiting:
                self.waiting.remove(index)
        return doubled


@dataclass
class _Assignment:
    """The order of a worker. `since`: when it was submitted. `is_late`: its prompts were given to others too."""

    order: Order
    since: float
    is_late: bool = False


class Dispatcher:
    """Splits each request's prompts evenly over the workers as they become free."""

    def __init__(
        self,
        transport: Transport,
        *,
        workers: int,
        restarts: int,
        timeout: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """workers: started at once. restarts: lost workers to replace. timeout: seconds, from the section `rollout`.
        say: called with a message for every worker that joins or is lost.
        """
        self._transport, self._restarts, self._timeout = transport, restarts, timeout
        self._say, self._clock = say, clock
        self._starting = {transport.start() for _ in range(workers)}
        self._idle: set[int] = set()
        self._assigned: dict[int, _Assignment] = {}
        self._batches: dict[int, _Batch] = {}
        self._num_requests = 0
        self._versions: list[int] = []
        self._nobody_since = clock()
        self.counts: Counter[str] = Counter()

    def publish(self, version: int, weights: Callable[[], bytes]) -> None:
        """Sets the weights for later requests. `weights` is called only for a new version."""
        if version not in self._versions:
            self._transport.publish(version, weights())
            self._versions.append(version)

    def begin(self, request: Request) -> int:
        """Queues a request; returns its number for `finished`."""
        number, self._num_requests = self._num_requests, self._num_requests + 1
        self._batches[number] = _Batch(request, self._versions[-1])
        for event in self._transport.events(0.0):
            self._handle(event)
        self._assign()
        return number

    def finished(self, number: int, *, seconds: float) -> list[Completion] | None:
        """The request's completions in the order of `Engine.generate`; None if it takes longer than `seconds`. Its
        prompts have priority over other requests. Raises `MissingRequirement` when no worker is left.
        """
        batch, end = self._batches[number], self._clock() + seconds
        while not batch.is_whole:
            self._assign(first=number)
            left = end - self._clock()
            if left <= 0:
                return None
            for event in self._transport.events(min(left, _LOOK)):
                self._handle(event)
            if not batch.is_whole:
                self._look_for_late()
        del self._batches[number]
        self._assign()
        in_use = {batch.version for batch in self._batches.values()} | {self._versions[-1]}
        for version in set(self._versions) - in_use:
            self._transport.forget(version)
            self._versions.remove(version)
        return [completion for _, samples in sorted(batch.completed.items()) for completion in samples]

    def close(self) -> None:
        """Ends all workers."""
        self._transport.close()

    @property
    def _living(self) -> int:
        return len(self._idle) + sum(not assignment.is_late for assignment in self._assigned.values())

    def _assign(self, first: int | None = None) -> None:
        for worker in sorted(self._idle):
            numbers = sorted(self._batches, key=lambda number: (number != first, number))
            number = next((number for number in numbers if self._batches[number].waiting), None)
            if number is None:
                return
            batch = self._batches[number]
            order = batch.order(number, -(-len(batch.request.prompts) // self._living))
            self._idle.discard(worker)
            self._assigned[worker] = _Assignment(order, self._clock())
            self._transport.submit(worker, order)

    def _handle(self, event: Event) -> None:
        if isinstance(event, WorkerReady):
            if event.worker in self._starting:
                self._starting.discard(event.worker)
                self._idle.add(event.worker)
                self._say(f"rollout worker {event.worker}: {event.where}")
        elif isinstance(event, Answered):
            self._take(event)
        else:
            self._lose(event.worker, event.why)

    def _take(self, event: Answered) -> None:
        assignment = self._assigned.get(event.worker)
        if assignment is not None and assignment.order is event.order:
            del self._assigned[event.worker]
            self._idle.add(event.worker)
        batch = self._batches.get(event.order.batch)
        doubled = len(event.order.indices) if batch is None else batch.take(event.order, event.completions)
        self.counts["doubled"] += doubled

    def _put_back(self, order: Order) -> int:
        batch = self._batches.get(order.batch)
        number = 0 if batch is None else batch.put_back(order.indices)
        self.counts["redone"] += number
        return number

    def _look_for_late(self) -> None:
        now = self._clock()
        for worker, assignment in sorted(self._assigned.items()):
            silent = now - assignment.since
            if silent > _LOST_AFTER * self._timeout:
                self._transport.end(worker)
                self._lose(worker, f"no answer for {silent:.0f} s")
            elif silent > self._timeout and not assignment.is_late:
                assignment.is_late = True
                number = self._put_back(assignment.order)
                self._say(
                    f"rollout worker {worker} is late ({silent:.0f} s): {number} prompts are also given to others"
                )
        if not self._idle and not self._assigned and now - self._nobody_since > self._timeout:
            raise MissingRequirement(
                f"no rollout worker started within {self._timeout:.0f} s; expected room for {len(self._starting)} "
                "with rollout.cpus_per_worker cores and rollout.gpus_per_worker GPUs each, or a longer rollout.timeout"
            )

    def _lose(self, worker: int, why: str) -> None:
        assignment = self._assigned.pop(worker, None)
        if assignment is None and worker not in self._idle | self._starting:
            return
        self._idle.discard(worker)
        self._starting.discard(worker)
        if not self._idle and not self._assigned:
            self._nobody_since = self._clock()
        message = f"rollout worker {worker} is lost ({why})"
        if assignment is not None:
            message += f": its {self._put_back(assignment.order)} prompts go to others"
        if self._restarts > 0:
            self._restarts -= 1
            started = self._transport.start()
            self._starting.add(started)
            self._say(f"{message}; worker {started} is started as replacement")
            return
        left = len(self._idle) + len(self._assigned) + len(self._starting)
        if left == 0:
            raise MissingRequirement(
                f"all rollout workers are lost and rollout.restarts is used up; the last was worker {worker} ({why}); "
                "the same command with --resume continues from the newest checkpoint"
            )
        self._say(f"{message}; the run continues with {left}, because rollout.restarts is used up")
