"""PPO with remote rollout workers: the same run as with the local engine, bit-exact resume, and older policies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fake_workers import FakeWorkers
from killed_runs import digest
from pico_runs import slow_but
from preference_runs import early_letters, events_of, ppo_config

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.ppo import PpoConfig
from loopos.methods.ppo import PpoTrainer
from loopos.rl.workers import opening
from loopos.rl.workers.worker import RolloutWorker
from loopos.storage.events import fingerprint
from loopos.training.progress import RunProgress

EARLY = "preference_runs:early_letters"


@dataclass
class Fakes:
    """The workers that runs made, and how those of the next run behave."""

    made: list[FakeWorkers] = field(default_factory=list)
    behave: Callable[[int, int], str | float] = lambda worker, order: "answer"

    def transport(self, recipe: Any, section: Any) -> FakeWorkers:
        self.made.append(FakeWorkers(lambda: RolloutWorker(recipe).write, self.behave))
        return self.made[-1]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Workers in this process, with models of their own, instead of Ray."""
    found = Fakes()
    monkeypatch.setattr(opening, "RayTransport", found.transport)
    monkeypatch.setattr(opening, "find_spec", lambda name: name)
    # What is exported is in the checkpoints too, and its report with curves takes longer than these runs.
    monkeypatch.setattr(PpoTrainer, "export", lambda self: None)
    return found


def trained(config: PpoConfig, *, resume: bool = False) -> PpoTrainer:
    method = PpoTrainer(config, progress=RunProgress(quiet=True))
    method.train(resume=resume)
    return method


def staler_config(run: Path, weights: Path, **sections: Any) -> PpoConfig:
    training = {"learning_rate": 1e-2, "max_iterations": 4, "save_every": 1, **sections.pop("training", {})}
    rollout = {"engine": "ray", "max_staleness": 1, **sections.pop("rollout", {})}
    return ppo_config(run, weights, functions=[EARLY], training=training, rollout=rollout, **sections)


@pytest.mark.parametrize("trainable", slow_but("lora", ["all", "lora"]))
def test_without_staleness_the_run_equals_that_of_the_local_engine(
    trainable: str, fakes: Fakes, tmp_path: Path, pico_folder: Path
) -> None:
    """Two workers, one of which dies in the middle, and validation between: the same tokens, so the same numbers."""
    fakes.behave = lambda worker, order: "die" if (worker, order) == (1, 2) else "answer"
    training = {"trainable": trainable, "validate_every": 1, "learning_rate": 1e-2, "save_every": "never"}
    data = {"validation_share": 0.4}
    for engine in ("local", "ray"):
        trained(
            ppo_config(
                tmp_path / engine,
                pico_folder,
                functions=[EARLY],
                training=training,
                data=data,
                rollout={"engine": engine},
                evaluation={"best_of": [2]},
            )
        )
    for kind, number in {"rollout": 3, "step": 12, "validation": 4, "best_of_n": 2}.items():
        local, remote = (events_of(tmp_path / engine, kind) for engine in ("local", "ray"))
        assert len(local) == len(remote) == number
        for one, other in zip(local, remote, strict=True):
            assert other == pytest.approx(one, abs=1e-6)
    samples = [(tmp_path / engine / "samples.jsonl").read_text().splitlines() for engine in ("local", "ray")]
    assert len(samples[0]) == len(samples[1]) > 0
    (workers,) = fakes.made
    assert workers.closed
    # Of the iterations and validations each version was sent once, whole or as an adapter alone.
    assert workers.published == [0, 4, 8, 12]
    (last,) = workers.weights.values()
    size = sum(file.stat().st_size for file in pico_folder.glob("*.safetensors"))
    assert len(last) < size / 2 if trainable == "lora" else len(last) > 0.9 * size


