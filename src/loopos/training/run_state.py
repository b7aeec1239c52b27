"""The state of a run: what its checkpoints contain, how it is restored, and the result of a finished run.

`fit.py` decides when to save; `checkpoint.py` writes and reads the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from loopos.data.batches import Cursor
from loopos.training import checkpoint
from loopos.training.callbacks import CALLBACK_ERROR
from loopos.training.distributed import World
from loopos.training.identity import Identity, values_of
from loopos.training.slices import RowSpan, slice_name
from loopos.training.stopping import EXIT_CODES
from loopos.training.update import NonFiniteStep, Update
from loopos.training.validation import ValidationTracker


@dataclass
class Position:
    """How far a run has progressed. `previous_step`: step number before the last step. `seconds`: in steps, validations
    and saves. `concluded`: everything due after the last step (validation, best weights, the decision to stop) is done;
    a signal postpones it.
    """

    step: int = 0
    previous_step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    rows: int = 0
    skipped: int = 0
    seconds: float = 0.0
    stopped_by: str | None = None
    concluded: bool = True


class MethodState(Protocol):
    """Additional state that a method needs to resume exactly: tensors and JSON, equal on every rank."""

    def synchronize(self, world: World) -> None:
        """Called on every rank before saving; merges state that differs between ranks."""
        ...

    def tensors(self) -> Mapping[str, Tensor]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class MethodStates:
    """Several states of a method as one, by name."""

    parts: Mapping[str, MethodState]

    def synchronize(self, world: World) -> None:
        for part in self.parts.values():
            part.synchronize(world)

    def tensors(self) -> Mapping[str, Tensor]:
        return {f"{name}.{key}": tensor for name, part in self.parts.items() for key, tensor in part.tensors().items()}

    def state(self) -> dict[str, Any]:
        return {name: part.state() for name, part in self.parts.items()}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            own = {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}
            part.load(own, state[name])


@dataclass
class RunState:
    """All state in a run's checkpoints. `identity`: what must be the same in a resumed run."""

    folder: Path
    identity: Identity
    update: Update
    tracker: ValidationTracker | None
    world: World
    method_state: MethodState | None = None
    keep_last: int = 1
    keep_best: bool = True
    position: Position = field(default_factory=Position)
    _saving: checkpoint.Save | None = None

    def begin_save(self, log_position: Mapping[str, int | str], *, is_best: bool) -> None:
        """Starts to write a checkpoint in the background. Every rank contributes its random states and its shards.
        `finish_save` must be called before the weights change. log_position: position in the event log.

        Raises `DiskFull`, and `NonFiniteStep` for weights that are not finite.
        """
        self.finish_save()
        gathered = self.world.gather(checkpoint.random_states())
        if self.method_state is not None:
            self.method_state.synchronize(self.world)
        tensors, rows = self._shards()
        random: dict[str, Any] = {}
        if self.world.is_first:
            if self.method_state is not None:
                tensors["carried"] = self.method_state.tensors()
            for rank, states in enumerate(gathered):
                assert isinstance(states, tuple)
                tensors[f"random-{rank}"], random[str(rank)] = states
        self._saving = checkpoint.Save(
            self.folder,
            self.position.step,
            tensors,
            {**self._as_json(), "random": random, **log_position},
            self.update.master_weights.parameters,
            rows,
            metric=self.tracker.best.metric if self.tracker is not None else None,
            is_best=is_best,
            world=self.world,
        )
        try:
            self._saving.begin(in_background=True)
        except checkpoint.NonFiniteError as problem:
            self._saving = None
            raise NonFiniteStep(
                f"step {self.position.step}: {problem}; lower training.learning_rate, or set training.max_grad_norm"
            ) from problem

    def _shards(self) -> tuple[dict[str, Mapping[str, Tensor]], Mapping[str, RowSpan]]:
        """The weights and optimizer state that this process writes, and the rows of the full tensors that they are."""
        master_weights, optimizer = self.update.master_weights, self.update.optimizer
        groups: dict[str, Mapping[str, Tensor]] = {
            "weights": master_weights.parameters,
            "optimizer": optimizer.tensors(),
        }
        sharding = master_weights.sharding
        if sharding is None:
            return (dict(groups) if self.world.is_first else {}), {}
        if not sharding.is_first_replica:
            return {}, {}
        rows = {**master_weights.rows, **optimizer.rows(master_weights.rows)}
        named = {slice_name(group, *sharding.file): group for group in groups}
        return {
            file: {name: t for name, t in groups[group].items() if sharding.writes(rows.get(name))}
            for file, group in named.items()
        }, rows

    def finish_save(self) -> bool:
        """Waits until the checkpoint is on disk. Returns whether one was being written. Raises `DiskFull`."""
        if self._saving is None:
            return False
        saving, self._saving = self._saving, None
        saving.finish()
        if self.world.is_first:
            checkpoint.prune(self.folder, self.keep_last, self.keep_best)
        return True

    def clear(self, found: checkpoint.Checkpoint | None) -> list[str]:
        """Removes partial checkpoints of killed processes and those beyond `keep_last`; keeps `found` and newer damaged
        ones. Only the single writer of the folder may call this. Returns one line per removal.
        """
        lines = checkpoint.sweep(self.folder, is_only_writer=True)
        if found is not None:
            removed = checkpoint.prune(self.folder, self.keep_last, self.keep_best, newest=found.step)
            lines += [f"{folder}: removed, beyond training.keep_last" for folder in removed]
        return lines

    def _as_json(self) -> dict[str, Any]:
        return {
            "identity": values_of(self.identity),
            "position": asdict(self.position),
            "judges": self.tracker.state() if self.tracker is not None else None,
            "loss_scale": self.update.loss_scale,
            "steps_since_overflow": self.update.steps_since_overflow,
            "carried": self.method_state.state() if self.method_state is not None else None,
        }

    def restore(self, found: checkpoint.Checkpoint) -> list[str]:
        """Restores everything from `found`, a checkpoint of this run. Returns one line for each item that could not be
        restored.
        """
        state = found.state
        position = dict(state["position"])
        self.position = Position(**{**position, "cursor": Cursor(**position["cursor"])})
        lines = []
        if self.tracker is not None and state["judges"] is not None:
            lines = self.tracker.load(state["judges"])
        self.update.master_weights.load(found.tensors["weights"])
        self.update.optimizer.load(found.tensors.get("optimizer", {}), self.update.master_weights.rows)
        self.update.loss_scale, self.update.steps_since_overflow = state["loss_scale"], state["steps_since_overflow"]
        # Runs of an older version may have none for this method.
        if self.method_state is not None and state["carried"] is not None:
            self.method_state.load(found.tensors.get("carried", {}), state["carried"])
        rank = str(self.world.rank)
        if rank not in state["random"]:
            return [*lines, f"the checkpoint has no random states for rank {rank}; it starts from the seed"]
        return lines + checkpoint.restore_random_states(found.tensors[f"random-{rank}"], state["random"][rank])


