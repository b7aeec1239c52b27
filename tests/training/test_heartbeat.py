"""A process without heartbeats is named in one message, and all others end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from pico_runs import slow_but

from loopos.config.diagnostics import UserError
from loopos.training.session import Heartbeat

SILENCE = 0.6


class Ended(Exception):
    """Raised by `blame` here instead of ending the process."""


@contextmanager
def processes(hosts: list[str], *, never_begins: int | None = None) -> Iterator[tuple[list[Heartbeat], dict[int, str]]]:
    """One `Heartbeat` a rank, all in this process, and by rank what each was ended with. never_begins: a rank that joins
    and is gone before its first sign of life.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended: dict[int, str] = {}

    def end_of(rank: int) -> Callable[[str], None]:
        return lambda message: ended.__setitem__(rank, message)

    ranks = [
        Heartbeat(store, rank, len(hosts), silence=SILENCE, host=host, end=end_of(rank))
        for rank, host in enumerate(hosts)
    ]
    beats = [each for rank, each in enumerate(ranks) if rank != never_begins]
    for each in beats:
        each.begin()
    yield ranks, ended
    for each in beats:
        each.leave()


def wait_for(number: int, ended: dict[int, str]) -> None:
    limit = time.monotonic() + 20
    while len(ended) < number and time.monotonic() < limit:
        time.sleep(0.02)


def fall_silent(process: Heartbeat) -> None:
    """Simulates a killed or stopped process: its threads stop without a message."""
    process._stopped.set()


def test_while_all_processes_send_heartbeats_nothing_ends() -> None:
    with processes(["one", "one", "two"]) as (ranks, ended):
        time.sleep(3 * SILENCE)
        ranks[1].leave()
        time.sleep(3 * SILENCE)
        assert ended == {}


@pytest.mark.parametrize(("lost", "finder"), slow_but((2, 0), [(2, 0), (0, 1)]))
def test_a_process_without_heartbeats_is_named_by_rank_and_host(lost: int, finder: int) -> None:
    hosts = ["first", "first", "second"] if lost == 2 else ["second", "first", "first"]
    with processes(hosts) as (ranks, ended):
        time.sleep(SILENCE)
        fall_silent(ranks[lost])
        wait_for(2, ended)
        assert set(ended) == {0, 1, 2} - {lost}
        messages = [message for message in ended.values() if message]
        assert messages
        assert all(message.startswith(f"rank {lost} on second has sent no heartbeat for ") for message in messages)
        if lost == 2:
            # The two remaining ones share a host, so only one of them prints.
            assert ended[1] == ""
            assert ended[finder]


@pytest.mark.parametrize("lost", slow_but(2, [0, 1, 2]))
def test_a_process_that_ends_before_its_first_heartbeat_is_noticed_too(lost: int) -> None:
    with processes(["one", "two", "three"], never_begins=lost) as (_, ended):
        wait_for(2, ended)
        assert set(ended) == {0, 1, 2} - {lost}
        for message in ended.values():
            assert message.startswith(f"rank {lost} has sent no heartbeat for ")


def test_an_error_of_one_process_is_printed_once_per_host() -> None:
    with processes(["one", "one", "two"]) as (ranks, ended):
        assert ranks[1].failed(UserError("the disk is full"))
        wait_for(2, ended)
        assert ended == {0: "", 2: "rank 1 on one: the disk is full"}
        # The same error of another process is already reported; a different one is not.
        assert not ranks[2].failed(UserError("the disk is full"))
        assert ranks[0].failed(UserError("the disk is full of other things"))


def test_a_broken_collective_is_blamed_on_the_process_that_is_gone() -> None:
    with processes(["one", "two"]) as (ranks, ended):
        time.sleep(SILENCE)
        fall_silent(ranks[1])
        with pytest.raises(UserError):
            ranks[0].blame(RuntimeError("[gloo] Connection closed by peer"))
        assert ended[0].startswith("rank 1 on two has sent no heartbeat for ")


def test_a_broken_collective_of_living_processes_is_named_itself() -> None:
    with processes(["one", "two"]) as (ranks, ended):
        with pytest.raises(UserError):
            ranks[1].blame(RuntimeError("[gloo] Timed out waiting 600000ms for send operation"))
        wait_for(2, ended)
        assert ended[1] == "rank 1 on two: [gloo] Timed out waiting 600000ms for send operation"
        assert ended[0] == ended[1]


def test_a_broken_collective_without_a_store_names_the_host_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    with processes(["one", "two"]) as (ranks, ended):
        time.sleep(SILENCE)
        fall_silent(ranks[1])
        # A store that is gone answers nothing from now on.
        ranks[1]._answered -= 2 * SILENCE
        with pytest.raises(UserError):
            ranks[1].blame(RuntimeError("[gloo] Connection closed by peer"))
        assert ended[1].startswith("rank 1 on two: the store at 10.0.0.1 has not answered for")


def test_a_store_that_never_answers_holds_up_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopos.training.session._STORE_TIMEOUT", 0.2)
    with processes(["one", "two"]) as (ranks, _):
        hanging = threading.Event()

        class Hanging:
            def compare_set(self, *_: object) -> bytes:
                hanging.wait(20)
                raise dist.DistStoreError("an answer that comes too late")

        store, ranks[1]._store = ranks[1]._store, Hanging()  # type: ignore[assignment]
        assert ranks[1].failed(UserError("the disk is full"))
        hanging.set()
        ranks[1]._store = store
