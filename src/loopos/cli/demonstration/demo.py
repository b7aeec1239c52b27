"""`loopos demo`: real trainings of a real model on packaged data, one act a method.

Enters: nothing. Leaves: run folders in outputs/demo/, and what each act shows. An act reads its config from the package
(`loopos/demo/*.json`, the same as `configs/demo/*.json`) and does with it what the commands do. To add an act, add a
file `demo_NAME.py` with a function, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loopos.cli.answers import say
from loopos.cli.demonstration.demo_fine_tuning import fine_tuning
from loopos.cli.demonstration.demo_preferences import preferences
from loopos.cli.demonstration.demo_reasoning import chain_of_thought
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.models.gguf import cache_folder
from loopos.models.sources import embedded_model


@dataclass(frozen=True, slots=True)
class Act:
    """One part of the demo: its title, and what it does; 0 when it went to its end."""

    title: str
    perform: Callable[[], int]


ACTS = (
    Act("fine-tuning: ten intents of customer messages", fine_tuning),
    Act("chain of thought: last letters, coin flips, additions", chain_of_thought),
    Act("preferences: a reward model, then PPO", preferences),
)


def run(*, verbose: bool) -> int:
    """Performs the acts in order; ends at the first that did not go to its end. Raises `UserError`."""
    hush_libraries(verbose=verbose)
    embedded_model()
    restart_with_settings()
    if not any((cache_folder() / "gguf").glob("*/config.json")):
        note("the embedded model is converted first, once: about half a minute")
    for number, act in enumerate(ACTS, start=1):
        say(f"act {number} of {len(ACTS)}: {act.title}")
        code = act.perform()
        if code:
            return code
    return 0
