"""Rollouts that are requested ahead, stored in checkpoints and distributed over processes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
from fake_workers import FakeWorkers
from test_dispatch import as_tuples, expected, request_of

from loopos.config.diagnostics import MissingRequirement
from loopos.rl.workers.dispatch import Dispatcher
from loopos.rl.workers.protocol import Request
from loopos.rl.workers.remote import RemoteRollouts


@dataclass
class Policy:
    """Six iterations of four prompts each; its version is the iteration that is trained on, times ten."""

    iteration: int = 0
    sent: int = 0

    def version(self) -> int:
        return 10 * self.iteration

    def weights(self) -> bytes:
        self.sent += 1
        return b"weights"

    def request(self, iteration: int) -> Request | None:
        return request_of(4, first=100 * iteration) if iteration < 6 else None


def remote(
    workers: FakeWorkers | None, policy: Policy, staleness: int, **index: Any
) -> tuple[RemoteRollouts, Dispatcher | None]:
    dispatcher = workers and Dispatcher(
        workers, workers=2, restarts=0, timeout=10.0, say=lambda line: None, clock=lambda: workers.now
    )
    made: Any = object()
    return RemoteRollouts(dispatcher, policy, made, "fakes", max_staleness=staleness, **index), dispatcher


def whole(rollouts: RemoteRollouts, policy: Policy, iterations: range) -> list[int]:
    """Staleness of each iteration; compares the completions with the request."""
    found = []
    for iteration in iterations:
        policy.iteration = iteration
        request = policy.request(iteration)
        assert request is not None
        written = rollouts.write(request, iteration=iteration)
        assert as_tuples(written.completions) == expected(request)
        found.append(written.staleness)
    return found


@pytest.mark.parametrize(("bound", "found"), [(0, [0] * 6), (1, [0, 1, 1, 1, 1, 1]), (3, [0, 1, 2, 3, 3, 3])])
def test_the_policy_that_writes_is_as_far_behind_as_it_may_be(bound: int, found: list[int]) -> None:
    workers, policy = FakeWorkers(), Policy()
    rollouts, _ = remote(workers, policy, bound)
    assert whole(rollouts, policy, range(6)) == found
    # Every order was of the version that its iteration was begun by, and each version was sent once.
    versions = {order.request.prompts[0][0] // 100: order.version for _, order in workers.submitted}
    assert versions == {iteration: 10 * (iteration - late) for iteration, late in enumerate(found)}
    assert policy.sent == len(set(versions.values()))


def test_requests_outside_of_iterations_use_the_newest_policy() -> None:
    workers, policy = FakeWorkers(), Policy()
    rollouts, _ = remote(workers, policy, 1)
    whole(rollouts, policy, range(3))
    policy.iteration = 3
    written = rollouts.write(request_of(3, n=2, first=900))
    assert as_tuples(written.completions) == expected(request_of(3, n=2, first=900))
    assert written.staleness == 0
    assert {order.version for _, order in workers.submitted if order.request.prompts[0][0] >= 900} == {30}


def test_what_is_in_flight_goes_into_the_checkpoint_and_comes_back() -> None:
    policy = Policy()
    rollouts, _ = remote(FakeWorkers(behave=lambda worker, order: 2.0), policy, 2)
    assert whole(rollouts, policy, range(2)) == [0, 1]
    rollouts.drain()
    tensors, state = rollouts.tensors(), rollouts.state()
    assert set(state) == {"2", "3"}
    workers = FakeWorkers()
    resumed, _ = remote(workers, policy, 2)
    resumed.load(tensors, state)
    assert whole(resumed, policy, range(2, 6)) == [2, 2, 2, 2]
    # Iterations 2 and 3 were not written again.
    assert {order.request.prompts[0][0] // 100 for _, order in workers.submitted} == {4, 5}


def test_after_a_lower_bound_what_is_too_old_is_written_again() -> None:
    policy = Policy()
    rollouts, _ = remote(FakeWorkers(), policy, 3)
    whole(rollouts, policy, range(1))
    rollouts.drain()
    resumed, _ = remote(FakeWorkers(), policy, 1)
    resumed.load(rollouts.tensors(), rollouts.state())
    assert whole(resumed, policy, range(1, 4)) == [1, 1, 1]


def in_two_processes(staleness: int, behave: Any) -> list[Any]:
    """What both ranks get in three iterations, or the error of the first."""
    board, barrier = [None, None], threading.Barrier(2, timeout=30)
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        def gather(value: object) -> list[object]:
            board[rank] = value  # type: ignore[call-overload]
            barrier.wait()
            both: list[object] = list(board)
            barrier.wait()
            return both

        policy = Policy()
        rollouts, _ = remote(
            FakeWorkers(behave=behave) if rank == 0 else None, policy, staleness, data_parallel=(rank, 2), gather=gather
        )
        try:
            own = []
            for iteration in range(3):
                policy.iteration = iteration
                request = policy.request(iteration)
                assert request is not None
                own.append(as_tuples(rollouts.write(request, iteration=iteration).completions))
                rollouts.drain()
            found[rank] = own
        except (MissingRequirement, threading.BrokenBarrierError) as problem:
            barrier.abort()
            found[rank] = problem

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("staleness", [0, 1])
def test_each_process_gets_its_rows_and_none_waits_long_in_a_collective(staleness: int) -> None:
    # An answer takes longer than rank 0 waits before it reports that nothing has arrived.
    first, second = in_two_processes(staleness, lambda worker, order: 9.0 if order else 45.0 / 2)
    for iteration, (own, other) in enumerate(zip(first, second, strict=True)):
        assert sorted([*own, *other]) == expected(request_of(4, first=100 * iteration))
        assert [index for index, _, _ in own] == [0, 2]


def test_the_loss_of_all_workers_ends_the_first_process_with_its_reason() -> None:
    first, second = in_two_processes(0, lambda worker, order: "die")
    assert isinstance(first, MissingRequirement)
    assert isinstance(second, threading.BrokenBarrierError)
