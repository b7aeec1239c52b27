"""What is due after a step: validation, a line of the log, a checkpoint.

Enters: the settings, and where a run stands. Leaves: whether it is due. All ranks come to the same answer. Left out:
doing it (`fit.py`).

Why a run ends after a step, and whether that still holds when it is resumed.

Enters: where the run stands, the signal received, what its judges and its method say. Leaves: a reason, or none. All
ranks come to the same one. Left out: what is done then (`fit.py`).

What the loop asks of the place where its batches come from.

Enters: a cursor. Leaves: the micro-batches of a step. Left out: who makes them (`data.batches`, `training.rollouts`).

The loop of every method: step, log, validate, stop early, save, resume.

Enters: where batches come from, an `Update`, a method's objective and validation. Leaves: checkpoints, `events.jsonl`,
a `FitResult`. Left out: what a batch or a loss is, and what a checkpoint holds (`run_state.py`). A run that was killed
at any instant and resumed goes through the same numbers as one that was not, on the same machine and settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from loopos.config.diagnostics import Interrupted
from loopos.config.sections import MethodConfig, TrainingSection
from loopos.data.batches import Cursor
from loopos.storage.durable import JSON, explain_disk_full
from loopos.storage.json_files import save_json
from loopos.training import checkpoint
from loopos.training.callbacks import CALLBACK, CALLBACK_ERROR, Callbacks
from loopos.training.distributed import World
from loopos.training.identity import Identity, of_training
from loopos.training.progress import RunProgress
from loopos.training.resuming import beginning, session_facts
from loopos.training.run_log import RunLog
from loopos.training.run_state import FitResult as FitResult
from loopos.training.run_state import MethodState, Position, RunState
from loopos.training.schedules import factor, warmup_steps
from loopos.training.stopping import EXIT_CODES, StopSignals, steps_end_in_order
from loopos.training.update import NonFiniteStep, Objective, StepResult, Update
from loopos.training.validation import Judges, Validation


class Due:
    """`save_is_overdue`: whether the last checkpoint is older than `training.save_interval`, by the first rank's
    clock.
    """

    def __init__(self, settings: TrainingSection) -> None:
        self._settings = settings
        self._saved_at = time.monotonic()
        self.save_is_overdue = False

    def saved(self) -> None:
        """A checkpoint is being written."""
        self._saved_at, self.save_is_overdue = time.monotonic(), False

    def waits_too_long(self) -> bool:
        """Whether this rank's clock says that a checkpoint is overdue."""
        limit = self._settings.save_interval
        return limit is not None and time.monotonic() - self._saved_at >= limit

    def save(self, position: Position, *, validated: bool, is_best: bool, is_judged: bool) -> bool:
        """Whether a checkpoint is due. is_judged: whether validations judge the run."""
        every = self._settings.save_every
        if self.save_is_overdue and every != "never":
            return True
        if every == "validation":
            return validated and is_judged
        # The best weights are kept whenever they come, not only where a step to save falls on them.
        return falls_due(position, every) or (is_best and self._settings.keep_best and every != "never")


def falls_due(position: Position, every: int | str, unit: int = 1) -> bool:
    """Whether the last step ended at or went over a multiple of `every` units, or ended an epoch."""
    if isinstance(every, str):
        return every in ("epoch", "iteration") and position.cursor.step == 0
    return passes(position, every * unit)


def passes(position: Position, every: int) -> bool:
    """Whether the last step ended at or went over a multiple of `every`."""
    return position.step // every > position.previous_step // every


