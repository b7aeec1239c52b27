"""One process and two are the same run, for reward models and for PPO."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from own_packages import installed
from preference_runs import comparisons, events_of, ppo_config, reward_config, write_rows
from worlds import run_world

from loopos.methods.ppo import PpoTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.training.progress import RunProgress


@pytest.mark.slow
def test_reward_models(tmp_path: Path, pico_folder: Path) -> None:
    for name, training in {"one": {"batch_size": 8}, "two": {"batch_size": 4}}.items():
        chosen = {"optimizer": "sgd", "learning_rate": 0.1, "num_epochs": 2, **training}
        config = reward_config(tmp_path / name, pico_folder, training=chosen)
        if name == "one":
            RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
        else:
            run_world(2, [(config, False)])
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
            run_world(2, [(config, False)])
    for kind, number in {"step": 8, "rollout": 2}.items():
        one, two = (events_of(tmp_path / name, kind) for name in ("one", "two"))
        assert len(one) == len(two) == number
        for mine, theirs in zip(one, two, strict=True):
            assert theirs == pytest.approx(mine, abs=1e-5)


@pytest.mark.slow
def test_groups_without_a_critic(tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's responses are written by both processes, and compared with each other all the same."""
    with installed(tmp_path / "site", Path(__file__).parents[1] / "plugin_package", "own_variants", monkeypatch):
        algorithm = "own_variants.algorithms:group_reinforce"
        for name, size in {"one": 8, "two": 4}.items():
            training = {"batch_size": size, "max_iterations": 2, "optimizer": "sgd", "learning_rate": 0.05}
            config = ppo_config(
                tmp_path / name,
                pico_folder,
                functions=["preference_runs:length_of"],
                training={**training, "algorithm": algorithm, "kl_coefficient": 0.0, "whiten_advantages": False},
                generation={"max_new_tokens": 8, "responses_per_prompt": 2},
            )
            if name == "one":
                PpoTrainer(config, progress=RunProgress(quiet=True)).train()
            else:
                run_world(2, [(config, False)])
        for kind, number in {"step": 8, "rollout": 2}.items():
            one, two = (events_of(tmp_path / name, kind) for name in ("one", "two"))
            assert len(one) == len(two) == number
            for mine, theirs in zip(one, two, strict=True):
                assert theirs == pytest.approx(mine, abs=1e-5)
        assert any(abs(event["policy_loss"]) > 1e-3 for event in events_of(tmp_path / "one", "step"))


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
