"""The offline loop: step, log, validate, stop early, save, resume.

Enters: the batches, an `Update`, a method's objective and validation. Leaves: checkpoints, `events.jsonl`, a
`FitResult`. Left out: what a batch or a loss is.
A run that was killed at any instant and resumed goes through the same numbers as one that was not, on the same machine
and settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from loopos.config.faults import UserError
from loopos.config.sections import TrainingSection
from loopos.data.batches import Batch, Cursor, StepBatches
from loopos.training import checkpoint
from loopos.training.distributed import World
from loopos.training.events import EventLog, EventWriter, TensorBoardAdapter
from loopos.training.progress import RunProgress
from loopos.training.schedules import Plateau, factor, warmup_steps
from loopos.training.stopping import Best, StopSignals
from loopos.training.update import NonFiniteStep, Objective, Update


@dataclass(frozen=True)
class FitResult:
    """How a run ended. `stopped_by`: "epochs", "max_steps", "max_time", "early stopping", "SIGTERM" or "SIGINT".
    `best`: step and metric of the best validation.
    """

    step: int
    stopped_by: str
    best_step: int | None
    best_metric: float | None
    tokens: int
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Ended by a signal: there is more to train, and `--resume` goes on."""
        return self.stopped_by.startswith("SIG")


@dataclass
class Position:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    rows: int = 0
    skipped: int = 0
    seconds: float = 0.0
    stopped_by: str | None = None


@dataclass(frozen=True)
class Validation:
    """How a run is judged: `measure` gives the metrics, `metric` names the one that says what is best, `mode` whether
    less ("min") or more ("max") is better.

    `watched` and `watched_mode` are those of early stopping and of the plateau schedule."""

    measure: Callable[[], Mapping[str, float]]
    metric: str
    mode: str
    watched: str
    watched_mode: str