@pytest.mark.slow
def test_an_older_policy_is_what_the_ratio_is_held_against(fakes: Fakes, tmp_path: Path, pico_folder: Path) -> None:
    trained(staler_config(tmp_path / "run", pico_folder))
    rollouts, steps = events_of(tmp_path / "run", "rollout"), events_of(tmp_path / "run", "step")
    assert [rollout.get("staleness", 0.0) for rollout in rollouts] == [0, 1, 1, 1]
    assert len(steps) == 16
    # The first minibatch of the first iteration is by the policy itself, that of later ones by the one before.
    assert steps[0]["ratio"] == 1.0
    assert steps[0]["approximate_kl"] == 0.0
    for first in (4, 8, 12):
        assert steps[first]["approximate_kl"] > 1e-4
    assert fakes.made[0].published == [0, 4, 8]


def test_with_a_cap_the_ratio_is_to_the_policy_itself_and_tokens_are_weighed(
    fakes: Fakes, tmp_path: Path, pico_folder: Path
) -> None:
    trained(staler_config(tmp_path / "run", pico_folder, rollout={"importance_cap": 1.05}))
    rollouts, steps = events_of(tmp_path / "run", "rollout"), events_of(tmp_path / "run", "step")
    assert [step["ratio"] for step in steps[::4]] == [1.0] * 4
    assert rollouts[0]["importance_weight"] == pytest.approx(1.0, abs=1e-5)
    assert rollouts[0]["importance_truncated"] == 0.0
    for rollout in rollouts[1:]:
        assert rollout["importance_truncated"] > 0.1
        assert 0.0 < rollout["importance_weight"] < 1.05


def ended_by_signal(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """`early_letters`, which in the third iteration sends the process a SIGTERM, once."""
    calls.append(len(responses))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return early_letters(prompts, responses)


calls: list[int] = []


def bits_of(run: Path) -> list[str]:
    """SHA-256 of the last checkpoint's tensors, and of all metrics."""
    files = sorted(max((run / "checkpoints").glob("step-*")).glob("*.safetensors"))
    assert len(files) >= 3
    return [fingerprint(run / "events.jsonl"), *map(digest, files)]


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 2.0])
def test_with_staleness_a_resumed_run_is_bit_identical(
    cap: float | None, fakes: Fakes, tmp_path: Path, pico_folder: Path
) -> None:
    """A checkpoint in the third iteration holds the responses of the fourth, which the second policy wrote."""
    bits = {}
    reward = {"functions": [{"name": "test_ppo_workers:ended_by_signal"}]}
    for name in ("whole", "cut"):
        calls[:] = [1] * 3 if name == "whole" else []
        run = tmp_path / name
        config = staler_config(run, pico_folder, rollout={"importance_cap": cap}, reward=reward)
        trained(config)
        if name == "cut":
            assert len(events_of(run, "rollout")) == 3
            trained(config, resume=True)
        bits[name] = bits_of(run)
    assert bits["cut"] == bits["whole"]
    # In the resumed run nothing was left to write.
    assert fakes.made[2].submitted == []


def test_when_all_workers_are_lost_the_run_ends_and_can_be_resumed(
    fakes: Fakes, tmp_path: Path, pico_folder: Path
) -> None:
    config = staler_config(tmp_path / "run", pico_folder, rollout={"restarts": 1})
    fakes.behave = lambda worker, order: "die" if order == 2 or worker == 2 else "answer"
    with pytest.raises(MissingRequirement, match="all rollout workers are lost"):
        trained(config)
    assert fakes.made[0].closed
    assert len(events_of(tmp_path / "run", "rollout")) == 2
    fakes.behave = lambda worker, order: "answer"
    trained(config, resume=True)
    assert len(events_of(tmp_path / "run", "rollout")) == 4


def test_an_adapter_over_other_weights_is_refused(
    fakes: Fakes, tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = opening.recipe_of
    monkeypatch.setattr(opening, "recipe_of", lambda *a, **named: replace(known(*a, **named), fingerprint="other"))
    config = ppo_config(
        tmp_path / "run", pico_folder, functions=[EARLY], training={"trainable": "lora"}, rollout={"engine": "ray"}
    )
    with pytest.raises(UserError, match="found other weights under"):
        trained(config)


def test_without_ray_it_names_what_is_missing(
    tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ppo_config(tmp_path / "run", pico_folder, functions=[EARLY], rollout={"engine": "ray"})
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirement, match=r"needs Ray, which is not installed[\s\S]*\[cluster\]"):
        trained(config)
    assert not (tmp_path / "run").exists()
