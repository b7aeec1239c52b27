"""Whether every process of a run is alive, and the one message when one is not.

Enters: the store that the processes met by. Leaves: nothing while all show signs of life; else one message with rank,
host and reason, and the end of every process, also of those that wait in a collective for a peer that will never come.
A process that is killed, stopped or cut off says nothing itself: it is the silence that is noticed. Left out: who
starts the processes (`cli.launch`), what is saved (checkpoints are whole at any instant).

What every method's run begins and ends with: the device, the processes, the random numbers.

Enters: the sections `training` and `distributed`. Leaves: the device and the world, inside a `with`. Left out: folders,
data, models.
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
from loopos.training.distributed import World, is_broken_collective, join_world, leave_world, meeting_place
from loopos.training.precision import pick_device
from loopos.training.random_states import seed_everything
from loopos.training.stopping import run_ends_at_once

_LEFT = b"left"
_VERDICT = "loopos/verdict"
# A silence that follows a broken connection needs no long proof: seconds.
_HURRIED = 4.0
# Beats that fit into the silence after which a process counts as lost.
_BEATS = 10
# What a store that answers at all needs at most: seconds.
_STORE_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a run ends. `by`: the rank that found out, on `host`."""

    message: str
    by: int
    host: str


class EndedElsewhere(UserError):
    """Another process has told why the run ends; this one is silent, and ends with the same code."""

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__()
        self.exit_code = exit_code

    def __str__(self) -> str:
        return ""