class Fit:
    """One offline run in one folder. `unfreeze`: called once when `training.unfreeze_step` is reached."""

    def __init__(
        self,
        *,
        run_dir: Path,
        settings: TrainingSection,
        update: Update,
        batches: StepBatches,
        objective: Objective[Batch],
        validation: Validation | None,
        progress: RunProgress,
        world: World,
        base: str,
        unfreeze: Callable[[], None] | None = None,
    ) -> None:
        """base: what the weights that do not train are; a checkpoint of another base is refused."""
        self.run_dir, self.settings, self.update, self.batches, self.objective = (
            run_dir,
            settings,
            update,
            batches,
            objective,
        )
        self.validation, self.progress, self.world, self.base, self.unfreeze = (
            validation,
            progress,
            world,
            base,
            unfreeze,
        )
        self.checkpoints = run_dir / "checkpoints"
        self.total_steps = total_steps(settings, batches.steps_an_epoch)
        self.warmup = warmup_steps(settings.warmup, self.total_steps)
        self.position = Position()
        early = settings.early_stopping
        self.best = Best(validation.mode) if validation else None
        self.watched = Best(validation.watched_mode, early.min_delta) if validation and early else None
        plateau = settings.schedule == "plateau" and validation is not None
        self.plateau = (
            Plateau(settings.plateau_factor, settings.plateau_patience, settings.minimum_ratio, validation.watched_mode)
            if plateau
            else None
        )  # type: ignore[arg-type, union-attr]
        self.log: EventLog | None = None
        self.writers: list[EventWriter] = []
        self.session_start = 0.0

    def run(self, *, resume: bool) -> FitResult:
        """Trains to the end, from the newest whole checkpoint if `resume` and there is one.

        Raises `NonFiniteStep`, `DiskFull`, `UserError` (a checkpoint of another run); a signal ends it in order, after
        a checkpoint.
        """
        self.session_start = time.monotonic()
        self._open(resume)
        self.progress.begin(self.total_steps, self.position.step)
        try:
            with StopSignals() as signals:
                self._loop(signals)
        finally:
            self.progress.end()
            for writer in self.writers:
                writer.close()
        best = self.best or Best("min")
        position = self.position
        assert position.stopped_by is not None
        return FitResult(position.step, position.stopped_by, best.step, best.metric, position.tokens, position.seconds)

    def _loop(self, signals: StopSignals) -> None:
        position = self.position
        if position.step == 0 and position.stopped_by is None:
            self._validate()
        while position.stopped_by is None:
            epoch = position.cursor.epoch
            self._step()
            ended_epoch = position.cursor.epoch != epoch
            reason = self._reason_to_end(signals)
            validated = self._due(self.settings.validate_every, ended_epoch, reason) and self.validation is not None
            is_best = validated and self._validate()
            if reason is None and self.watched is not None and self.settings.early_stopping is not None:
                reason = "early stopping" if self.watched.stale >= self.settings.early_stopping.patience else None
            # A signal's reason is not kept in the checkpoint: the run has more to do.
            position.stopped_by = None if reason in ("SIGTERM", "SIGINT") else reason
            if self._save_due(validated, ended_epoch, reason):
                self._save(is_best)
            position.stopped_by = reason
        self._event("end", {"stopped_by": position.stopped_by}, {"seconds": position.seconds})

    def _step(self) -> None:
        position, settings = self.position, self.settings
        if self.unfreeze is not None and settings.unfreeze_step == position.step:
            self.unfreeze()
            self.progress.say(f"step {position.step}: the frozen layers train from here on")
        began = time.monotonic()
        rate = self.rate_factor(position.step)
        batches = self.batches.step(position.cursor)
        try:
            result = self.update(batches, self.objective, rate)
        except NonFiniteStep as problem:
            whole, _ = checkpoint.newest_whole(self.checkpoints)
            left = f"the checkpoint of step {whole.step} is whole" if whole else "there is no checkpoint yet"
            raise NonFiniteStep(
                f"step {position.step + 1}: {problem}; {left}; lower training.learning_rate, or set training.on_nonfinite to skip"
            ) from None
        counted = self.world.sum_floats(
            {"tokens": sum(b.num_tokens for b in batches), "rows": sum(len(b.rows) for b in batches)}
        )
        seconds = time.monotonic() - began
        position.step += 1
        position.cursor = self.batches.after(position.cursor)
        position.tokens += int(counted["tokens"])
        position.rows += int(counted["rows"])
        position.skipped += result.skipped
        position.seconds += seconds
        if result.skipped:
            self.progress.warn(f"step {position.step}: not finite, skipped ({position.skipped} so far)")
        if position.step % settings.log_every == 0 or position.step == self.total_steps or result.skipped:
            numbers = {
                **result.losses,
                "gradient_norm": result.gradient_norm,
                "learning_rate": settings.learning_rate * rate,
            }
            counts = {
                "epoch": position.cursor.epoch,
                "rows": position.rows,
                "tokens": position.tokens,
                "skipped": position.skipped,
            }
            self._event(
                "step", {**numbers, **counts}, {"seconds": seconds, "tokens_per_second": counted["tokens"] / seconds}
            )
        self.progress.step(position.step, result.losses, int(counted["tokens"]), seconds)

    def rate_factor(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0) as a share of its peak."""
        s = self.settings
        shape = factor(s.schedule, step, self.total_steps, self.warmup, s.minimum_ratio, s.num_cycles, s.decay_share)
        return shape * (self.plateau.scale if self.plateau is not None else 1.0)

    def _validate(self) -> bool:
        """Measures, logs and judges; whether this is the best validation so far."""
        if self.validation is None:
            return False
        began = time.monotonic()
        metrics = dict(self.validation.measure())
        assert self.best is not None
        better = self.best.observe(metrics[self.validation.metric], self.position.step)
        if self.watched is not None:
            self.watched.observe(metrics[self.validation.watched], self.position.step)
        if self.plateau is not None and self.position.step > 0:
            self.plateau.observe(metrics[self.validation.watched])
        self._event("validation", {**metrics, "best": better}, {"seconds": time.monotonic() - began})
        self.progress.validation(self.position.step, metrics, better)
        return better

    def _reason_to_end(self, signals: StopSignals) -> str | None:
        # A signal may have reached one rank alone; all must stop at the same step.
        received = [name for name in self.world.gather(signals.received) if name is not None]
        if received:
            return str(received[0])
        if self.position.step >= self.total_steps:
            return (
                "max_steps"
                if self.settings.max_steps is not None and self.total_steps == self.settings.max_steps
                else "epochs"
            )
        if self.settings.max_time is not None and self.world.gather(self.position.seconds)[0] >= self.settings.max_time:  # type: ignore[operator]
            return "max_time"
        return None

    def _due(self, every: int | str, ended_epoch: bool, reason: str | None) -> bool:
        if reason in ("SIGTERM", "SIGINT") or every == "never":
            return False
        return reason is not None or (ended_epoch if every == "epoch" else self.position.step % int(every) == 0)

    def _save_due(self, validated: bool, ended_epoch: bool, reason: str | None) -> bool:
        every = self.settings.save_every
        if reason is not None:
            return True
        return validated if every == "validation" else every != "never" and self._due(every, ended_epoch, reason)

    def _save(self, is_best: bool) -> None:
        """Writes all that resuming needs; rank 0 writes, every rank gives its random states."""
        gathered = self.world.gather(checkpoint.random_states())
        if self.world.is_first:
            assert self.log is not None
            began = time.monotonic()
            tensors: dict[str, Mapping[str, torch.Tensor]] = {
                "weights": self.update.masters.parameters,
                "optimizer": self.update.optimizer.tensors(),
            }
            states = {}
            for rank, (random_tensors, random_state) in enumerate(gathered):  # type: ignore[misc]
                tensors[f"random-{rank}"] = random_tensors
                states[str(rank)] = random_state
            checkpoint.save(
                self.checkpoints,
                self.position.step,
                tensors,
                {**self._state(), "random": states, "events_offset": self.log.offset()},
                metric=self.best.metric if self.best is not None else None,
                is_best=is_best,
            )
            checkpoint.prune(self.checkpoints, self.settings.keep_last, self.settings.keep_best)
            self._event("checkpoint", {"is_best": is_best}, {"seconds": time.monotonic() - began})
        self.world.wait()

    def _state(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "position": asdict(self.position),
            "total_steps": self.total_steps,
            "rows": len(self.batches.examples),
            "rows_a_step": self.batches.rows_a_step,
            "best": self.best.state() if self.best is not None else None,
            "watched": self.watched.state() if self.watched is not None else None,
            "plateau": self.plateau.state_dict() if self.plateau is not None else None,
            "loss_scale": self.update.loss_scale,
            "steps_since_overflow": self.update.steps_since_overflow,
        }

    def _open(self, resume: bool) -> None:
        found, said = checkpoint.newest_whole(self.checkpoints) if resume else (None, [])
        for line in said:
            self.progress.warn(line)
        if self.world.is_first:
            self.log = EventLog(self.run_dir / "events.jsonl")
            self.writers = [self.log]
            self.log.rewind(0 if found is None else found.state["events_offset"])
            if self.settings.tensorboard:
                self.writers.append(
                    TensorBoardAdapter(self.run_dir / "tensorboard", resumed_step=found.step if found else None)
                )
        if found is not None:
            self._restore(found)
            self.progress.say(f"resumed from the checkpoint of step {found.step}")
        elif resume:
            self.progress.say("no checkpoint to resume from: starting at step 0")
        self._event("session", {"resumed": found is not None, "total_steps": self.total_steps}, {"time": time.time()})

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        state = found.state
        now = self._state()
        changed = [
            f"{name}: the checkpoint has {state[name]}, this run {now[name]}"
            for name in ("base", "rows", "rows_a_step")
            if state[name] != now[name]
        ]
        if changed:
            raise UserError(
                f"{found.path} belongs to another run ({'; '.join(changed)}); resume with the config and data it began with, or name another output_dir"
            )
        position = dict(state["position"])
        self.position = Position(**{**position, "cursor": Cursor(**position["cursor"])})
        for judge, name in ((self.best, "best"), (self.watched, "watched")):
            if judge is not None and state[name] is not None:
                judge.load(state[name])
        if self.plateau is not None and state["plateau"] is not None:
            self.plateau.load_state_dict(state["plateau"])
        if (
            self.unfreeze is not None
            and self.settings.unfreeze_step is not None
            and self.position.step > self.settings.unfreeze_step
        ):
            self.unfreeze()
        self.update.masters.load(found.tensors["weights"])
        self.update.optimizer.load(found.tensors.get("optimizer", {}))
        self.update.loss_scale, self.update.steps_since_overflow = state["loss_scale"], state["steps_since_overflow"]
        mine = str(self.world.rank)
        if mine in state["random"]:
            for line in checkpoint.restore_random_states(found.tensors[f"random-{mine}"], state["random"][mine]):
                self.progress.warn(line)
        else:
            self.progress.warn(f"the checkpoint holds no random states for rank {mine}; it goes on from its seed")
        if self.position.step >= self.total_steps and self.position.stopped_by is None:
            self.position.stopped_by = "epochs"

    def _event(self, kind: str, metrics: Mapping[str, Any], timing: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(kind, step=self.position.step, metrics=metrics, timing=timing)


def total_steps(settings: TrainingSection, steps_an_epoch: int) -> int:
    """Optimizer steps of a whole run: epochs × steps an epoch, or `max_steps` where that is less."""
    planned = settings.num_epochs * steps_an_epoch
    return planned if settings.max_steps is None else min(planned, settings.max_steps)
