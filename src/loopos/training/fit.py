"""The training loop that all methods share: step, log, validate, save, stop, resume.

A run that is killed at any instant and resumed produces the same numbers as an uninterrupted run on the same machine
with the same settings. All ranks make the same decisions. `run_state.py` defines what a checkpoint contains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

from loopos.config.diagnostics import Interrupted
from loopos.config.sections import MethodConfig, TrainingSection
from loopos.data.batches import BatchT, StepSource
from loopos.storage.durable import JSON, explain_disk_full
from loopos.storage.json_files import save_json
from loopos.training import checkpoint
from loopos.training.callbacks import CALLBACK, CALLBACK_ERROR, Callbacks
from loopos.training.distributed import World
from loopos.training.identity import Identity, of_training
from loopos.training.progress import RunProgress
from loopos.training.resuming import session_facts, starting_point
from loopos.training.run_log import RunLog
from loopos.training.run_state import FitResult as FitResult
from loopos.training.run_state import MethodState, Position, RunState
from loopos.training.schedules import factor, warmup_steps
from loopos.training.stopping import EXIT_CODES, StopSignals, steps_end_in_order
from loopos.training.update import NonFiniteStep, Objective, StepResult, Update
from loopos.training.validation import Validation, ValidationTracker


class Due:
    """Decides whether a checkpoint is due. `save_is_overdue`: the last checkpoint is older than
    `training.save_interval` by the clock of rank 0.
    """

    def __init__(self, settings: TrainingSection) -> None:
        self._settings = settings
        self._saved_at = time.monotonic()
        self.save_is_overdue = False

    def saved(self) -> None:
        """Records that a checkpoint is being written."""
        self._saved_at, self.save_is_overdue = time.monotonic(), False

    def waits_too_long(self) -> bool:
        """Whether a checkpoint is overdue by this rank's clock."""
        limit = self._settings.save_interval
        return limit is not None and time.monotonic() - self._saved_at >= limit

    def save(self, position: Position, *, validated: bool, is_best: bool, is_judged: bool) -> bool:
        """Whether a checkpoint is due. is_judged: whether the run has validations."""
        every = self._settings.save_every
        if self.save_is_overdue and every != "never":
            return True
        if every == "validation":
            return validated and is_judged
        # The best weights are always saved, not only at steps where a save is due.
        return falls_due(position, every) or (is_best and self._settings.keep_best and every != "never")


def falls_due(position: Position, every: int | str, unit: int = 1) -> bool:
    """Whether the last step reached a multiple of `every` units, or ended an epoch."""
    if isinstance(every, str):
        return every in ("epoch", "iteration") and position.cursor.step == 0
    return passes(position, every * unit)


def passes(position: Position, every: int) -> bool:
    """Whether the last step reached a multiple of `every`."""
    return position.step // every > position.previous_step // every


