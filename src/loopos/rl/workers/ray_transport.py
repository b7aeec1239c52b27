"""Rollout workers as Ray actors, on this machine or on a cluster. Only this module imports Ray, when a run needs it."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import loopos
from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.rl import RolloutEngineSection
from loopos.generation.completions import Completion
from loopos.rl.workers.protocol import Answered, Event, Lost, Order, WorkerReady
from loopos.rl.workers.recipes import WorkerRecipe
from loopos.rl.workers.worker import RolloutWorker


class RayWorker:
    """A `RolloutWorker` as an actor. Orders come with a reference to their weights, which is fetched only for a new
    version.
    """

    def __init__(self, recipe: WorkerRecipe) -> None:
        # Loaded in a separate call: an exception in here would look like a process that died.
        self._recipe = recipe
        self._worker: RolloutWorker | None = None

    def load(self) -> str:
        """Builds the model; returns process and host."""
        self._worker = RolloutWorker(self._recipe)
        return f"process {os.getpid()} on {socket.gethostname()}"

    def write(self, order: Order, weights: list[Any]) -> list[Completion]:
        """weights: a reference inside a list, so that Ray does not resolve it."""
        import ray

        assert self._worker is not None
        return self._worker.write(order, lambda: ray.get(weights[0]))


class _Started:
    """Turns the bare `Exception` that Ray raises if its processes do not start within 30 s into
    `MissingRequirement`.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        if kind is Exception:
            raise MissingRequirement(
                f"Ray does not start on this machine: {problem}; expected a machine with free cores"
            ) from problem


class RayTransport:
    """Starts Ray on this machine (without dashboard, usage statistics or access from other machines), or joins a
    cluster whose hosts must have LoopOS and the model's files. Raises `MissingRequirement`.

    Actors that do not fit on the cluster yet start when there is room.
    """

    def __init__(self, recipe: WorkerRecipe, section: RolloutEngineSection) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray: Any = ray
        quiet: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "runtime_env": _environment(section.python),
        }
        if section.address is not None:
            try:
                ray.init(address=section.address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as problem:
                raise MissingRequirement(
                    f"rollout.address: cannot join a Ray cluster at {section.address}: {problem}"
                ) from problem
        else:
            cores = max(os.cpu_count() or 1, section.workers * section.cpus_per_worker)
            local = {"address": "local", "num_cpus": cores, "include_dashboard": False}
            with _Started():
                ray.init(**local, **quiet, _node_ip_address="127.0.0.1")
        self._actor = ray.remote(
            num_cpus=section.cpus_per_worker,
            num_gpus=recipe.gpus,
            max_restarts=0,
            max_task_retries=0,
        )(RayWorker)
        self._recipe = recipe
        self._started = 0
        self._workers: dict[int, Any] = {}
        self._weights: dict[int, Any] = {}
        # Reference → (worker, its order), or (worker, None) while the worker loads.
        self._awaited: dict[Any, tuple[int, Order | None]] = {}

    def start(self) -> int:
        worker, self._started = self._started, self._started + 1
        self._workers[worker] = self._actor.remote(self._recipe)
        self._awaited[self._workers[worker].load.remote()] = (worker, None)
        return worker

    def publish(self, version: int, weights: bytes) -> None:
        self._weights[version] = self._ray.put(weights)

    def forget(self, version: int) -> None:
        del self._weights[version]

    def submit(self, worker: int, order: Order) -> None:
        reference = self._workers[worker].write.remote(order, [self._weights[order.version]])
        self._awaited[reference] = (worker, order)

    def events(self, seconds: float) -> list[Event]:
        if not self._awaited:
            time.sleep(seconds)
            return []
        references = list(self._awaited)
        self._ray.wait(references, num_returns=1, timeout=seconds)
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return [self._event(reference, *self._awaited.pop(reference)) for reference in ready]

    def _event(self, reference: Any, worker: int, order: Order | None) -> Event:
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(reference)
        except errors.RayTaskError as problem:
            if isinstance(problem.cause, UserError):
                raise type(problem.cause)(f"rollout worker {worker}: {problem.cause}") from None
            raise
        except (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError) as problem:
            self.end(worker)
            return Lost(worker, _why(problem))
        return WorkerReady(worker, answer) if order is None else Answered(worker, order, answer)

    def end(self, worker: int) -> None:
        self._awaited = {reference: entry for reference, entry in self._awaited.items() if entry[0] != worker}
        handle = self._workers.pop(worker, None)
        if handle is not None:
            self._ray.kill(handle)

    def close(self) -> None:
        for worker in list(self._workers):
            self.end(worker)
        self._ray.shutdown()


def _environment(python: str | None) -> dict[str, Any]:
    """Ray's runtime environment of a worker with an interpreter of its own, which gets LoopOS's source from here."""
    if python is None:
        return {}
    # Workers start in another folder. A path of an environment stays as it is: what it links to is another one.
    path = os.path.abspath(python) if os.path.exists(python) else python
    return {"py_executable": path, "py_modules": [str(Path(loopos.__file__).parent)]}


def _why(problem: Exception) -> str:
    """Ray's reason in one line, without the advice at the end of its message."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    detail = next((line for line in lines if "exit detail" in line or "killed" in line), lines[0] if lines else "")
    return detail.split(". ")[0].rstrip(".") or type(problem).__name__
