"""What the benches share: cases that take turns, each in a process of its own, and how a case is measured.

Allocator and thread settings are fixed when a process starts, so every case gets one. Cases take turns (A B A B), since a machine's speed drifts. One JSON line a
case and round is printed, then one a case with medians and the ratio of the first case's rate to its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loopos.cli.process import MEMORY_SETTINGS, THREAD_SETTINGS

Cases = Mapping[str, Mapping[str, Any]]
"""The settings of each case by its name; `"allocator": True` gives a peer the settings that LoopOS gives itself."""


def parser(told: str | None, defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The options that every bench has; their defaults from `defaults`."""
    made = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--schedule", default="linear")
    made.add_argument("--child", default="", help=argparse.SUPPRESS)
    for name, value in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", default=value, type=type(value))
    return made


def take_turns(script: str, cases: Cases, options: argparse.Namespace, *, rate: str) -> None:
    """Runs `options.cases` (names with commas between) `options.rounds` times, as children of `script` that get the same
    options, and prints what they measured. rate: the field of which the ratio is made.
    """
    folder_of(options.model)
    names = options.cases.split(",")
    unknown = [name for name in names if name not in cases]
    assert not unknown, f"no case {unknown[0]}; cases: {', '.join(cases)}"
    told = {name: value for name, value in vars(options).items() if name not in ("cases", "rounds", "child")}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in told.items()]
    found: dict[str, list[dict[str, Any]]] = {}
    for _, case in itertools.product(range(options.rounds), names):
        command = [sys.executable, script, "--child", case, *arguments]
        done = subprocess.run(command, env=_environment_of(case, cases), stdout=subprocess.PIPE, check=True)
        line = done.stdout.decode().strip().splitlines()[-1]
        print(line, flush=True)
        found.setdefault(case, []).append(json.loads(line))
    ours = statistics.median(answer[rate] for answer in found[names[0]])
    for case, answers in found.items():
        numbers = [name for name, value in answers[0].items() if isinstance(value, int | float)]
        middle = {name: statistics.median(answer[name] for answer in answers) for name in numbers}
        middle["first_is_faster_by"] = ours / middle[rate]
        print(json.dumps({"case": case, "median": True, **{name: round(value, 4) for name, value in middle.items()}}))


def measured(case: str, run: Callable[[], Mapping[str, Any]]) -> None:
    """A child's end: runs its case and prints what it measured, with the peak of its memory."""
    answer = dict(run())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"case": case, **answer, "peak_gib": peak}), flush=True)


def _environment_of(case: str, cases: Cases) -> dict[str, str]:
    wants = case.startswith("loopos") or cases[case].get("allocator")
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **({**MEMORY_SETTINGS, **THREAD_SETTINGS} if wants else {}), **quiet}


def rate_of(amounts: Iterable[float], seconds: Iterable[float]) -> float:
    """Amount a second over all steps but the first fifth, which warm up."""
    steps = list(zip(amounts, seconds, strict=False))
    timed = steps[max(1, len(steps) // 5) :] or steps
    return sum(amount for amount, _ in timed) / sum(spent for _, spent in timed)


def folder_of(model: str) -> str:
    """The model as a folder that transformers opens."""
    from loopos.models.resolve import resolve

    ref = resolve(model)
    return str(ref.folder or ref.path or model)


def rows_of(file: str) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file. Lines end by line feeds alone: str.splitlines would also cut inside a text."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]


def steps_of(run: str | Path) -> list[dict[str, Any]]:
    """The events of a LoopOS run's steps: `metrics` and `timing`."""
    from loopos.storage.events import read

    return [event for event in read(Path(run) / "events.jsonl") if event["event"] == "step"]


def tokens_of(steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of each step; the events count them from the start."""
    counts = [0, *(step["metrics"]["tokens"] for step in steps)]
    return [after - before for before, after in itertools.pairwise(counts)]


def ends_of(losses: Sequence[float]) -> dict[str, float]:
    """The mean losses of the first and of the last five steps."""
    return {"first_losses": statistics.mean(losses[:5]), "last_losses": statistics.mean(losses[-5:])}


def clock() -> Any:
    """A callback for transformers' trainers; its `seconds` are those of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self._began)

    return Clock()


def trainer_settings(case: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Arguments that every transformers trainer gets here: nothing is saved or reported, each step is logged."""
    import torch

    own = {name: value for name, value in case.items() if name not in ("allocator", "weights", "lora")}
    rate = options.lora_learning_rate if case.get("lora") else options.learning_rate
    return {
        "learning_rate": rate,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": options.warmup,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        **own,
    }


def adapter_of(case: Mapping[str, Any], task: str) -> Any:
    """peft's config of the adapters that LoopOS's LoRA cases train, or None."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task) if case.get("lora") else None
