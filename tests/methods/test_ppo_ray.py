"""PPO with real workers of Ray, each run in a process of its own: the run of the engine at hand, one of them killed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from environment_runs import played_config, save_actor
from online_runs import online_config
from preference_runs import events_of, ppo_config
from ray_runs import run_with_ray

from loopos.evaluation.sandbox import missing
from loopos.methods.ppo import PpoTrainer
from loopos.training.progress import RunProgress

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (extra cluster)"),
]


@pytest.mark.parametrize("killed_at", [0, 4])
def test_two_workers_equal_the_local_engine(killed_at: int, tmp_path: Path, pico_folder: Path) -> None:
    training = {"batch_size": 8, "trainable": "lora" if killed_at else "all", "learning_rate": 1e-2}
    configs = {
        engine: ppo_config(
            tmp_path / engine,
            pico_folder,
            functions=["preference_runs:early_letters"],
            training=training,
            rollout={"engine": engine},
        )
        for engine in ("local", "ray")
    }
    PpoTrainer(configs["local"], progress=RunProgress(quiet=True)).train()
    summary = run_with_ray(configs["ray"], killed_at=killed_at)
    for kind, number in {"rollout": 3, "step": 12}.items():
        local, remote = (events_of(tmp_path / engine, kind) for engine in ("local", "ray"))
        assert len(local) == len(remote) == number
        for one, other in zip(local, remote, strict=True):
            assert other == pytest.approx(one, abs=1e-6)
    lost = [line for line in summary if " is lost (" in line]
    assert len(lost) == (killed_at > 0)
    if killed_at:
        assert ": its 4 prompts go to others; worker 2 is started as replacement" in lost[0]
        timing = [json.loads(line) for line in (tmp_path / "ray" / "events.jsonl").read_text().splitlines()]
        redone = [event["timing"]["redone"] for event in timing if event["event"] == "rollout"]
        # Which iteration has the fourth order depends on how soon the second worker is there.
        assert sorted(redone) == [0, 0, 4]


contained = pytest.mark.skipif(bool(missing()), reason=f"no containment on this system: {missing()}")


@pytest.mark.parametrize("kind", ["group", "environment", pytest.param("contained environment", marks=contained)])
def test_groups_and_episodes_equal_those_of_the_local_engine(kind: str, tmp_path: Path, pico_folder: Path) -> None:
    weights = save_actor(tmp_path / "actor", pico_folder)
    training = {"max_iterations": 3, "learning_rate": 1e-2, "log_rollouts": 12}
    for engine in ("local", "ray"):
        (tmp_path / engine).mkdir()
        make: Any = online_config if kind == "group" else played_config
        # In threads here, in processes of the workers there.
        more = {"environment": {"isolation": "process"}} if kind.startswith("contained") and engine == "ray" else {}
        config = make(tmp_path / engine / "run", weights, "grpo", rollout={"engine": engine}, training=training, **more)
        if engine == "local":
            PpoTrainer(config, progress=RunProgress(quiet=True)).train()
        else:
            run_with_ray(config)
    for event in ("rollout", "step"):
        local, remote = (events_of(tmp_path / engine / "run", event) for engine in ("local", "ray"))
        assert len(local) == len(remote) > 0
        for one, other in zip(local, remote, strict=True):
            assert other == pytest.approx(one, abs=1e-6)
    one, other = ((tmp_path / engine / "run" / "rollouts.jsonl").read_text() for engine in ("local", "ray"))
    assert [json.loads(line)["response"] for line in one.splitlines()] == [
        json.loads(line)["response"] for line in other.splitlines()
    ]


def test_with_an_older_policy_it_still_learns(tmp_path: Path, pico_folder: Path) -> None:
    training = {"batch_size": 32, "max_iterations": 16, "learning_rate": 2e-2, "schedule": "constant"}
    config = ppo_config(
        tmp_path / "run",
        pico_folder,
        functions=["preference_runs:early_letters"],
        training=training,
        rollout={"engine": "ray", "max_staleness": 1},
    )
    run_with_ray(config)
    rewards = [event["reward"] for event in events_of(tmp_path / "run", "rollout")]
    assert len(rewards) == 16
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2