def end_process(message: str) -> NoReturn:
    """Ends this process at once, whatever its threads wait for; `message` goes to standard error."""
    if message:
        sys.stderr.write(f"{message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Heartbeat:
    """Signs of life of one process among `size`, and the watch over the others: rank 0 watches all, all watch rank 0.

    silence: seconds without a sign after which a process is lost.
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
        # A connection of its own for each thread: one that waits holds its connection.
        # torch's own annotations leave `clone` out.
        self._store, self._talking = (store.clone() for _ in range(2))  # type: ignore[attr-defined]
        self._talking.set_timeout(timedelta(seconds=_STORE_TIMEOUT))
        self._stopped, self._hurried = threading.Event(), threading.Event()
        self._answered = time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]

    def begin(self) -> None:
        """Shows the first sign of life and starts to watch."""
        self._store.set(_host_of(self._rank), self._host)
        self._store.set(_alive(self._rank), b"0")
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """The work of this process is done: its silence means nothing from now on."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._store.set(_alive(self._rank), _LEFT)

    def failed(self, problem: BaseException) -> bool:
        """Tells the others that this process ends by an error of its own. Whether the error is this process's to
        show: not where another one has ended by the same.
        """
        self._stopped.set()
        told = f"{type(problem).__name__}: " if not isinstance(problem, UserError) else ""
        summary = (str(problem).splitlines() or [""])[0]
        mine = Verdict(f"rank {self._rank} on {self._host}: {told}{summary}", self._rank, self._host)
        standing = self._post(self._store, mine)
        speaks = standing == mine or standing.message.partition(": ")[2] != mine.message.partition(": ")[2]
        holds_store = self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if holds_store or not speaks:
            # The others are to read the store before it is gone, and who speaks is not to be ended by a launcher that
            # sees this process's end first.
            time.sleep(self._courtesy)
        return speaks

    def blame(self, problem: BaseException) -> NoReturn:
        """Ends this process after a collective that broke, by the verdict on whoever broke it; where all are alive it
        is the collective itself that is named.
        """
        self._hurried.set()
        time.sleep(min(self._silence, _HURRIED) + 2 * self._interval)
        self._stopped.set()
        if time.monotonic() - self._answered > min(self._silence, _HURRIED):
            # With the peer the store is gone: the place of both is what there is to name.
            self._obey(self._unreachable())
            raise EndedElsewhere
        first = (str(problem).splitlines() or [""])[0]
        mine = Verdict(f"rank {self._rank} on {self._host}: {first}", self._rank, self._host)
        self._obey(self._post(self._store, mine))
        raise EndedElsewhere

    @property
    def _interval(self) -> float:
        return self._silence / _BEATS

    @property
    def _courtesy(self) -> float:
        """What another process has to say why the run ends, before this one ends: seconds."""
        return min(2 * self._interval, _HURRIED)

    @property
    def _watched(self) -> list[int]:
        """The ranks that this process watches: after a broken collective everybody looks for the reason."""
        everybody = self._rank == 0 or self._hurried.is_set()
        return [rank for rank in range(self._size if everybody else 1) if rank != self._rank]

    def _talk(self) -> None:
        """The thread that speaks to the store: it may hang when the network is cut."""
        beat = 0
        while not self._stopped.wait(min(self._interval, 0.5) if self._hurried.is_set() else self._interval):
            beat += 1
            try:
                self._talking.set(_alive(self._rank), str(beat))
                verdict = self._verdict(self._talking) or self._silent()
            except (dist.DistError, RuntimeError):
                # What a store without an answer means is judged by the time it lasts (`_watch`).
                continue
            self._answered = time.monotonic()
            if verdict is not None and not self._stopped.is_set():
                self._obey(verdict)

    def _watch(self) -> None:
        """The thread that speaks to nobody."""
        while True:
            before = time.monotonic()
            if self._stopped.wait(self._interval):
                return
            now = time.monotonic()
            if now - before > self._interval + self._silence / 2:
                # This process itself stood still, and maybe all did: what it missed meanwhile says nothing.
                self._answered = now
                self._seen.clear()
            if now - self._answered > self._silence:
                self._obey(self._unreachable())

    def _silent(self) -> Verdict | None:
        """A verdict on a rank that has shown no sign for too long. Where none has come yet, since this process first
        looked for it: all have joined by then, and one of them may have ended before its first.
        """
        now, ranks = time.monotonic(), self._watched
        most = min(self._silence, _HURRIED) if self._hurried.is_set() else self._silence
        for rank, sign in self._signs(ranks).items():
            seen, since = self._seen.get(rank, (sign, now))
            self._seen[rank] = (sign, since if sign == seen else now)
            if sign != _LEFT and now - self._seen[rank][1] > most:
                summary = (
                    f"{self._place(rank)} has shown no sign of life for {now - self._seen[rank][1]:.0f} s: its "
                    "process was killed or stands still, or its host is cut off; the run ends"
                )
                return self._post(self._talking, Verdict(summary, self._rank, self._host))
        return None

    def _signs(self, ranks: list[int]) -> dict[int, bytes]:
        """The last sign of life of each rank, empty where it has shown none."""
        if not ranks:
            return {}
        # One question for all is the rule: ranks without a sign are only there at the beginning.
        asked = [_alive(rank) for rank in ranks]
        all_there = self._talking.check(asked)
        there = [rank for rank in ranks if all_there or self._talking.check([_alive(rank)])]
        signs = self._talking.multi_get([_alive(rank) for rank in there]) if there else []
        return {**dict.fromkeys(ranks, b""), **dict(zip(there, signs, strict=True))}

    def _place(self, rank: int) -> str:
        """A rank, with its host where it has lived to tell it."""
        key = _host_of(rank)
        return f"rank {rank} on {self._talking.get(key).decode()}" if self._talking.check([key]) else f"rank {rank}"

    def _unreachable(self) -> Verdict:
        address = os.environ.get("MASTER_ADDR", "rank 0's host")
        summary = (
            f"rank {self._rank} on {self._host}: {address}, where the processes of the run meet, has not answered for "
            f"{time.monotonic() - self._answered:.0f} s: it is down, or the network between is cut; the run ends"
        )
        return Verdict(summary, self._rank, self._host)

    def _verdict(self, store: Store) -> Verdict | None:
        return Verdict(**json.loads(store.get(_VERDICT))) if store.check([_VERDICT]) else None

    def _post(self, store: Store, mine: Verdict) -> Verdict:
        """Puts a verdict up where none stands; the one that stands then. One's own where the store does not answer."""
        stands = [mine]

        def put() -> None:
            # A store that breaks off has no verdict to tell.
            with suppress(dist.DistError, RuntimeError):
                stands[0] = Verdict(**json.loads(store.compare_set(_VERDICT, "", json.dumps(asdict(mine)))))

        # In a thread that may be left behind: over a network that is cut the store's own call never returns.
        putting = threading.Thread(target=put, daemon=True)
        putting.start()
        putting.join(_STORE_TIMEOUT)
        return stands[0]

    def _obey(self, verdict: Verdict) -> None:
        """Ends this process by a verdict. It is told once a host: by who found out, or by rank 0 on another host."""
        elsewhere = verdict.host != self._host
        speaks = verdict.by == self._rank or (elsewhere and os.environ.get("LOCAL_RANK", "0") == "0")
        self._stopped.set()
        if verdict.by != self._rank:
            time.sleep(self._courtesy)
        self._end(verdict.message if speaks else "")


def _alive(rank: int) -> str:
    return f"loopos/alive/{rank}"


def _host_of(rank: int) -> str:
    return f"loopos/host/{rank}"


@contextmanager
def session(settings: TrainingSection, distributed: DistributedSection) -> Iterator[tuple[torch.device, World]]:
    """This process's device and place among the processes of `torchrun`; generators begin at the config's seed, and
    the ranks part in `TrainedWeights`. The process group is left at the end, however it comes; where one process of
    several fails, or is lost, all end and one of them says why. Raises `UserError` for a device that is not there.
    """
    device = pick_device(settings.device)
    world = join_world(device.type, distributed)
    if device.type == "cuda":
        device = torch.device("cuda", world.local_rank)
    try:
        # The same on every rank until the model is there: new weights are drawn, and must be those of all.
        seed_everything(settings.seed)
        with run_ends_at_once(), nullcontext() if world.size == 1 else _watched(world, distributed):
            yield device, world
    finally:
        leave_world(world)


@contextmanager
def _watched(world: World, distributed: DistributedSection) -> Iterator[None]:
    """The other processes are watched, and learn how this one ends."""
    heartbeat = Heartbeat(meeting_place(), world.rank, world.size, silence=distributed.silence)
    heartbeat.begin()
    try:
        yield
    # Whatever ends this process, Ctrl-C too, the others wait for it until they are told.
    except BaseException as problem:
        if is_broken_collective(problem):
            heartbeat.blame(problem)
        if not heartbeat.failed(problem):
            raise EndedElsewhere(getattr(problem, "exit_code", 1)) from None
        raise
    heartbeat.leave()
