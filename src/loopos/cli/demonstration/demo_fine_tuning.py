"""The demo's first act: a classifier of customer messages, trained on packaged messages.

Enters: the packaged config. Leaves: a run folder, and what was learned: accuracy before and after, the confusion table,
predictions of messages never seen. Left out: the other acts (`demo`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from loopos.cli.answers import as_time, confusion_table, say, table
from loopos.cli.demonstration.demo_files import fresh_folder, packaged_config, packaged_lines
from loopos.cli.train import TrainOptions, exit_code, train
from loopos.evaluation.run_folder import Run, read_run

CONFIG, LIVE = "fine_tuning.json", "intents_live.txt"
_FOLDER = Path("outputs/demo/fine_tuning")


def fine_tuning() -> int:
    """Trains, then shows accuracy before and after, the confusion table, and predictions of messages never seen."""
    began = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(fresh_folder(_FOLDER))
        result = train(packaged_config(stack, CONFIG, {"data.output_dir": folder}), TrainOptions())
    if result.interrupted:
        return exit_code(result.stopped_by)
    show(read_run(folder))
    predict_live(folder, packaged_lines(LIVE))
    say(f"wall time {as_time(time.monotonic() - began)}; results in {folder}, summary in {folder}/report.md")
    return 0


def show(run: Run) -> None:
    """Accuracy before and after, and which intents were taken for which."""
    before, after = run.first_metrics["accuracy"], run.last_metrics["accuracy"]
    say(f"accuracy on validation messages: {before:.1%} before, {after:.1%} after {run.step} steps")
    if run.confusion is not None:
        say(confusion_table(*run.confusion))


def predict_live(folder: Path, messages: Sequence[str]) -> None:
    """What the trained model, opened from its folder, says of messages that it never saw."""
    from loopos.evaluation.predictor import Predictor

    answers = Predictor.open(folder).predict(list(messages))
    say("live predictions")
    rows = [
        (answer["label"], f"{max(answer['probabilities'].values()):.0%}", message)
        for answer, message in zip(answers, messages, strict=True)
    ]
    say(table(rows))
