"""Starts and ends a training session: device, process group, random seeds, and a heartbeat between the processes.

If a process is killed, hangs or is cut off, the heartbeat notices the silence, one message with rank, host and reason
is printed, and all processes end, also those that wait in a collective call. Checkpoints are complete at any instant.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from loopos.config.diagnostics import UserError
from loopos.config.sections import DistributedSection, TrainingSection
from loopos.training.distributed import (
    World,
    destroy_distributed,
    init_distributed,
    is_broken_collective,
    rendezvous_store,
)
from loopos.training.precision import pick_device
from loopos.training.random_states import seed_everything
from loopos.training.stopping import run_ends_at_once

_LEFT = b"left"
_VERDICT = "loopos/verdict"
# Seconds of silence that suffice after a broken connection.
_HURRIED = 4.0
# Heartbeats within `silence`.
_BEATS = 10
# Seconds within which a reachable store answers.
_STORE_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reason why a run ends. `by`: the rank that found it, on `host`."""

    message: str
    by: int
    host: str


class EndedElsewhere(UserError):
    """Another process reported why the run ends. This one prints nothing and exits with the same code."""

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__()
        self.exit_code = exit_code

    def __str__(self) -> str:
        return ""


def end_process(message: str) -> NoReturn:
    """Ends this process at once, even if its threads are blocked; writes `message` to standard error."""
    if message:
        sys.stderr.write(f"{message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Heartbeat:
    """Sends heartbeats of one process among `size` and monitors the others: rank 0 monitors all, all monitor rank 0.

    silence: seconds without a heartbeat after which a process counts as lost.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        silence: float,
        host: str | None = None,
        end: Callable[[str], None] = end_process,
    ) -> None:
        self._rank, self._size, self._silence, self._end = rank, size, silence, end
        self._host = socket.gethostname() if host is None else host
        # One connection per thread, because a waiting call blocks its connection.
        # torch does not annotate `clone`.
        self._store, self._heartbeat_store = (store.clone() for _ in range(2))  # type: ignore[attr-defined]
        self._heartbeat_store.set_timeout(timedelta(seconds=_STORE_TIMEOUT))
        self._stopped, self._hurried = threading.Event(), threading.Event()
        self._answered = time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._send_heartbeats, self._monitor_store)
        ]

    def begin(self) -> None:
        """Sends the first heartbeat and starts to monitor."""
        self._store.set(_host_of(self._rank), self._host)
        self._store.set(_alive(self._rank), b"0")
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Signs off: this process has finished, and its silence no longer matters."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._store.set(_alive(self._rank), _LEFT)

    def failed(self, problem: BaseException) -> bool:
        """Tells the other processes that this one ends with an error of its own. Returns whether this process should
        print the error; False if another one has already ended with the same error.
        """
        self._stopped.set()
        kind = f"{type(problem).__name__}: " if not isinstance(problem, UserError) else ""
        summary = (str(problem).splitlines() or [""])[0]
        own = Verdict(f"rank {self._rank} on {self._host}: {kind}{summary}", self._rank, self._host)
        standing = self._publish(self._store, own)
        reports = standing == own or standing.message.partition(": ")[2] != own.message.partition(": ")[2]
        holds_store = self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if holds_store or not reports:
            # Give the others time to read the store, and keep the launcher from killing the reporting process when it
            # sees this one exit first.
            time.sleep(self._grace_seconds)
        return reports

    def blame(self, problem: BaseException) -> NoReturn:
        """Ends this process after a collective call failed. Names the lost process, or the collective itself if all are
        alive.
        """
        self._hurried.set()
        time.sleep(min(self._silence, _HURRIED) + 2 * self._interval)
        self._stopped.set()
        if time.monotonic() - self._answered > min(self._silence, _HURRIED):
            # The store is gone with its host, so the message names the host.
            self._end_by(self._unreachable())
            raise EndedElsewhere
        first = (str(problem).splitlines() or [""])[0]
        own = Verdict(f"rank {self._rank} on {self._host}: {first}", self._rank, self._host)
        self._end_by(self._publish(self._store, own))
        raise EndedElsewhere

    @property
    def _interval(self) -> float:
        return self._silence / _BEATS

    @property
    def _grace_seconds(self) -> float:
        """Seconds that other processes get to report why the run ends before this one exits."""
        return min(2 * self._interval, _HURRIED)

    @property
    def _watched(self) -> list[int]:
        """The ranks that this process monitors. After a failed collective every process looks for the cause."""
        everybody = self._rank == 0 or self._hurried.is_set()
        return [rank for rank in range(self._size if everybody else 1) if rank != self._rank]

    def _send_heartbeats(self) -> None:
        """The thread that talks to the store. It may hang when the network is cut."""
        beat = 0
        while not self._stopped.wait(min(self._interval, 0.5) if self._hurried.is_set() else self._interval):
            beat += 1
            try:
                self._heartbeat_store.set(_alive(self._rank), str(beat))
                verdict = self._verdict(self._heartbeat_store) or self._lost_rank()
            except (dist.DistError, RuntimeError):
                # `_monitor_store` decides after how long an unreachable store means a lost run.
                continue
            self._answered = time.monotonic()
            if verdict is not None and not self._stopped.is_set():
                self._end_by(verdict)

    def _monitor_store(self) -> None:
        """The thread that checks whether the store still answers. It makes no network calls."""
        while True:
            before = time.monotonic()
            if self._stopped.wait(self._interval):
                return
            now = time.monotonic()
            if now - before > self._interval + self._silence / 2:
                # This process was suspended, and others perhaps too: restart the count.
                self._answered = now
                self._seen.clear()
            if now - self._answered > self._silence:
                self._end_by(self._unreachable())

    def _lost_rank(self) -> Verdict | None:
        """A verdict on a rank without a recent heartbeat. For a rank that has sent none yet, time counts from this
        process's first check: all have joined by then, and one may have died before its first heartbeat.
        """
        now, ranks = time.monotonic(), self._watched
        most = min(self._silence, _HURRIED) if self._hurried.is_set() else self._silence
        for rank, sign in self._last_heartbeats(ranks).items():
            seen, since = self._seen.get(rank, (sign, now))
            self._seen[rank] = (sign, since if sign == seen else now)
            if sign != _LEFT and now - self._seen[rank][1] > most:
                summary = (
                    f"{self._described(rank)} has sent no heartbeat for {now - self._seen[rank][1]:.0f} s: its "
                    "process was killed or hangs, or its host is cut off; the run ends"
                )
                return self._publish(self._heartbeat_store, Verdict(summary, self._rank, self._host))
        return None

    def _last_heartbeats(self, ranks: list[int]) -> dict[int, bytes]:
        """The last heartbeat of each rank, empty if it has sent none."""
        if not ranks:
            return {}
        # Usually one call checks all ranks; only at the start some have no heartbeat yet.
        keys = [_alive(rank) for rank in ranks]
        all_there = self._heartbeat_store.check(keys)
        there = [rank for rank in ranks if all_there or self._heartbeat_store.check([_alive(rank)])]
        signs = self._heartbeat_store.multi_get([_alive(rank) for rank in there]) if there else []
        return {**dict.fromkeys(ranks, b""), **dict(zip(there, signs, strict=True))}

    def _described(self, rank: int) -> str:
        """A rank with its host, if the host is known."""
        key = _host_of(rank)
        return (
            f"rank {rank} on {self._heartbeat_store.get(key).decode()}"
            if self._heartbeat_store.check([key])
            else f"rank {rank}"
        )

    def _unreachable(self) -> Verdict:
        address = os.environ.get("MASTER_ADDR", "rank 0's host")
        summary = (
            f"rank {self._rank} on {self._host}: the store at {address} has not answered for "
            f"{time.monotonic() - self._answered:.0f} s: it is down, or the network between is cut; the run ends"
        )
        return Verdict(summary, self._rank, self._host)

    def _verdict(self, store: Store) -> Verdict | None:
        return Verdict(**json.loads(store.get(_VERDICT))) if store.check([_VERDICT]) else None

    def _publish(self, store: Store, own: Verdict) -> Verdict:
        """Publishes a verdict unless one exists. Returns the verdict that stands; the own one if the store does not
        answer.
        """
        stands = [own]

        def put() -> None:
            # An unreachable store has no verdict.
            with suppress(dist.DistError, RuntimeError):
                stands[0] = Verdict(**json.loads(store.compare_set(_VERDICT, "", json.dumps(asdict(own)))))

        # In a daemon thread, because the store's call never returns when the network is cut.
        putting = threading.Thread(target=put, daemon=True)
        putting.start()
        putting.join(_STORE_TIMEOUT)
        return stands[0]

    def _end_by(self, verdict: Verdict) -> None:
        """Ends this process because of a verdict. The message is printed once per host: by the rank that found the
        problem, or by the local rank 0 of another host.
        """
        elsewhere = verdict.host != self._host
        reports = verdict.by == self._rank or (elsewhere and os.environ.get("LOCAL_RANK", "0") == "0")
        self._stopped.set()
        if verdict.by != self._rank:
            time.sleep(self._grace_seconds)
        self._end(verdict.message if reports else "")


def _alive(rank: int) -> str:
    return f"loopos/alive/{rank}"


def _host_of(rank: int) -> str:
    return f"loopos/host/{rank}"


@contextmanager
def session(settings: TrainingSection, distributed: DistributedSection) -> Iterator[tuple[torch.device, World]]:
    """The device and `World` of this process among the processes of `torchrun`. All ranks start from the config's seed;
    `TrainedWeights` gives them different seeds later. Always leaves the process group. If one of several processes
    fails or is lost, all end and one reports why. Raises `UserError` for a device that is not available.
    """
    device = pick_device(settings.device)
    world = init_distributed(device.type, distributed)
    if device.type == "cuda":
        device = torch.device("cuda", world.local_rank)
    try:
        # The same seed on every rank until the model exists: new weights must be equal on all ranks.
        seed_everything(settings.seed)
        with run_ends_at_once(), nullcontext() if world.size == 1 else _watched(world, distributed):
            yield device, world
    finally:
        destroy_distributed(world)


@contextmanager
def _watched(world: World, distributed: DistributedSection) -> Iterator[None]:
    """Monitors the other processes and tells them how this one ends."""
    heartbeat = Heartbeat(rendezvous_store(), world.rank, world.size, silence=distributed.silence)
    heartbeat.begin()
    try:
        yield
    # BaseException, because the other processes wait until they know why this one ended, also after Ctrl-C.
    except BaseException as problem:
        if is_broken_collective(problem):
            heartbeat.blame(problem)
        if not heartbeat.failed(problem):
            raise EndedElsewhere(getattr(problem, "exit_code", 1)) from None
        raise
    heartbeat.leave()