@dataclass(frozen=True)
class StopCriteria:
    """Decides when a run ends. `planned_steps`: steps without `training.max_steps`. `planned_end`: the reason recorded
    after them, "epochs" or "max_iterations". `gives_up`: returns the method's own reason to stop, or None. `callbacks`:
    the user's callbacks; only those of rank 0 count.
    """

    settings: TrainingSection
    planned_steps: int
    planned_end: str
    tracker: ValidationTracker | None
    world: World
    gives_up: Callable[[], str | None]
    callbacks: Callbacks

    @property
    def total_steps(self) -> int:
        """Optimizer steps after which the run ends."""
        limit = self.settings.max_steps
        return self.planned_steps if limit is None else min(self.planned_steps, limit)

    def reason(self, position: Position, received: str | None) -> str | None:
        """The reason to stop, or None. received: the name of the signal that this process received."""
        # A signal may reach only one rank, and clocks differ; all ranks must stop at the same step.
        limit = self.settings.max_time
        late = limit is not None and position.seconds >= limit
        gathered = [entry for entry in self.world.gather((received, late)) if isinstance(entry, tuple)]
        names = [name for name, _ in gathered if name is not None]
        if names:
            return str(names[0])
        # An alert in the last step is the reason even if the run would have ended there anyway.
        called_off = self.called_off()
        if called_off == CALLBACK_ERROR:
            return called_off
        reason = self.gives_up() or called_off
        if reason is None and position.step >= self.total_steps:
            return "max_steps" if self.total_steps < self.planned_steps else self.planned_end
        return reason or ("max_time" if gathered[0][1] else None)

    def called_off(self) -> str | None:
        """`CALLBACK` or `CALLBACK_ERROR` if a callback has ended the run."""
        # Without callbacks no collective call is needed.
        reason = self.world.gather(self.callbacks.reason)[0] if self.callbacks else None
        return None if reason is None else str(reason)

    def still_holds(self, position: Position) -> bool:
        """Whether the reason that ended the run still ends it under the settings of the resumed session."""
        reason, limit = position.stopped_by, self.settings.max_time
        if reason == "max_time":
            return limit is not None and position.seconds >= limit
        if reason == "early stopping":
            return self.tracker is not None and self.tracker.gives_up
        if reason == CALLBACK and self.callbacks:
            return True
        return position.step >= self.total_steps or self.gives_up() == reason


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """What a run has apart from its weights and data. config: the whole config, for config.json and the log. callbacks:
    receive each event and may end the run. facts: extra fields of the "session" event. unfreeze: called once, at
    `training.unfreeze_step`.
    """

    run_dir: Path
    config: MethodConfig
    settings: TrainingSection
    progress: RunProgress
    world: World
    callbacks: Callbacks
    facts: Mapping[str, JSON] = field(default_factory=dict)
    unfreeze: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How long a run is. steps: defaults to `num_epochs` × steps per epoch. end: the reason recorded after them.
    validation_unit: steps per unit of `validate_every`. gives_up: called after each step; returns the method's own
    reason to stop, or None.
    """

    steps: int | None = None
    end: str = "epochs"
    validation_unit: int = 1
    gives_up: Callable[[], str | None] = lambda: None


class Fit(Generic[BatchT]):
    """One run in one folder: call `open`, then `run`. A source may end an epoch early; step numbers then jump to the
    first step of the next epoch.
    """

    def __init__(
        self,
        run: RunSetup,
        *,
        update: Update,
        batches: StepSource[BatchT],
        objective: Objective[BatchT],
        validation: Validation | None,
        identity: Identity,
        plan: RunPlan = RunPlan(),
        method_state: MethodState | None = None,
    ) -> None:
        """identity: the training data and the meaning of the outputs; a checkpoint with another identity is refused.
        method_state: additional state for checkpoints.
        """
        settings, world = run.settings, run.world
        self.callbacks, self.progress, self.world = run.callbacks, run.progress, world
        self.run_dir, self.config, self.settings = run.run_dir, run.config.model_dump(mode="json"), settings
        self.facts, self.unfreeze = dict(run.facts), run.unfreeze
        self.update, self.batches, self.objective, self.validation = update, batches, objective, validation
        self.validation_unit = plan.validation_unit
        self.tracker = ValidationTracker(validation, settings) if validation is not None else None
        planned = settings.num_epochs * batches.steps_an_epoch if plan.steps is None else plan.steps
        self.stop_criteria = StopCriteria(
            settings, planned, plan.end, self.tracker, world, plan.gives_up, self.callbacks
        )
        self.total_steps = self.stop_criteria.total_steps
        self.warmup = warmup_steps(settings.warmup, self.total_steps)
        self.state = RunState(
            run.run_dir / "checkpoints",
            {**identity, **of_training(settings, batches, update)},
            update,
            self.tracker,
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
        """Opens the log and writes config.json. With `resume`, first restores the newest complete checkpoint, if any,
        and removes partial files of killed processes.

        Raises `UserError` for a checkpoint or log of another run, before anything in the folder changes, and
        `DiskFull`.
        """
        start = starting_point(self.run_dir, self.config, self.state.identity, resume=resume)
        if (found := start.found) is not None:
            self._restore(found)
        # All processes have read the checkpoints before rank 0 removes any.
        self.world.wait()
        if self.world.is_first:
            for line in start.lines:
                self.progress.warn(line)
            with explain_disk_full(self.run_dir, len(str(self.config)), "the run's config"):
                self.run_dir.mkdir(parents=True, exist_ok=True)
                self.progress.say(*self.state.clear(found))
                save_json(self.run_dir / "config.json", self.config)
            self.log.open(start.written, trackers=self.settings.all_trackers, resumed_step=start.step)
        if resume:
            self.progress.say(start.sentence())
        facts = {"total_steps": self.total_steps, **start.facts(), **self.facts, "settings": self.config}
        facts |= session_facts(self.batches, self.validation, self.update, self.world)
        self.record("session", facts, {"time": time.time()})

    def run(self) -> FitResult:
        """Trains to the end. Raises `NonFiniteStep` and `DiskFull`. A signal ends the run after the current step and a
        checkpoint.
        """
        unfreeze_step = self.settings.unfreeze_step
        if self.unfreeze is not None and unfreeze_step is not None and unfreeze_step >= self.total_steps:
            self.progress.warn(
                f"training.unfreeze_step is {unfreeze_step}, but the run has {self.total_steps} steps: the frozen "
                "layers never train"
            )
        self.progress.begin(self.total_steps, self.position.step)
        try:
            with steps_end_in_order(prints=self.world.is_first) as signals:
                self._loop(signals)
        except KeyboardInterrupt:
            whole, resumes = self._last_saved(), "the same command with --resume continues"
            raise Interrupted(f"interrupted after step {self.position.step}; {whole}; {resumes}") from None
        finally:
            self.progress.end()
            self.log.close()
        return FitResult.of(self.position, self.tracker)

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
        """Raises the `UserError` of a failed callback after the run has ended cleanly."""
        state = f"the run ended after step {self.position.step}; {self._last_saved()}; it resumes with resume=True"
        self.callbacks.raise_failure(state)

    def _check_trained(self) -> None:
        """Raises `NonFiniteStep` if the run is over and every step was skipped: the weights are still the initial
        ones.
        """
        position = self.position
        if position.stopped_by in EXIT_CODES or not 0 < position.step == position.skipped:
            return
        raise NonFiniteStep(
            f"all {position.step} steps were skipped because loss or gradient was not finite; the weights are "
            "unchanged and nothing is exported; lower training.learning_rate, or check weights and labels for "
            "non-finite values"
        )

    def _step(self) -> None:
        position = self.position
        if self.unfreeze is not None and self.settings.unfreeze_step == position.step:
            self.unfreeze()
            self.progress.say(f"step {position.step}: the frozen layers now train")
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
        # The clock of rank 0 decides for all.
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
        """Learning rate of optimizer step `step` (from 0) as a fraction of its peak."""
        s = self.settings
        shape = factor(s.schedule, step, self.total_steps, self.warmup, s.minimum_ratio, s.num_cycles, s.decay_share)
        plateau = self.tracker.plateau if self.tracker is not None else None
        return shape * (plateau.scale if plateau is not None else 1.0)

    def _conclude(self, signals: StopSignals) -> None:
        """Does everything that is due after a step: validate, check the stop criteria, save."""
        position, settings = self.position, self.settings
        reason = self.stop_criteria.reason(position, signals.received)
        if reason in EXIT_CODES or reason == CALLBACK_ERROR:
            # A kill may follow within seconds, so the rest is left to the resumed run.
            position.concluded = False
            self._save(is_best=False)
            position.stopped_by = reason
            return
        validated = reason is not None or falls_due(position, settings.validate_every, self.validation_unit)
        is_best = validated and self._validate()
        if reason is None and validated and self.tracker is not None and self.tracker.gives_up:
            reason = "early stopping"
        if validated:
            # A callback may stop the run because of this validation.
            called_off = self.stop_criteria.called_off()
            reason = called_off if called_off == CALLBACK_ERROR else reason or called_off
        # A run that a failed callback ended continues when it is resumed.
        position.concluded, position.stopped_by = True, None if reason == CALLBACK_ERROR else reason
        is_judged = self.tracker is not None
        if reason is not None or self.due.save(position, validated=validated, is_best=is_best, is_judged=is_judged):
            self._save(is_best)
        position.stopped_by = reason

    def _validate_start(self) -> None:
        """Validates before the first update, as the baseline. A run that resumes from a checkpoint of step 0 already
        has it.
        """
        if self.tracker is None or self.tracker.knows_start:
            return
        metrics, began = self._measure()
        self.tracker.observe_start(metrics)
        self._log_validation(metrics, began, best=False, best_trained=False, verdict="the start")
        if self.settings.export_start:
            # Until a validation beats it, the start is the best checkpoint.
            self._save(is_best=True)

    def _validate(self) -> bool:
        """Runs and logs a validation. Returns whether these weights are the best to export so far."""
        if self.tracker is None:
            return False
        metrics, began = self._measure()
        best_trained = self.tracker.observe(metrics, self.position.step)
        best = best_trained and self.tracker.beat_start is not False
        verdict = "best" if best else "no better than the start" if best_trained else ""
        self._log_validation(metrics, began, best=best, best_trained=best_trained, verdict=verdict)
        return best if self.settings.export_start else best_trained

    def _measure(self) -> tuple[dict[str, float], float]:
        """The metrics of a validation, and its start time."""
        assert self.validation is not None, "judges need a validation"
        began = time.monotonic()
        metrics = dict(self.validation.measure())
        for name in sorted({self.validation.metric, self.validation.watched} - set(metrics)):
            self.progress.warn(
                f"validation at step {self.position.step}: {name} is not defined on these rows and predictions "
                "and is ignored; choose another training.metric if this persists"
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
        """Starts a checkpoint. Writing continues in the background until the next optimizer step or the end of the
        run.
        """
        began = time.monotonic()
        self.due.saved()
        self.state.begin_save(self.log.position(), is_best=is_best)
        self._saved = {"is_best": is_best}
        self._save_seconds = time.monotonic() - began

    def _finish_save(self) -> None:
        """Waits until the checkpoint is complete and logs the time that saving blocked training."""
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
        if position.stopped_by is not None and not self.stop_criteria.still_holds(position):
            self.progress.say(f"the run had ended ({position.stopped_by}); with these settings it continues")
            position.stopped_by = None
        elif position.stopped_by is None and position.step >= self.total_steps:
            position.concluded = False

    def _last_saved(self) -> str:
        whole, _ = checkpoint.newest_whole(self.state.folder)
        return f"the last complete checkpoint is step {whole.step}" if whole else "there is no checkpoint yet"

    def record(self, kind: str, metrics: Mapping[str, JSON], timing: Mapping[str, float]) -> None:
        """Writes an event for the current step with the time of day, so that the log of a killed run shows when it
        ended.
        """
        self.log.write(kind, self.position.step, metrics, {**timing, "time": time.time()})