@dataclass(frozen=True)
class FitResult:
    """How a training ended.

    Attributes:
        step: Optimizer steps done.
        stopped_by: "epochs", "max_iterations", "max_steps", "max_time", "early stopping", "guard", "callback",
            "callback error", or the name of a signal.
        best_step: Of the best validation; None if none beat the start.
        best_metric: Of the best validation; None if none beat the start.
        tokens: Tokens trained on.
        seconds: Time in steps, validations and saves.
        best_trained_step: Of the best validation after the start, whether or not it beat the start.
        best_trained_metric: Of the same validation.
        start_metric: Of the validation before the first update.
        beat_start: Whether training beat the start; None if unknown.
    """

    step: int
    stopped_by: str
    best_step: int | None
    best_metric: float | None
    tokens: int
    seconds: float
    best_trained_step: int | None = None
    best_trained_metric: float | None = None
    start_metric: float | None = None
    beat_start: bool | None = None

    @classmethod
    def of(cls, position: Position, tracker: ValidationTracker | None) -> FitResult:
        """The result of a run that has ended at `position`."""
        assert position.stopped_by is not None, "the run has not ended"
        ended = (position.step, position.stopped_by)
        if tracker is None:
            return cls(*ended, None, None, position.tokens, position.seconds)
        best, beat = tracker.best, tracker.beat_start
        return cls(
            *ended,
            best_step=None if beat is False else best.step,
            best_metric=None if beat is False else best.metric,
            tokens=position.tokens,
            seconds=position.seconds,
            best_trained_step=best.step,
            best_trained_metric=best.metric,
            start_metric=tracker.start.metric,
            beat_start=beat,
        )

    @property
    def interrupted(self) -> bool:
        """Whether a signal or a failed callback ended the run, so that `--resume` continues it."""
        return self.stopped_by in EXIT_CODES or self.stopped_by == CALLBACK_ERROR