@dataclass(frozen=True)
class StopCriteria:
    """`planned_steps`: of the run without `training.max_steps`, and `planned_end` what has ended then: "epochs", or
    "max_iterations". `gives_up`: the method's own reason to end the run, if it has one now. `callbacks`: those of the
    user's program, of which the first rank's decide.
    """

    settings: TrainingSection
    planned_steps: int
    planned_end: str
    judges: Judges | None
    world: World
    gives_up: Callable[[], str | None]
    callbacks: Callbacks

    @property
    def total_steps(self) -> int:
        """Optimizer steps after which the run ends."""
        limit = self.settings.max_steps
        return self.planned_steps if limit is None else min(self.planned_steps, limit)

    def reason(self, position: Position, received: str | None) -> str | None:
        """received: the name of a signal that this process was sent."""
        # A signal may have reached one rank alone, and clocks differ; all ranks must stop at the same step.
        limit = self.settings.max_time
        late = limit is not None and position.seconds >= limit
        told = [entry for entry in self.world.gather((received, late)) if isinstance(entry, tuple)]
        names = [name for name, _ in told if name is not None]
        if names:
            return str(names[0])
        # An alarm in the last step is the reason, though the run would have ended there anyway.
        called_off = self.called_off()
        if called_off == CALLBACK_ERROR:
            return called_off
        given_up = self.gives_up() or called_off
        if given_up is None and position.step >= self.total_steps:
            return "max_steps" if self.total_steps < self.planned_steps else self.planned_end
        return given_up or ("max_time" if told[0][1] else None)

    def called_off(self) -> str | None:
        """`CALLBACK` or `CALLBACK_ERROR` where a callback has ended the run."""
        # Without callbacks no rank waits for another here.
        reason = self.world.gather(self.callbacks.reason)[0] if self.callbacks else None
        return None if reason is None else str(reason)

    def still_holds(self, position: Position) -> bool:
        """Whether the reason that ended a run still ends it under the settings it is resumed with."""
        reason, limit = position.stopped_by, self.settings.max_time
        if reason == "max_time":
            return limit is not None and position.seconds >= limit
        if reason == "early stopping":
            return self.judges is not None and self.judges.gives_up
        if reason == CALLBACK and self.callbacks:
            return True
        return position.step >= self.total_steps or self.gives_up() == reason


class Counted(Protocol):
    """What the loop asks of a batch."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def rows(self) -> tuple[int, ...]: ...


BatchT = TypeVar("BatchT", bound=Counted)


class StepSource(Protocol[BatchT]):
    """Where the batches of each step come from: data (`StepBatches`), or what a policy has just written."""

    @property
    def num_rows(self) -> int: ...

    @property
    def rows_a_step(self) -> int: ...

    @property
    def steps_an_epoch(self) -> int: ...

    def step(self, cursor: Cursor) -> list[BatchT]:
        """This rank's micro-batches of the step at `cursor`."""
        ...

    def idle(self) -> BatchT:
        """A batch for a process that has to run along without rows of its own. Asked for after `step`."""
        ...

    def after(self, cursor: Cursor, losses: Mapping[str, float]) -> Cursor:
        """The cursor behind a step with these losses."""
        ...


