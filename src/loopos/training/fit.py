"""The offline loop: step, log, validate, stop early, save, resume.

Enters: the batches, an `Update`, a method's objective and validation. Leaves: checkpoints, `events.jsonl`, a
`FitResult`. Left out: what a batch or a loss is, and what a checkpoint holds (`run_state.py`).
A run that was killed at any instant and resumed goes through the same numbers as one that was not, on the same machine
and settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loopos.config.sections import TrainingSection
from loopos.data.batches import Batch, StepBatches
from loopos.training import checkpoint
from loopos.training.distributed import World
from loopos.training.durable import JSON
from loopos.training.events import EventLog, EventWriter, TensorBoardAdapter
from loopos.training.progress import RunProgress
from loopos.training.run_state import Position, RunState, identity_of
from loopos.training.schedules import factor, warmup_steps
from loopos.training.stopping import EXIT_CODES, Best, StopSignals
from loopos.training.update import NonFiniteStep, Objective, StepResult, Update
from loopos.training.validation import Judges, Validation


@dataclass(frozen=True)
class FitResult:
    """How a run ended. `stopped_by`: "epochs", "max_steps", "max_time", "early stopping", "SIGTERM" or "SIGINT".
    `best`: step and metric of the best validation. `seconds`: in steps, validations and saves.
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
        return self.stopped_by in EXIT_CODES


