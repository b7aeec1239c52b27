"""Where an offline run stands, into a checkpoint and back.

Enters: the update, the position and the judges of a run. Leaves: a checkpoint folder; or the run put back to where a
checkpoint left it. Left out: when to save (`fit.py`), and files (`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from loopos.config.faults import UserError
from loopos.config.sections import TrainingSection
from loopos.data.batches import Cursor, StepBatches
from loopos.training import checkpoint
from loopos.training.distributed import World
from loopos.training.update import NonFiniteStep, Update
from loopos.training.validation import Judges


@dataclass
class Position:
    """How far a run is. `seconds`: in steps, validations and saves. `concluded`: whether all that was due after the
    last step (validation, best weights, the decision to stop) is done; a signal puts it off.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    rows: int = 0
    skipped: int = 0
    seconds: float = 0.0
    stopped_by: str | None = None
    concluded: bool = True


@dataclass
class RunState:
    """All of a run that its checkpoints hold. `identity`: name → value of what a resumed run must have the same."""

    folder: Path
    identity: Mapping[str, str | int | bool]
    update: Update
    judges: Judges | None
    world: World
    position: Position = field(default_factory=Position)

    def save(self, events_offset: int, *, is_best: bool, keep_last: int, keep_best: bool) -> None:
        """Writes all that resuming needs; rank 0 writes, every rank gives its random states.

        Raises `DiskFull`, and `NonFiniteStep` for weights that are not finite.
        """
        gathered = self.world.gather(checkpoint.random_states())
        if self.world.is_first:
            tensors: dict[str, Mapping[str, torch.Tensor]] = {
                "weights": self.update.masters.parameters,
                "optimizer": self.update.optimizer.tensors(),
            }
            random: dict[str, Any] = {}
            for rank, states in enumerate(gathered):
                assert isinstance(states, tuple)
                tensors[f"random-{rank}"], random[str(rank)] = states
            try:
                checkpoint.save(
                    self.folder,
                    self.position.step,
                    tensors,
                    {**self._as_json(), "random": random, "events_offset": events_offset},
                    metric=self.judges.best.metric if self.judges is not None else None,
                    is_best=is_best,
                )
            except checkpoint.NonFiniteError as problem:
                raise NonFiniteStep(
                    f"step {self.position.step}: {problem}; lower training.learning_rate, or set training.max_grad_norm"
                ) from problem
            checkpoint.prune(self.folder, keep_last, keep_best)
        self.world.wait()

    def _as_json(self) -> dict[str, Any]:
        return {
            "identity": dict(self.identity),
            "position": asdict(self.position),
            "judges": self.judges.state() if self.judges is not None else None,
            "loss_scale": self.update.loss_scale,
            "steps_since_overflow": self.update.steps_since_overflow,
        }

    def restore(self, found: checkpoint.Checkpoint) -> list[str]:
        """Puts everything back to where `found` left it; returns a line for each thing that could not be.

        Raises `UserError`, before anything is changed, for a checkpoint of another run.
        """
        self._refuse_another_run(found)
        state = found.state
        position = dict(state["position"])
        self.position = Position(**{**position, "cursor": Cursor(**position["cursor"])})
        if self.judges is not None and state["judges"] is not None:
            self.judges.load(state["judges"])
        self.update.masters.load(found.tensors["weights"])
        self.update.optimizer.load(found.tensors.get("optimizer", {}))
        self.update.loss_scale, self.update.steps_since_overflow = state["loss_scale"], state["steps_since_overflow"]
        mine = str(self.world.rank)
        if mine not in state["random"]:
            return [f"the checkpoint holds no random states for rank {mine}; it goes on from its seed"]
        return checkpoint.restore_random_states(found.tensors[f"random-{mine}"], state["random"][mine])

    def _refuse_another_run(self, found: checkpoint.Checkpoint) -> None:
        theirs = found.state.get("identity", {})
        changed = [
            f"{name}: the checkpoint has {theirs.get(name)}, this run {mine}"
            for name, mine in self.identity.items()
            if theirs.get(name) != mine
        ]
        if changed:
            raise UserError(
                f"{found.path} belongs to another run ({'; '.join(changed)}); resume with the config and data it began "
                "with, or name another output_dir"
            )


def identity_of(
    base: str, settings: TrainingSection, batches: StepBatches, update: Update
) -> Mapping[str, str | int | bool]:
    """What makes a run this one: the weights below, the rows, what trains and how."""
    trained = update.masters.parameters.values()
    return {
        "base": base,
        "rows": len(batches.examples),
        "rows_a_step": batches.rows_a_step,
        "weights that train": f"{len(trained)} tensors of {sum(p.numel() for p in trained):,} numbers",
        "training.optimizer": settings.optimizer,
        "training.seed": settings.seed,
        "training.shuffle": settings.shuffle,
    }