class Fit(Generic[BatchT]):
    """One run in one folder: `open`, then `run`. A source may leave out the rest of an epoch; the next step has the
    number of the next epoch's first one.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        config: MethodConfig,
        settings: TrainingSection,
        update: Update,
        batches: StepSource[BatchT],
        objective: Objective[BatchT],
        validation: Validation | None,
        progress: RunProgress,
        world: World,
        identity: Identity,
        facts: Mapping[str, JSON] | None = None,
        unfreeze: Callable[[], None] | None = None,
        planned_steps: int | None = None,
        planned_end: str = "epochs",
        validation_unit: int = 1,
        method_state: MethodState | None = None,
        gives_up: Callable[[], str | None] = lambda: None,
        callbacks: Callbacks | None = None,
    ) -> None:
        """config: of the whole run, for config.json and the log. identity: what the run learns from and what its
        outputs mean; a checkpoint of another identity is refused. facts: what the log records of each session.
        unfreeze: called once, at `training.unfreeze_step`. planned_steps: `num_epochs` × steps an epoch when None;
        planned_end: what has ended after them. validation_unit: steps that `validate_every` counts in. carried: what
        else the checkpoints hold. gives_up: gives after each step the reason to end the run, if any. callbacks: see
        each event, and may end the run.
        """
        self.callbacks = callbacks or Callbacks()
        self.run_dir, self.config, self.settings = run_dir, config.model_dump(mode="json"), settings
        self.update, self.batches = update, batches
        self.objective, self.validation, self.progress, self.world = objective, validation, progress, world
        self.facts, self.unfreeze = dict(facts or {}), unfreeze
        planned = settings.num_epochs * batches.steps_an_epoch if planned_steps is None else planned_steps
        self.validation_unit = validation_unit
        self.judges = Judges(validation, settings) if validation is not None else None
        self.ending = StopCriteria(settings, planned, planned_end, self.judges, world, gives_up, self.callbacks)
        self.total_steps = self.ending.total_steps
        self.warmup = warmup_steps(settings.warmup, self.total_steps)
        self.state = RunState(
            run_dir / "checkpoints",
            {**identity, **of_training(settings, batches, update)},
            update,
            self.judges,
            world,
            method_state,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
        )
        self.log = RunLog(self.callbacks)
        self._saved: dict[str, JSON] = {}
        self._save_seconds = 0.0
        self.due = Due(settings)

    @property
    def position(self) -> Position:
        return self.state.position

    def open(self, *, resume: bool) -> None:
        """Opens the log, and with `resume` goes back to the newest whole checkpoint, if there is one; then clears what
        killed processes left among the checkpoints, and writes config.json.

        Raises `UserError` (a checkpoint of another run, a log that is not the run's); nothing is changed in the folder
        then. `DiskFull`.
        """
        begun = beginning(self.run_dir, self.config, self.state.identity, resume=resume)
        if (found := begun.found) is not None:
            self._restore(found)
        # No process looks for checkpoints any more when the first one clears.
        self.world.wait()
        if self.world.is_first:
            for line in begun.lines:
                self.progress.warn(line)
            with explain_disk_full(self.run_dir, len(str(self.config)), "the run's config"):
                self.run_dir.mkdir(parents=True, exist_ok=True)
                self.progress.say(*self.state.clear(found))
                save_json(self.run_dir / "config.json", self.config)
            self.log.open(begun.written, tensorboard=self.settings.tensorboard, resumed_step=begun.step)
        if resume:
            self.progress.say(begun.sentence())
        facts = {"total_steps": self.total_steps, **begun.facts(), **self.facts, "settings": self.config}
        facts |= session_facts(self.batches, self.validation, self.update, self.world)
        self.record("session", facts, {"time": time.time()})

    def run(self) -> FitResult:
        """Trains to the end. Raises `NonFiniteStep` and `DiskFull`; a signal ends it in order, after a checkpoint."""
        unfreeze_step = self.settings.unfreeze_step
        if self.unfreeze is not None and unfreeze_step is not None and unfreeze_step >= self.total_steps:
            self.progress.warn(
                f"training.unfreeze_step is {unfreeze_step}, but the run has {self.total_steps} steps: the frozen "
                "layers never train"
            )
        self.progress.begin(self.total_steps, self.position.step)
        try:
            with steps_end_in_order(speaks=self.world.is_first) as signals:
                self._loop(signals)
        except KeyboardInterrupt:
            whole, resumes = self._last_saved(), "the same command with --resume continues"
            raise Interrupted(f"interrupted after step {self.position.step}; {whole}; {resumes}") from None
        finally:
            self.progress.end()
            self.log.close()
        return FitResult.of(self.position, self.judges)

    def _loop(self, signals: StopSignals) -> None:
        position = self.position
        if position.step == 0 and self.settings.validate_at_start:
            self._validate_start()
        self._raise_failure()
        if not position.concluded:
            self._conclude(signals)
        while position.stopped_by is None:
            self._step()
            self._conclude(signals)
        self._finish_save()
        self._check_trained()
        ended_by = {} if self.callbacks.label is None else {"callback": self.callbacks.label}
        self.record("end", {"stopped_by": position.stopped_by, **ended_by}, {"seconds": position.seconds})
        self._raise_failure()

    def _raise_failure(self) -> None:
        """Raises the `UserError` of a callback that failed, once the run has ended in order."""
        state = f"the run ended after step {self.position.step}; {self._last_saved()}; it resumes with resume=True"
        self.callbacks.raise_failure(state)

    def _check_trained(self) -> None:
        """Raises `NonFiniteStep` for a run that is over and has taken no step: its weights are those of the start."""
        position = self.position
        if position.stopped_by in EXIT_CODES or not 0 < position.step == position.skipped:
            return
        raise NonFiniteStep(
            f"no step was taken: loss or gradient was not finite in all {position.step}, so the weights are those of "
            "the start and nothing is exported; lower training.learning_rate, or look for weights or labels that are "
            "not finite"
        )

    def _step(self) -> None:
        position = self.position
        if self.unfreeze is not None and self.settings.unfreeze_step == position.step:
            self.unfreeze()
            self.progress.say(f"step {position.step}: the frozen layers train from here on")
        began = time.monotonic()
        rate = self.rate_factor(position.step)
        batches = self.batches.step(position.cursor)
        try:
            result = self.update(batches, self.objective, rate, idle=self.batches.idle, before_step=self._finish_save)
        except NonFiniteStep as problem:
            raise NonFiniteStep(
                f"step {position.step + 1}: {problem}; {self._last_saved()}; lower training.learning_rate, or set "
                "training.on_nonfinite to skip"
            ) from None
        own = {"tokens": sum(batch.num_tokens for batch in batches), "rows": sum(len(batch.rows) for batch in batches)}
        # The first process's clock decides for all.
        counted = self.world.sum_floats({**own, "overdue": self.world.is_first and self.due.waits_too_long()})
        self.due.save_is_overdue = counted["overdue"] > 0
        seconds = time.monotonic() - began
        position.cursor = self.batches.after(position.cursor, result.losses)
        position.previous_step = position.step
        position.step = position.cursor.epoch * self.batches.steps_an_epoch + position.cursor.step
        position.tokens += int(counted["tokens"])
        position.rows += int(counted["rows"])
        position.skipped += result.skipped
        position.seconds += seconds
        if result.skipped:
            self.progress.warn(f"step {position.step}: not finite, skipped ({position.skipped} so far)")
        if result.skipped or passes(position, self.settings.log_every) or position.step >= self.total_steps:
            self._log_step(result, rate, counted["tokens"], seconds)
        self.progress.step(position.step, result.losses, int(counted["tokens"]), seconds)

    def _log_step(self, result: StepResult, rate: float, tokens: float, seconds: float) -> None:
        position = self.position
        metrics: dict[str, JSON] = {
            **result.losses,
            "gradient_norm": result.gradient_norm,
            "learning_rate": self.settings.learning_rate * rate,
            "epoch": position.cursor.epoch,
            "rows": position.rows,
            "tokens": position.tokens,
            "skipped": position.skipped,
        }
        self.record("step", metrics, {"seconds": seconds, "tokens_per_second": tokens / seconds})

    def rate_factor(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0) as a share of its peak."""
        s = self.settings
        shape = factor(s.schedule, step, self.total_steps, self.warmup, s.minimum_ratio, s.num_cycles, s.decay_share)
        plateau = self.judges.plateau if self.judges is not None else None
        return shape * (plateau.scale if plateau is not None else 1.0)

    def _conclude(self, signals: StopSignals) -> None:
        """All that is due after a step: validate, judge, stop, save."""
        position, settings = self.position, self.settings
        reason = self.ending.reason(position, signals.received)
        if reason in EXIT_CODES or reason == CALLBACK_ERROR:
            # There may be seconds left before a kill: the rest is done when the run is resumed.
            position.concluded = False
            self._save(is_best=False)
            position.stopped_by = reason
            return
        validated = reason is not None or falls_due(position, settings.validate_every, self.validation_unit)
        is_best = validated and self._validate()
        if reason is None and validated and self.judges is not None and self.judges.gives_up:
            reason = "early stopping"
        if validated:
            # A callback may answer to the validation.
            called_off = self.ending.called_off()
            reason = called_off if called_off == CALLBACK_ERROR else reason or called_off
        # What a failed callback ended goes on when it is resumed.
        position.concluded, position.stopped_by = True, None if reason == CALLBACK_ERROR else reason
        is_judged = self.judges is not None
        if reason is not None or self.due.save(position, validated=validated, is_best=is_best, is_judged=is_judged):
            self._save(is_best)
        position.stopped_by = reason

    def _validate_start(self) -> None:
        """Measures what training has to beat; a run resumed from a checkpoint of step 0 knows it already."""
        if self.judges is None or self.judges.knows_start:
            return
        metrics, began = self._measure()
        self.judges.observe_start(metrics)
        self._log_validation(metrics, began, best=False, best_trained=False, verdict="the start")
        if self.settings.export_start:
            # Until a validation beats it, the start is the best checkpoint.
            self._save(is_best=True)

    def _validate(self) -> bool:
        """Measures, judges and logs; whether the checkpoint of these weights is the best one to export."""
        if self.judges is None:
            return False
        metrics, began = self._measure()
        best_trained = self.judges.observe(metrics, self.position.step)
        best = best_trained and self.judges.beat_start is not False
        verdict = "best" if best else "no better than the start" if best_trained else ""
        self._log_validation(metrics, began, best=best, best_trained=best_trained, verdict=verdict)
        return best if self.settings.export_start else best_trained

    def _measure(self) -> tuple[dict[str, float], float]:
        """A validation's metrics, and when it began."""
        assert self.validation is not None, "there are no judges without one"
        began = time.monotonic()
        metrics = dict(self.validation.measure())
        for name in sorted({self.validation.metric, self.validation.watched} - set(metrics)):
            self.progress.warn(
                f"validation at step {self.position.step}: {name} is not defined on these rows and predictions, so "
                "nothing is judged by it; name another metric in training.metric if this stays"
            )
        return metrics, began

    def _log_validation(
        self, metrics: Mapping[str, float], began: float, *, best: bool, best_trained: bool, verdict: str
    ) -> None:
        assert self.validation is not None
        seconds = time.monotonic() - began
        self.position.seconds += seconds
        self.record("validation", {**metrics, "best": best, "best_trained": best_trained}, {"seconds": seconds})
        self.progress.validation(self.position.step, metrics, verdict, first=self.validation.metric)

    def _save(self, is_best: bool) -> None:
        """Begins a checkpoint, whose writing goes on until the next optimizer step, or the end of the run."""
        began = time.monotonic()
        self.due.saved()
        self.state.begin_save(self.log.place(), is_best=is_best)
        self._saved = {"is_best": is_best}
        self._save_seconds = time.monotonic() - began

    def _finish_save(self) -> None:
        """The checkpoint that is being written is whole from here on; its event tells the time that it held up."""
        began = time.monotonic()
        if self.state.finish_save():
            seconds = time.monotonic() - began + self._save_seconds
            self.position.seconds += seconds
            self.record("checkpoint", self._saved, {"seconds": seconds})

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        for line in self.state.restore(found):
            self.progress.warn(line)
        position, unfreeze_step = self.position, self.settings.unfreeze_step
        if self.unfreeze is not None and unfreeze_step is not None and position.step > unfreeze_step:
            self.unfreeze()
        if position.stopped_by is not None and not self.ending.still_holds(position):
            self.progress.say(f"the run had ended ({position.stopped_by}); with these settings it goes on")
            position.stopped_by = None
        elif position.stopped_by is None and position.step >= self.total_steps:
            position.concluded = False

    def _last_saved(self) -> str:
        whole, _ = checkpoint.newest_whole(self.state.folder)
        return f"the checkpoint of step {whole.step} is whole" if whole else "there is no checkpoint yet"

    def record(self, kind: str, metrics: Mapping[str, JSON], timing: Mapping[str, float]) -> None:
        """Writes an event of the present step, with the time of day: a run that was killed shows when it ended."""
        self.log.write(kind, self.position.step, metrics, {**timing, "time": time.time()})
