"""Run folders for the board, written as runs write them: by `EventLog`, with a config of the method's own class."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loopos.storage.events import EventLog

BEGAN = 1_790_000_000.0
CONFIG: dict[str, Any] = {
    "computation": {"mode": "posttraining", "method": "sft"},
    "training": {"learning_rate": 1e-4, "batch_size": 8, "max_steps": 100},
    "data": {"pretrained_weights": "smollm2-135m", "training_data": "rows.jsonl", "output_dir": "outputs/run"},
}


def config_of(**changed: Any) -> dict[str, Any]:
    """A config with some values of its sections changed: `training={"batch_size": 4}`."""
    return {section: {**values, **changed.get(section, {})} for section, values in CONFIG.items()}


def loss_at(step: int) -> float:
    return 2.0 * math.exp(-step / 40) + 0.5 + 0.05 * math.sin(step)


class RunWriter:
    """Writes the events of a run, a second apart."""

    def __init__(self, folder: Path, config: Mapping[str, Any] = CONFIG, *, total_steps: int = 100) -> None:
        self.folder, self.config, self.total_steps = folder, config, total_steps
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        self.log = EventLog(folder / "events.jsonl")
        self.time = BEGAN

    def write(
        self, kind: str, step: int, metrics: Mapping[str, Any], timing: Mapping[str, float] | None = None
    ) -> None:
        self.time += 1.0
        self.log.write(kind, step=step, metrics=metrics, timing={**(timing or {}), "time": self.time})

    def session(self, step: int = 0, **more: Any) -> None:
        settings = {"total_steps": self.total_steps, "resumed": step > 0, "changed": {}, "settings": self.config}
        self.write("session", step, {**settings, "judged_by": {"metric": "loss", "mode": "min"}, **more})

    def steps(self, first: int, last: int, loss: Callable[[int], float] = loss_at) -> None:
        for step in range(first, last + 1):
            metrics = {"loss": loss(step), "learning_rate": 1e-4, "tokens": 100 * step, "rows": 8 * step, "skipped": 0}
            self.write("step", step, metrics, {"seconds": 0.9, "tokens_per_second": 111.0})

    def validation(self, step: int, loss: float, *, best: bool = False) -> None:
        self.write("validation", step, {"loss": loss, "best": best, "best_trained": best})

    def rollout(self, step: int, iteration: int, **more: float) -> None:
        metrics = {
            "iteration": iteration,
            "reward": 0.1 * iteration,
            "score_model": 0.1 * iteration,
            "kl": 0.2 * iteration,
        }
        metrics |= {
            "entropy": 2.0,
            "response_length": 18.5,
            "eos_rate": 0.9,
            "no_signal": 0.25,
            "explained_variance": 0.1,
        }
        self.write("rollout", step, {**metrics, **more})

    def end(self, step: int, stopped_by: str = "max_steps") -> None:
        self.write("end", step, {"stopped_by": stopped_by})
        self.close()

    def close(self) -> None:
        self.log.close()


def finished_run(folder: Path, **changed: Any) -> RunWriter:
    """A run of supervised fine-tuning that has ended, with a resume, a checkpoint, an alert and validations."""
    run = RunWriter(folder, config_of(**changed))
    run.session()
    run.validation(0, 2.5)
    run.steps(1, 50)
    run.write("checkpoint", 50, {"name": "step-00000050"})
    run.validation(50, 1.2, best=True)
    run.session(50)
    run.steps(51, 100)
    run.write("alert", 80, {"name": "loss", "value": 9.0, "limit": 3.0, "message": "loss above its limit"})
    run.validation(100, 0.9, best=True)
    run.end(100)
    return run


def policy_run(folder: Path) -> RunWriter:
    """A run of PPO that no process writes any more, with rollouts, best of n and answers."""
    run = RunWriter(folder, config_of(computation={"method": "ppo"}))
    run.session(iterations=50)
    for n, reward in ((1, 0.0), (4, 1.0), (16, 1.6)):
        run.write("best_of_n", 0, {"n": n, "kl": math.log(n) - (n - 1) / n, "reward": reward})
    noise = random.Random(0)
    for iteration in range(40):
        reward = 2 * (1 - math.exp(-iteration / 15)) + noise.gauss(0, 0.05)
        kl = 0.2 * iteration + noise.uniform(0, 0.1)
        run.rollout(2 * iteration, iteration, reward=reward, kl=kl, entropy=2 - 0.02 * iteration + noise.gauss(0, 0.02))
        for step in (2 * iteration + 1, 2 * iteration + 2):
            run.write(
                "step", step, {"policy_loss": -0.01 * step, "clip_share": 0.1, "entropy": 2.0, "tokens": 50 * step}
            )
    write_answers(run.folder)
    run.close()
    return run


def write_answers(folder: Path, texts: Iterator[str] | None = None) -> None:
    """`samples.jsonl` of two prompts at three steps, with rewards from 0 to 1."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for step in (0, 40, 80):
            for number, prompt in enumerate(("Where is my parcel?", "Cold food again.")):
                text = next(texts) if texts is not None else f"answer {number} at {step}"
                answer = {
                    "step": step,
                    "prompt": prompt,
                    "response": text,
                    "ended": True,
                    "reward": step / 80 - number / 4,
                }
                file.write(json.dumps(answer) + "\n")