class Fit:
    """One offline run in one folder: `open`, then `run`."""

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
        facts: Mapping[str, JSON] | None = None,
        unfreeze: Callable[[], None] | None = None,
    ) -> None:
        """base: what the weights that do not train are; a checkpoint of another base is refused. facts: what the
        log should say of each session. unfreeze: called once, when `training.unfreeze_step` is reached.
        """
        self.run_dir, self.settings, self.update, self.batches = run_dir, settings, update, batches
        self.objective, self.validation, self.progress, self.world = objective, validation, progress, world
        self.facts, self.unfreeze = dict(facts or {}), unfreeze
        self.total_steps = total_steps(settings, batches.steps_an_epoch)
        self.warmup = warmup_steps(settings.warmup, self.total_steps)
        self.judges = Judges(validation, settings) if validation is not None else None
        identity = identity_of(base, settings, batches, update)
        self.state = RunState(run_dir / "checkpoints", identity, update, self.judges, world)
        self.log: EventLog | None = None
        self.writers: list[EventWriter] = []

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
            self.log = EventLog(self.run_dir / "events.jsonl")
            self.writers = [self.log]
            self.log.rewind(0 if found is None else found.state["events_offset"])
            if self.settings.tensorboard:
                resumed_step = found.step if found is not None else None
                self.writers.append(TensorBoardAdapter(self.run_dir / "tensorboard", resumed_step=resumed_step))
        if found is not None:
            self.progress.say(f"resumed from the checkpoint of step {found.step}")
        elif resume:
            self.progress.say("no checkpoint to resume from: starting at step 0")
        facts = {"resumed": found is not None, "total_steps": self.total_steps, **self.facts}
        self._event("session", facts, {"time": time.time()})

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
            for writer in self.writers:
                writer.close()
        position, best = self.position, self.judges.best if self.judges is not None else Best("min")
        assert position.stopped_by is not None
        return FitResult(position.step, position.stopped_by, best.step, best.metric, position.tokens, position.seconds)

    def _loop(self, signals: StopSignals) -> None:
        position = self.position
        if position.step == 0:
            # Before training: the figure to compare with, never the best weights.
            self._validate(judged=False)
        if not position.concluded:
            self._conclude(signals)
        while position.stopped_by is None:
            self._step()
            self._conclude(signals)
        self._event("end", {"stopped_by": position.stopped_by}, {"seconds": position.seconds})

    def _step(self) -> None:
        position = self.position
        if self.unfreeze is not None and self.settings.unfreeze_step == position.step:
            self.unfreeze()
            self.progress.say(f"step {position.step}: the frozen layers train from here on")
        began = time.monotonic()
        rate = self.rate_factor(position.step)
        batches = self.batches.step(position.cursor)
        try:
            result = self.update(batches, self.objective, rate)
        except NonFiniteStep as problem:
            raise NonFiniteStep(
                f"step {position.step + 1}: {problem}; {self._last_saved()}; lower training.learning_rate, or set "
                "training.on_nonfinite to skip"
            ) from None
        own = {"tokens": sum(batch.num_tokens for batch in batches), "rows": sum(len(batch.rows) for batch in batches)}
        counted = self.world.sum_floats(own)
        seconds = time.monotonic() - began
        position.step += 1
        position.cursor = self.batches.after(position.cursor)
        position.tokens += int(counted["tokens"])
        position.rows += int(counted["rows"])
        position.skipped += result.skipped
        position.seconds += seconds
        if result.skipped:
            self.progress.warn(f"step {position.step}: not finite, skipped ({position.skipped} so far)")
        if result.skipped or position.step % self.settings.log_every == 0 or position.step == self.total_steps:
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
        self._event("step", metrics, {"seconds": seconds, "tokens_per_second": tokens / seconds})

    def rate_factor(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0) as a share of its peak."""
        s = self.settings
        shape = factor(s.schedule, step, self.total_steps, self.warmup, s.minimum_ratio, s.num_cycles, s.decay_share)
        plateau = self.judges.plateau if self.judges is not None else None
        return shape * (plateau.scale if plateau is not None else 1.0)

    def _conclude(self, signals: StopSignals) -> None:
        """All that is due after a step: validate, judge, stop, save."""
        position, settings = self.position, self.settings
        reason = self._reason_to_end(signals)
        if reason in EXIT_CODES:
            # There may be seconds left before a kill: the rest is done when the run is resumed.
            position.concluded = False
            self._save(is_best=False)
            position.stopped_by = reason
            return
        validated = reason is not None or self._falls_due(settings.validate_every)
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

    def _falls_due(self, every: int | str) -> bool:
        if every in ("epoch", "never"):
            return every == "epoch" and self.position.cursor.step == 0
        return self.position.step % int(every) == 0

    def _validate(self, *, judged: bool = True) -> bool:
        """Measures, logs and, if `judged`, judges; whether this is the best validation so far."""
        if self.validation is None or self.judges is None:
            return False
        began = time.monotonic()
        metrics = dict(self.validation.measure())
        for name in sorted({self.validation.metric, self.validation.watched} - set(metrics)):
            self.progress.warn(
                f"validation at step {self.position.step}: {name} is not defined on these rows and predictions, so "
                "nothing is judged by it; name another metric in training.metric if this stays"
            )
        better = judged and self.judges.observe(metrics, self.position.step)
        seconds = time.monotonic() - began
        self.position.seconds += seconds
        self._event("validation", {**metrics, "best": better}, {"seconds": seconds})
        self.progress.validation(self.position.step, metrics, better)
        return better

    def _reason_to_end(self, signals: StopSignals) -> str | None:
        # A signal may have reached one rank alone, and clocks differ; all ranks must stop at the same step.
        limit = self.settings.max_time
        late = limit is not None and self.position.seconds >= limit
        gathered = self.world.gather((signals.received, late))
        told = [entry for entry in gathered if isinstance(entry, tuple)]
        received = [name for name, _ in told if name is not None]
        if received:
            return str(received[0])
        if self.position.step >= self.total_steps:
            return "max_steps" if self.total_steps == self.settings.max_steps else "epochs"
        return "max_time" if told[0][1] else None

    def _save(self, is_best: bool) -> None:
        began = time.monotonic()
        self.state.save(
            self.log.offset() if self.log is not None else 0,
            is_best=is_best,
            keep_last=self.settings.keep_last,
            keep_best=self.settings.keep_best,
        )
        seconds = time.monotonic() - began
        self.position.seconds += seconds
        self._event("checkpoint", {"is_best": is_best}, {"seconds": seconds})

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        for line in self.state.restore(found):
            self.progress.warn(line)
        position, unfreeze_step = self.position, self.settings.unfreeze_step
        if self.unfreeze is not None and unfreeze_step is not None and position.step > unfreeze_step:
            self.unfreeze()
        if position.stopped_by is not None and not self._still_ends(position.stopped_by):
            self.progress.say(f"the run had ended ({position.stopped_by}); with these settings it goes on")
            position.stopped_by = None
        elif position.stopped_by is None and position.step >= self.total_steps:
            position.concluded = False

    def _still_ends(self, reason: str) -> bool:
        """Whether the reason that ended a run still ends it under the settings it is resumed with."""
        if reason == "max_time":
            return self.settings.max_time is not None and self.position.seconds >= self.settings.max_time
        if reason == "early stopping":
            return self.judges is not None and self.judges.gives_up
        return self.position.step >= self.total_steps

    def _last_saved(self) -> str:
        whole, _ = checkpoint.newest_whole(self.state.folder)
        return f"the checkpoint of step {whole.step} is whole" if whole else "there is no checkpoint yet"

    def _event(self, kind: str, metrics: Mapping[str, JSON], timing: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(kind, step=self.position.step, metrics=metrics, timing=timing)


def total_steps(settings: TrainingSection, steps_an_epoch: int) -> int:
    """Optimizer steps of a whole run: epochs × steps an epoch, or `max_steps` where that is less."""
    planned = settings.num_epochs * steps_an_epoch
    return planned if settings.max_steps is None else min(planned, settings.max_steps)
