"""The loop of every method: step, log, validate, stop early, save, resume.

Enters: where batches come from, an `Update`, a method's objective and validation. Leaves: checkpoints, `events.jsonl`,
a `FitResult`. Left out: what a batch or a loss is, and what a checkpoint holds (`run_state.py`). A run that was killed
at any instant and resumed goes through the same numbers as one that was not, on the same machine and settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic

from loopos.config.sections import TrainingSection
from loopos.storage.durable import JSON
from loopos.training import checkpoint
from loopos.training.distributed import World
from loopos.training.ending import Ending
from loopos.training.fit_result import FitResult as FitResult
from loopos.training.progress import RunProgress
from loopos.training.run_log import RunLog
from loopos.training.run_state import Carried, Position, RunState, identity_of
from loopos.training.schedules import factor, warmup_steps
from loopos.training.session_facts import session_facts
from loopos.training.step_source import BatchT, StepSource
from loopos.training.stopping import EXIT_CODES, StopSignals
from loopos.training.update import NonFiniteStep, Objective, StepResult, Update
from loopos.training.validation import Judges, Validation


class Fit(Generic[BatchT]):
    """One run in one folder: `open`, then `run`. A source may leave out the rest of an epoch; the next step has the
    number of the next epoch's first one.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        settings: TrainingSection,
        update: Update,
        batches: StepSource[BatchT],
        objective: Objective[BatchT],
        validation: Validation | None,
        progress: RunProgress,
        world: World,
        base: str,
        facts: Mapping[str, JSON] | None = None,
        unfreeze: Callable[[], None] | None = None,
        planned_steps: int | None = None,
        planned_end: str = "epochs",
        validation_unit: int = 1,
        carried: Carried | None = None,
        gives_up: Callable[[], str | None] = lambda: None,
    ) -> None:
        """base: what the weights that do not train are; a checkpoint of another base is refused. facts: what the log
        records of each session. unfreeze: called once, at `training.unfreeze_step`. planned_steps: `num_epochs` × steps
        an epoch when None; planned_end: what has ended after them. validation_unit: steps that `validate_every` counts
        in. carried: what else the checkpoints hold. gives_up: gives after each step the reason to end the run, if any.
        """
        self.run_dir, self.settings, self.update, self.batches = run_dir, settings, update, batches
        self.objective, self.validation, self.progress, self.world = objective, validation, progress, world
        self.facts, self.unfreeze = dict(facts or {}), unfreeze
        planned = settings.num_epochs * batches.steps_an_epoch if planned_steps is None else planned_steps
        self.validation_unit = validation_unit
        self.judges = Judges(validation, settings) if validation is not None else None
        self.ending = Ending(settings, planned, planned_end, self.judges, world, gives_up)
        self.total_steps = self.ending.total_steps
        self.warmup = warmup_steps(settings.warmup, self.total_steps)
        identity = identity_of(base, settings, batches, update)
        self.state = RunState(
            run_dir / "checkpoints",
            identity,
            update,
            self.judges,
            world,
            carried,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
        )
        self.log = RunLog()
        self._saved: dict[str, JSON] = {}
        self._save_seconds = 0.0

    @property
    def position(self) -> Position:
        return self.state.position

    def open(self, *, resume: bool) -> None:
        """Opens the log, and with `resume` goes back to the newest whole checkpoint, if there is one.

        Raises `UserError` (a checkpoint of another run); nothing is changed in the folder then.
        """
        found, said = checkpoint.newest_whole(self.state.folder) if resume else (None, [])
        for line in said:
            self.progress.warn(line)
        if found is not None:
            self._restore(found)
        if self.world.is_first:
            offset, step = (found.state["events_offset"], found.step) if found is not None else (0, None)
            self.log.open(self.run_dir, offset=offset, tensorboard=self.settings.tensorboard, resumed_step=step)
        if found is not None:
            self.progress.say(f"resumed from the checkpoint of step {found.step}")
        elif resume:
            self.progress.say("no checkpoint to resume from: starting at step 0")
        facts = {"resumed": found is not None, "total_steps": self.total_steps, **self.facts}
        self.record("session", {**facts, **session_facts(self.batches, self.validation, self.update, self.world)}, {})

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
            with StopSignals() as signals:
                self._loop(signals)
        finally:
            self.progress.end()
            self.log.close()
        return FitResult.of(self.position, self.judges)

    def _loop(self, signals: StopSignals) -> None:
        position = self.position
        if position.step == 0 and self.settings.validate_at_start:
            self._validate_start()
        if not position.concluded:
            self._conclude(signals)
        while position.stopped_by is None:
            self._step()
            self._conclude(signals)
        self._finish_save()
        self.record("end", {"stopped_by": position.stopped_by}, {"seconds": position.seconds})

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
        counted = self.world.sum_floats(own)
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
        if result.skipped or self._passes(self.settings.log_every) or position.step >= self.total_steps:
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
        if reason in EXIT_CODES:
            # There may be seconds left before a kill: the rest is done when the run is resumed.
            position.concluded = False
            self._save(is_best=False)
            position.stopped_by = reason
            return
        validated = reason is not None or self._falls_due(settings.validate_every, self.validation_unit)
        is_best = validated and self._validate()
        if reason is None and validated and self.judges is not None and self.judges.gives_up:
            reason = "early stopping"
        position.concluded, position.stopped_by = True, reason
        if reason is not None or self._save_falls_due(validated, is_best):
            self._save(is_best)

    def _save_falls_due(self, validated: bool, is_best: bool) -> bool:
        every = self.settings.save_every
        if every == "validation":
            return validated and self.judges is not None
        # The best weights are kept whenever they come, not only where a step to save falls on them.
        return self._falls_due(every) or (is_best and self.settings.keep_best and every != "never")

    def _falls_due(self, every: int | str, unit: int = 1) -> bool:
        if isinstance(every, str):
            return every in ("epoch", "iteration") and self.position.cursor.step == 0
        return self._passes(every * unit)

    def _passes(self, every: int) -> bool:
        """Whether the last step ended at or went over a multiple of `every`."""
        return self.position.step // every > self.position.previous_step // every

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
        self.state.begin_save(self.log.offset(), is_best=is_best)
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
