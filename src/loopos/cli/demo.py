"""`loopos demo`: real trainings of a real model on packaged data, one act a method.

Enters: nothing. Leaves: run folders in outputs/demo/, and what each act shows. An act reads its config from the package
(`loopos/demo/*.json`, the same as `configs/demo/*.json`) and does with it what the commands do. To add an act, add a
function and a row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from loopos.cli.answers import as_time, confusion_table, say, table
from loopos.cli.demo_reasoning import chain_of_thought
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.train import TrainOptions, exit_code, train
from loopos.config.load import load
from loopos.evaluation.run_folder import Run, holds_run, read_run
from loopos.methods.table import config_classes
from loopos.models.gguf import cache_folder
from loopos.models.sources import embedded_model

PACKAGE = "loopos.demo"


@dataclass(frozen=True, slots=True)
class Act:
    """One part of the demo: its title, and what it does; 0 when it went to its end."""

    title: str
    perform: Callable[[], int]


def run(*, verbose: bool) -> int:
    """Performs the acts in order; ends at the first that did not go to its end. Raises `UserError`."""
    hush_libraries(verbose=verbose)
    embedded_model()
    restart_with_settings()
    if not any((cache_folder() / "gguf").glob("*/config.json")):
        note("the embedded model is converted first, once: about half a minute")
    acts = (
        Act("fine-tuning: ten intents of customer messages", fine_tuning),
        Act("chain of thought: last letters, coin flips, additions", chain_of_thought),
    )
    for number, act in enumerate(acts, start=1):
        say(f"act {number} of {len(acts)}: {act.title}")
        code = act.perform()
        if code:
            return code
    return 0


def fine_tuning() -> int:
    """Trains, then shows accuracy before and after, the confusion table, and predictions of messages never seen."""
    began = time.monotonic()
    with ExitStack() as stack:
        config, live = packaged(stack, "fine_tuning.json", "intents_live.txt")
        result = train(config, TrainOptions())
    if result.interrupted:
        return exit_code(result.stopped_by)
    folder = Path(config.data.output_dir)
    show(read_run(folder))
    predict_live(folder, live)
    say(f"wall time {as_time(time.monotonic() - began)}; the run is in {folder} ({folder}/report.md tells it)")
    return 0


def packaged(stack: ExitStack, config_name: str, live_name: str) -> tuple[Any, list[str]]:
    """A packaged config with its data's true paths and a folder that no run holds yet, and the live messages."""
    place = files(PACKAGE)
    path = stack.enter_context(as_file(place / config_name))
    written = json.loads(path.read_text(encoding="utf-8"))
    folder = fresh_folder(Path(written["data"]["output_dir"]))
    overrides = [f"data.output_dir={json.dumps(str(folder))}"]
    for key in ("training_data", "validation_data"):
        file = stack.enter_context(as_file(place / Path(written["data"][key]).name))
        overrides.append(f"data.{key}={json.dumps(str(file))}")
    config = load(path, overrides, config_classes()).config
    return config, (place / live_name).read_text(encoding="utf-8").splitlines()


def fresh_folder(folder: Path) -> Path:
    """`folder`, or with the first number from 2 that makes it new: no run is overwritten."""
    number, fresh = 1, folder
    while holds_run(fresh):
        number += 1
        fresh = folder.with_name(f"{folder.name}-{number}")
    return fresh


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
