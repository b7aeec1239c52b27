"""One process and two are the same run, for reward models and for PPO."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from preference_runs import comparisons, events_of, ppo_config, reward_config, write_rows

from loopos.methods.ppo import PpoTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.training.progress import RunProgress

ONE_RUN = """
import json, sys
from loopos.methods.table import METHODS, config_classes, method_class
from loopos.training.progress import RunProgress

mode, method, config = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
chosen = config_classes()[mode, method].model_validate(config)
method_class(mode, method)(chosen, progress=RunProgress(quiet=True), trust_remote_code=False, environment={}).train()
"""


def run_two_processes(config: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }
    chosen = config.computation
    arguments = [sys.executable, "-c", ONE_RUN, chosen.mode, chosen.method, json.dumps(config.model_dump(mode="json"))]
    processes = [
        subprocess.Popen(arguments, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]


@pytest.mark.slow
def test_reward_models(tmp_path: Path, pico_folder: Path) -> None:
    for name, training in {"one": {"batch_size": 8}, "two": {"batch_size": 4}}.items():
        chosen = {"optimizer": "sgd", "learning_rate": 0.1, "num_epochs": 2, **training}
        config = reward_config(tmp_path / name, pico_folder, training=chosen)
        if name == "one":
            RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
        else:
            run_two_processes(config)
    one, two = (events_of(tmp_path / name, "step") for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-5)
        assert theirs["pair_accuracy"] == pytest.approx(mine["pair_accuracy"])
    assert events_of(tmp_path / "two", "validation")[-1] == pytest.approx(
        events_of(tmp_path / "one", "validation")[-1], abs=1e-4
    )


def test_ppo(tmp_path: Path, pico_folder: Path) -> None:
    functions = ["preference_runs:early_letters", "preference_runs:length_of"]
    for name, size in {"one": 8, "two": 4}.items():
        training = {"batch_size": size, "max_iterations": 2, "optimizer": "sgd", "learning_rate": 0.05}
        config = ppo_config(tmp_path / name, pico_folder, functions=functions, training=training)
        if name == "one":
            PpoTrainer(config, progress=RunProgress(quiet=True)).train()
        else:
            run_two_processes(config)
    for kind, number in {"step": 8, "rollout": 2}.items():
        one, two = (events_of(tmp_path / name, kind) for name in ("one", "two"))
        assert len(one) == len(two) == number
        for mine, theirs in zip(one, two, strict=True):
            assert theirs == pytest.approx(mine, abs=1e-5)


@pytest.mark.slow
def test_both_phases_by_torchrun(tmp_path: Path, pico_folder: Path) -> None:
    """The processes join once a phase."""
    write_rows(tmp_path / "rows.jsonl", comparisons(20))
    training = {"learning_rate": 1e-3, "batch_size": 4, "num_epochs": 1, "inner_epochs": 1, "precision": "fp32"}
    config = {
        "computation": {"mode": "posttraining", "method": "rlhf"},
        "training": {**training, "device": "cpu"},
        "generation": {"max_new_tokens": 4},
        "data": {"pretrained_weights": str(pico_folder), "preference_data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run")},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, "-m", "loopos", "train", str(tmp_path / "config.json")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    # 18 of 20 comparisons train, 8 a step over both processes.
    assert len(events_of(tmp_path / "run" / "reward_model", "step")) == len(events_of(tmp_path / "run", "rollout")) == 3
    assert (tmp_path / "run" / "model" / "loopos.json").is_file()
