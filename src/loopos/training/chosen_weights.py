"""Which weights of a finished run are exported, for every method alike.

Enters: the trained weights, the run's folder and its result. Leaves: the weights loaded, a sentence, and an event
"export" by which reports name them. Left out: writing the model.
"""

from __future__ import annotations

from pathlib import Path

from loopos.config.sections import TrainingSection
from loopos.storage.durable import JSON
from loopos.training.callbacks import Callbacks
from loopos.training.distributed import World
from loopos.training.events import EventLog
from loopos.training.fit_result import FitResult
from loopos.training.progress import RunProgress
from loopos.training.trained_weights import TrainedWeights


def take_chosen(
    trained: TrainedWeights,
    run_dir: Path,
    settings: TrainingSection,
    result: FitResult,
    world: World,
    progress: RunProgress,
    *,
    callbacks: Callbacks,
    of_round: int | None = None,
    whole_run: Path | None = None,
) -> None:
    """Loads the best checkpoint's weights, or leaves the last in place where none was kept; says which. To be called on
    every process; the first writes the event. of_round: the round of self-improvement whose folder `run_dir` is, and
    whole_run: the folder of the run that has several, whose log names the round.
    """
    step = trained.take_best(run_dir, settings)
    kind, sentence = _described(step, result)
    progress.say(f"exporting {sentence}" + ("" if of_round is None else f", of round {of_round}"))
    if not world.is_first:
        return
    taken = result.step if step is None else step
    logs: dict[Path, dict[str, JSON]] = {run_dir: {"weights": kind}}
    if whole_run is not None and of_round:
        logs[whole_run] = {"weights": kind, "round": of_round}
    for folder, metrics in logs.items():
        with EventLog(folder / "events.jsonl", callbacks or None) as log:
            log.write("export", step=taken, metrics=metrics, timing={})


def _described(step: int | None, result: FitResult) -> tuple[str, str]:
    """Kind and description of the weights of `step`, None for the last."""
    if step is None:
        reason = "" if result.best_trained_step is None else ": no checkpoint of the best validation was kept"
        return "last", f"the last weights{reason}"
    if step == 0:
        return "start", "the weights of the start (step 0): training did not beat them"
    if result.beat_start is False:
        return "best trained", f"the weights of step {step}, the best after the start: training did not beat the start"
    return "best", f"the best weights, of step {step}"
