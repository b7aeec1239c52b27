"""Prompts among workers that may die, be slow, answer twice or come later: each prompt's completions are found once.

Enters: requests, a transport. Leaves: their completions, in order. Prompts of a worker that is lost, or late, go to
another; what comes a second time is dropped. Left out: how workers are reached (`transport.py`), which weights
(`remote.py`).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loopos.config.diagnostics import MissingRequirement
from loopos.generation.completions import Completion
from loopos.rl.workers.protocol import Answered, Event, Joined, Order, Request, Transport

# Seconds between two looks at who is late.
_LOOK = 1.0
# A worker that is silent for so many times the timeout counts as lost.
_LOST_AFTER = 3


class _Batch:
    """A request, and what is found of it. `waiting`: places that no worker has."""

    def __init__(self, request: Request, version: int) -> None:
        self.request, self.version = request, version
        self.waiting = deque(range(len(request.prompts)))
        self.found: dict[int, list[Completion]] = {}

    @property
    def is_whole(self) -> bool:
        return len(self.found) == len(self.request.prompts)

    def order(self, number: int, most: int) -> Order:
        """An order of at most so many of the waiting prompts."""
        places = tuple(self.waiting.popleft() for _ in range(min(most, len(self.waiting))))
        return Order(number, self.version, places, self.request.of(places))

    def put_back(self, places: Sequence[int]) -> int:
        """Those not found yet wait again, before all others; their number."""
        missing = [place for place in places if place not in self.found and place not in self.waiting]
        self.waiting.extendleft(reversed(missing))
        return len(missing)

    def take(self, order: Order, completions: Sequence[Completion]) -> int:
        """Keeps what is new; the number of prompts that had been found before."""
        answers: dict[int, dict[int, Completion]] = {place: {} for place in order.places}
        for each in completions:
            place = order.places[each.prompt_index]
            assert each.sample_index not in answers[place], "a sample twice in one answer"
            answers[place][each.sample_index] = replace(each, prompt_index=place)
        doubled = 0
        for place, samples in answers.items():
            assert sorted(samples) == list(range(order.request.n)), f"{sorted(samples)} of {order.request.n} samples"
            if place in self.found:
                doubled += 1
                continue
            self.found[place] = [samples[sample] for sample in range(order.request.n)]
            if place in self.waiting:
                self.waiting.remove(place)
        return doubled


@dataclass
class _Held:
    """What a worker is at. `since`: when it got it; `is_late`: others have been given it too."""

    order: Order
    since: float
    is_late: bool = False


class Dispatcher:
    """Gives each request's prompts in equal parts to the workers there are, as they become free."""

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
        """workers: started at once; restarts: lost ones that are started anew. timeout: seconds, as the section
        `rollout` tells. say: is told of every worker that comes and goes.
        """
        self._transport, self._restarts, self._timeout = transport, restarts, timeout
        self._say, self._clock = say, clock
        self._starting = {transport.start() for _ in range(workers)}
        self._idle: set[int] = set()
        self._held: dict[int, _Held] = {}
        self._batches: dict[int, _Batch] = {}
        self._begun = 0
        self._versions: list[int] = []
        self._nobody_since = clock()
        self.counts: Counter[str] = Counter()

    def publish(self, version: int, weights: Callable[[], bytes]) -> None:
        """Requests that begin from here on are written with these weights, asked for where the version is new."""
        if version not in self._versions:
            self._transport.publish(version, weights())
            self._versions.append(version)

    def begin(self, request: Request) -> int:
        """Workers get to it as they are free; the number to ask for it by."""
        number, self._begun = self._begun, self._begun + 1
        self._batches[number] = _Batch(request, self._versions[-1])
        for event in self._transport.events(0.0):
            self._heed(event)
        self._hand_out()
        return number

    def finished(self, number: int, *, seconds: float) -> list[Completion] | None:
        """The request's completions in the order of `Engine.generate`; None where it takes longer than that. Its
        prompts go before those of other requests. Raises `MissingRequirement` when no worker is left.
        """
        batch, end = self._batches[number], self._clock() + seconds
        while not batch.is_whole:
            self._hand_out(first=number)
            left = end - self._clock()
            if left <= 0:
                return None
            for event in self._transport.events(min(left, _LOOK)):
                self._heed(event)
            if not batch.is_whole:
                self._look_for_late()
        del self._batches[number]
        self._hand_out()
        in_use = {batch.version for batch in self._batches.values()} | {self._versions[-1]}
        for version in set(self._versions) - in_use:
            self._transport.forget(version)
            self._versions.remove(version)
        return [completion for _, samples in sorted(batch.found.items()) for completion in samples]

    def close(self) -> None:
        """Ends all workers."""
        self._transport.close()

    @property
    def _living(self) -> int:
        return len(self._idle) + sum(not held.is_late for held in self._held.values())

    def _hand_out(self, first: int | None = None) -> None:
        for worker in sorted(self._idle):
            numbers = sorted(self._batches, key=lambda number: (number != first, number))
            number = next((number for number in numbers if self._batches[number].waiting), None)
            if number is None:
                return
            batch = self._batches[number]
            order = batch.order(number, -(-len(batch.request.prompts) // self._living))
            self._idle.discard(worker)
            self._held[worker] = _Held(order, self._clock())
            self._transport.ask(worker, order)

    def _heed(self, event: Event) -> None:
        if isinstance(event, Joined):
            if event.worker in self._starting:
                self._starting.discard(event.worker)
                self._idle.add(event.worker)
                self._say(f"rollout worker {event.worker}: {event.where}")
        elif isinstance(event, Answered):
            self._take(event)
        else:
            self._lose(event.worker, event.why)

    def _take(self, event: Answered) -> None:
        held = self._held.get(event.worker)
        if held is not None and held.order is event.order:
            del self._held[event.worker]
            self._idle.add(event.worker)
        batch = self._batches.get(event.order.batch)
        doubled = len(event.order.places) if batch is None else batch.take(event.order, event.completions)
        self.counts["doubled"] += doubled

    def _put_back(self, order: Order) -> int:
        batch = self._batches.get(order.batch)
        number = 0 if batch is None else batch.put_back(order.places)
        self.counts["redone"] += number
        return number

    def _look_for_late(self) -> None:
        now = self._clock()
        for worker, held in sorted(self._held.items()):
            silent = now - held.since
            if silent > _LOST_AFTER * self._timeout:
                self._transport.end(worker)
                self._lose(worker, f"no answer for {silent:.0f} s")
            elif silent > self._timeout and not held.is_late:
                held.is_late = True
                number = self._put_back(held.order)
                self._say(f"rollout worker {worker} is late ({silent:.0f} s): {number} prompts are given to others too")
        if not self._idle and not self._held and now - self._nobody_since > self._timeout:
            raise MissingRequirement(
                f"no rollout worker has started within {self._timeout:.0f} s: expected room for {len(self._starting)} "
                "with rollout.cpus_per_worker cores and rollout.gpus_per_worker GPUs each, or a longer rollout.timeout"
            )

    def _lose(self, worker: int, why: str) -> None:
        held = self._held.pop(worker, None)
        if held is None and worker not in self._idle | self._starting:
            return
        self._idle.discard(worker)
        self._starting.discard(worker)
        if not self._idle and not self._held:
            self._nobody_since = self._clock()
        told = f"rollout worker {worker} is lost ({why})"
        if held is not None:
            told += f": its {self._put_back(held.order)} prompts go to others"
        if self._restarts > 0:
            self._restarts -= 1
            started = self._transport.start()
            self._starting.add(started)
            self._say(f"{told}; worker {started} is started in its place")
            return
        left = len(self._idle) + len(self._held) + len(self._starting)
        if left == 0:
            raise MissingRequirement(
                f"all rollout workers are lost, and rollout.restarts used up; the last: worker {worker} ({why}); what "
                "was trained up to the newest checkpoint is safe: the same command with --resume goes on"
            )
        self._say(f"{told}; the run goes on with {left}, as rollout.restarts is used up")
