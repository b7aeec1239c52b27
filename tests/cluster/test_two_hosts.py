"""A run over two hosts, undisturbed and with a pulled cable: both hosts end with a reason, and the resumed run equals the
uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from two_hosts import Cluster, Host, missing, two_hosts

from loopos.storage.events import read

pytestmark = pytest.mark.cluster

TESTS = Path(__file__).parents[1]
WORDS = ("lamp", "river", "stone", "cloud", "green", "seven")
# Each way to share a model among hosts, as its keys under `distributed`.
MODES: dict[str, dict[str, Any]] = {"replicate": {"mode": "replicate"}, "shard": {"mode": "shard"}}
# Seconds. What trains ends after a silence, and has some more on a busy machine.
SILENCE, CUT, ENDING = 6.0, 60.0, 30.0
LIMIT = 900.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with two_hosts() as hosts:
        yield hosts


def fine_tuning(folder: Path, weights: Path) -> dict[str, Any]:
    """500 optimizer steps over 16 rows each."""
    rows = [{"text": " ".join(WORDS[(i + j) % 6] for j in range(3 + i % 5)), "label": i % 2} for i in range(800)]
    data = {"training_data": write_rows(folder / "rows.jsonl", rows), "validation_share": 0.0}
    training = {"learning_rate": 1e-3, "optimizer": "adamw", "batch_size": 8, "num_epochs": 10, "save_every": 50}
    return config(folder, weights, "fine_tuning", training, data)


def ppo(folder: Path, weights: Path) -> dict[str, Any]:
    """40 iterations of two optimizer steps."""
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": " ".join(WORDS[i % 6 :])} for i in range(12)])
    data = {"prompts": prompts, "validation_share": 0.0}
    sizes = {"batch_size": 6, "inner_epochs": 2, "minibatches": 1, "max_iterations": 40, "num_epochs": 100}
    training = {"learning_rate": 1e-3, **sizes, "value_model": "shared", "validate_every": "never", "save_every": 8}
    rest = {"reward": {"functions": [{"name": "preference_runs:length_of"}]}, "generation": {"max_new_tokens": 8}}
    return {**config(folder, weights, "ppo", training, data), **rest}


def config(folder: Path, weights: Path, method: str, training: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    return {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"precision": "fp32", "device": "cpu", "seed": 5, **training},
        "data": {"pretrained_weights": str(weights), **data},
    }


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def steps_of(run: Path) -> list[dict[str, Any]]:
    if not (run / "events.jsonl").exists():
        return []
    return [event["metrics"] for event in read(run / "events.jsonl") if event["event"] == "step"]


def digests(run: Path) -> dict[str, str]:
    files = sorted((run / "model").glob("*.safetensors"))
    assert files, f"{run} has no model"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Run:
    """One run on the cluster. `summary`: by host."""

    def __init__(self, cluster: Cluster, folder: Path, chosen: dict[str, Any], rendezvous: str) -> None:
        self.cluster, self.folder, self.rendezvous = cluster, folder, rendezvous
        chosen["data"]["output_dir"] = str(folder)
        self.config = folder.parent / f"{folder.name}.json"
        self.config.write_text(json.dumps(chosen), encoding="utf-8")
        self.logs = folder.parent / f"{folder.name}-logs"
        self.logs.mkdir()

    def start(self, *words: str) -> None:
        self.launchers = self.cluster.torchrun(self.logs, self.rendezvous, "train", str(self.config), "--quiet", *words)

    @property
    def summary(self) -> dict[str, str]:
        return {host.name: (self.logs / host.name).read_text(encoding="utf-8") for host in self.cluster.hosts}

    def wait_for_step(self, step: int) -> None:
        begun = time.monotonic()
        while len(steps_of(self.folder)) < step:
            assert all(launcher.poll() is None for launcher in self.launchers), self.summary
            assert time.monotonic() - begun < LIMIT, self.summary
            time.sleep(0.05)

    def end(self) -> None:
        assert [launcher.wait(timeout=LIMIT) for launcher in self.launchers] == [0, 0], self.summary


def of_two_hosts(
    cluster: Cluster, method: Any, mode: str, folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The config of a method on these hosts, whose processes find the reward functions of the tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS / "methods"), os.environ.get("PYTHONPATH", "")]))
    return {**method(folder, weights), "distributed": {"silence": SILENCE, "timeout": 120, **MODES[mode]}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("method", "cut_at", "rendezvous"), [(fine_tuning, 200, "static"), (ppo, 30, "static"), (fine_tuning, 200, "c10d")]
)
def test_a_pulled_cable_ends_both_hosts_and_the_resumed_run_equals_the_uninterrupted_one(
    method: Any,
    cut_at: int,
    rendezvous: str,
    mode: str,
    cluster: Cluster,
    pico_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = of_two_hosts(cluster, method, mode, tmp_path, pico_folder, monkeypatch)
    whole = Run(cluster, tmp_path / "whole", chosen, rendezvous)
    whole.start()
    whole.end()

    cut = Run(cluster, tmp_path / "cut", chosen, rendezvous)
    cut.start()
    cut.wait_for_step(cut_at)
    cluster.pull_cable()
    pulled = time.monotonic()
    ended = cluster.wait_until_ended(Host.trainers, ENDING)
    if rendezvous == "static":
        # With c10d torchrun's own launcher asks a store that it cannot reach, until the network is back.
        cluster.wait_until_ended(Host.processes, ENDING)
    done = len(steps_of(cut.folder))
    print(f"{method.__name__}, {mode}, {rendezvous}: cut at step {done}, ended after {ended} s")
    print(
        "\n".join(line for summary in cut.summary.values() for line in summary.splitlines() if line.startswith("rank "))
    )
    assert cut_at <= done < len(steps_of(whole.folder)), "the cable was to be pulled in the middle"
    assert f"rank 1 on {cluster.second.name} has sent no heartbeat for" in cut.summary[cluster.first.name]
    place = f"rank 1 on {cluster.second.name}: the store at {cluster.first.address} has not"
    assert place in cut.summary[cluster.second.name]

    time.sleep(max(0.0, pulled + CUT - time.monotonic()))
    cluster.plug_cable()
    assert 0 not in [launcher.wait(timeout=LIMIT) for launcher in cut.launchers]
    cut.start("--resume")
    cut.end()
    assert digests(cut.folder) == digests(whole.folder)
    assert steps_of(cut.folder) == steps_of(whole.folder)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_dies_is_named_by_the_other(
    lost: int, mode: str, cluster: Cluster, pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host takes the store with it: what is left to name is its address."""
    run = Run(
        cluster,
        tmp_path / "run",
        of_two_hosts(cluster, fine_tuning, mode, tmp_path, pico_folder, monkeypatch),
        "static",
    )
    run.start()
    run.wait_for_step(100)
    dead, left = cluster.hosts[lost], cluster.hosts[1 - lost]
    dead.die()
    ended = cluster.wait_until_ended(Host.trainers, ENDING)
    cluster.wait_until_ended(Host.processes, ENDING)
    print(f"{dead.name} dies: ended after {ended} s")
    named = f"rank {lost} on {dead.name} has sent no heartbeat" if lost else f"the store at {dead.address}"
    assert named in run.summary[left.name]
