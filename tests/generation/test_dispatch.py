"""Each sample of each prompt is returned once, even if workers die, are late, hang or answer twice."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from fake_workers import FakeWorkers

from loopos.config.diagnostics import MissingRequirement
from loopos.generation.completions import Completion
from loopos.generation.settings import SamplingParams
from loopos.rl.workers.dispatch import Dispatcher
from loopos.rl.workers.protocol import Request


def request_of(number: int, n: int = 1, first: int = 0) -> Request:
    indices = range(first, first + number)
    return Request([[index, index + 1] for index in indices], [SamplingParams(seed=index) for index in indices], n)


def expected(request: Request) -> list[tuple[int, int, list[int]]]:
    return [
        (index, sample, [*prompt, settings.seed, sample])
        for index, (prompt, settings) in enumerate(zip(request.prompts, request.settings, strict=True))
        for sample in range(request.n)
    ]


def as_tuples(completions: list[Completion] | None) -> list[tuple[int, int, list[int]]]:
    assert completions is not None
    return [(each.prompt_index, each.sample_index, each.token_ids) for each in completions]


def dispatcher_of(
    workers: FakeWorkers, number: int = 2, restarts: int = 0, timeout: float = 10.0
) -> tuple[Dispatcher, list[str]]:
    summary: list[str] = []
    found = Dispatcher(
        workers, workers=number, restarts=restarts, timeout=timeout, say=summary.append, clock=lambda: workers.now
    )
    found.publish(0, lambda: b"weights")
    return found, summary


def test_prompts_go_in_equal_parts_and_come_back_in_order() -> None:
    workers = FakeWorkers()
    dispatcher, summary = dispatcher_of(workers, 3)
    request = request_of(10, n=2)
    found = dispatcher.finished(dispatcher.begin(request), seconds=math.inf)
    assert as_tuples(found) == expected(request)
    assert [len(order.indices) for _, order in workers.submitted] == [4, 4, 2]
    assert summary == ["rollout worker 0: fake 0", "rollout worker 1: fake 1", "rollout worker 2: fake 2"]
    assert not +dispatcher.counts
    dispatcher.close()
    assert workers.closed


def test_a_dead_workers_prompts_go_to_others_and_it_is_started_anew() -> None:
    workers = FakeWorkers(behave=lambda worker, order: "die" if worker == 0 else "answer")
    dispatcher, summary = dispatcher_of(workers, 2, restarts=1)
    request = request_of(8)
    assert as_tuples(dispatcher.finished(dispatcher.begin(request), seconds=math.inf)) == expected(request)
    assert dispatcher.counts == {"redone": 4, "doubled": 0}
    assert (
        summary[2]
        == "rollout worker 0 is lost (killed): its 4 prompts go to others; worker 2 is started as replacement"
    )
    request_of(8)
    dispatcher.finished(dispatcher.begin(request_of(8)), seconds=math.inf)
    assert {worker for worker, _ in workers.submitted[-2:]} == {1, 2}


def test_without_restarts_the_run_continues_with_fewer_workers_until_none_is_left() -> None:
    workers = FakeWorkers(behave=lambda worker, order: "die" if worker == 0 or order == 2 else "answer")
    dispatcher, summary = dispatcher_of(workers)
    request = request_of(6)
    assert as_tuples(dispatcher.finished(dispatcher.begin(request), seconds=math.inf)) == expected(request)
    assert summary[-1].endswith(
        "its 3 prompts go to others; the run continues with 1, because rollout.restarts is used up"
    )
    with pytest.raises(MissingRequirement, match=r"all rollout workers are lost.*worker 1 \(killed\).*--resume"):
        dispatcher.finished(dispatcher.begin(request), seconds=math.inf)


def test_what_a_late_worker_answers_is_dropped_and_it_is_used_again() -> None:
    workers = FakeWorkers(behave=lambda worker, order: 25.0 if (worker, order) == (0, 0) else "answer")
    dispatcher, summary = dispatcher_of(workers)
    request = request_of(6)
    assert as_tuples(dispatcher.finished(dispatcher.begin(request), seconds=math.inf)) == expected(request)
    assert 10 < workers.now < 25
    assert summary[-1].startswith("rollout worker 0 is late")
    assert dispatcher.counts["redone"] == 3
    workers.now = 26.0
    second = dispatcher.finished(dispatcher.begin(request_of(6, first=50)), seconds=math.inf)
    assert as_tuples(second) == expected(request_of(6, first=50))
    assert dispatcher.counts["doubled"] == 3
    assert {worker for worker, _ in workers.submitted[-2:]} == {0, 1}
    assert workers.ended == []


def test_a_worker_that_hangs_for_three_times_as_long_is_lost() -> None:
    workers = FakeWorkers(behave=lambda worker, order: "hang" if worker == 0 else 24.0)
    dispatcher, summary = dispatcher_of(workers, restarts=1)
    request = request_of(6)
    assert as_tuples(dispatcher.finished(dispatcher.begin(request), seconds=math.inf)) == expected(request)
    assert workers.ended == [0]
    assert any("worker 0 is lost (no answer for 3" in line for line in summary)


def test_a_worker_that_comes_later_is_used() -> None:
    workers = FakeWorkers(joins_at=lambda worker: 5.0 * worker, behave=lambda worker, order: 3.0)
    dispatcher, _ = dispatcher_of(workers)
    first = dispatcher.begin(request_of(4))
    dispatcher.finished(first, seconds=math.inf)
    assert {worker for worker, _ in workers.submitted} == {0}
    workers.now = 6.0
    dispatcher.finished(dispatcher.begin(request_of(4)), seconds=math.inf)
    assert {worker for worker, _ in workers.submitted[1:]} == {0, 1}


def test_an_error_if_no_worker_starts() -> None:
    workers = FakeWorkers(joins_at=lambda worker: 1e9)
    dispatcher, _ = dispatcher_of(workers)
    with pytest.raises(MissingRequirement, match=r"no rollout worker started within 10 s.*room for 2"):
        dispatcher.finished(dispatcher.begin(request_of(4)), seconds=math.inf)


def test_finished_returns_none_after_its_time_limit() -> None:
    workers = FakeWorkers(behave=lambda worker, order: 4.0)
    dispatcher, _ = dispatcher_of(workers)
    number = dispatcher.begin(request_of(4))
    assert dispatcher.finished(number, seconds=2.0) is None
    assert as_tuples(dispatcher.finished(number, seconds=3.0)) == expected(request_of(4))


def test_each_request_is_written_by_its_own_version_and_old_ones_are_forgotten() -> None:
    workers = FakeWorkers(behave=lambda worker, order: 1.0)
    dispatcher, _ = dispatcher_of(workers)
    first = dispatcher.begin(request_of(4))
    dispatcher.publish(7, lambda: b"newer")
    second = dispatcher.begin(request_of(4, first=9))
    dispatcher.publish(7, lambda: pytest.fail("known versions are not sent twice"))
    # The awaited request has priority.
    dispatcher.finished(second, seconds=math.inf)
    assert workers.published == [0, 7]
    assert set(workers.weights) == {0, 7}
    dispatcher.finished(first, seconds=math.inf)
    assert set(workers.weights) == {7}
    assert Counter(order.version for _, order in workers.submitted) == {0: 2, 7: 2}


@pytest.mark.parametrize("seed", range(40))
def test_in_chaos_nothing_is_lost_or_doubled(seed: int) -> None:
    draw = random.Random(seed)
    workers = FakeWorkers(
        behave=lambda worker, order: draw.choice(["answer", "die", "twice", "hang", 1.0, 9.0, 12.0, 25.0]),
        joins_at=lambda worker: draw.uniform(0, 8),
    )
    dispatcher, _ = dispatcher_of(workers, 3, restarts=10_000)
    requests = [request_of(draw.randint(1, 20), n=draw.randint(1, 3), first=100 * index) for index in range(6)]
    in_flight = []
    for index, request in enumerate(requests):
        dispatcher.publish(index, lambda: b"")
        in_flight.append((request, dispatcher.begin(request)))
        if index % 2:
            for request, number in (in_flight.pop(draw.randrange(len(in_flight))) for _ in range(2)):
                assert as_tuples(dispatcher.finished(number, seconds=math.inf)) == expected(request)
    assert not in_flight
