"""Algorithms without a critic through their real entry point, on the pico model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from killed_runs import NUM_KILLS, check_kills_leave_no_trace
from online_runs import bits_of, online_config, resumed, rows_of, trained
from preference_runs import ASKED, events_of
from safetensors.torch import load_file
from typer.testing import CliRunner
from worlds import run_world

from loopos.cli.commands import app
from loopos.config.methods import ONLINE_METHODS
from loopos.config.rl import CurriculumSection
from loopos.functional.packing import PackedLayout
from loopos.rl.policy_check import passing_metrics
from loopos.rl.prompt_sampling import Curriculum
from loopos.rl.roles import ActorCritic

FAMILY = [name for name in ONLINE_METHODS if name != "ppo"]


def test_a_run_of_dapo_redraws_shares_prompts_and_logs(
    tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither critic nor reference is built; a prompt runs once for its responses; what is counted adds up."""
    layouts: list[PackedLayout] = []
    forward = ActorCritic.forward

    def recorded(self: ActorCritic, ids: Any, layout: PackedLayout, *rest: Any) -> Any:
        layouts.append(layout)
        return forward(self, ids, layout, *rest)

    monkeypatch.setattr(ActorCritic, "forward", recorded)
    training = {"log_rollouts": 5, "inner_epochs": 2, "minibatches": 3, "learning_rate": 3e-2}
    prompts = [f"{text} {number}" for number in range(4) for text in ASKED]
    method = trained(online_config(tmp_path / "run", pico_folder, "dapo", prompts=prompts, training=training))
    assert (method.roles.reference, method.roles.actor_critic.critic) == (None, None)
    assert "one copy of the weights" in method.roles.summary.replace("1 copy", "one copy")
    assert all(layout.segments is not None for layout in layouts)
    rollouts, steps = events_of(tmp_path / "run", "rollout"), events_of(tmp_path / "run", "step")
    assert (len(rollouts), len(steps)) == (3, 3 * 2 * 3)
    for event in rollouts:
        assert event["no_signal"] * 3 == pytest.approx(round(event["no_signal"] * 3))
        assert event["no_signal_left"] <= event["no_signal"]
        assert (event["groups_redrawn"] > 0) == (event["no_signal"] > 0)
        assert event["score_preference_runs:early_letters_std"] > 0
        assert "kl" not in event
    assert sum(event["groups_redrawn"] for event in rollouts) > 0
    for step in steps:
        assert step["clip_share_low"] + step["clip_share_high"] == pytest.approx(step["clip_share"])
    assert sum(step["clip_share"] for step in steps) > 0
    assert steps[0]["ratio"] == 1.0
    logged = rows_of(tmp_path / "run" / "rollouts.jsonl")
    assert [row["iteration"] for row in logged] == [0] * 5 + [1] * 5 + [2] * 5
    assert {"prompt", "response", "reward", "advantage", "tokens", "ended", "step"} <= set(logged[0])
    # The four responses of the first group: advantages against their mean.
    assert sum(row["advantage"] for row in logged[:4]) == pytest.approx(0.0, abs=1e-4)
    timing = [
        json.loads(line)["timing"]
        for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()
        if '"event":"rollout"' in line.replace(" ", "")
    ]
    assert {"seconds", "generation_seconds", "reward_seconds", "forward_seconds"} <= set(timing[0])
    assert timing[1]["update_seconds"] > 0
    assert json.loads((tmp_path / "run" / "model" / "loopos.json").read_text())["method"] == "dapo"


@pytest.mark.parametrize("trainable", ["all", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_shared_prompt_gives_the_losses_of_separate_ones(
    trainable: str, tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients and weights of two iterations, to rounding."""
    found = {}
    for shares in (True, False):
        run = tmp_path / str(shares) / "run"
        run.parent.mkdir()
        with monkeypatch.context() as patched:
            if not shares:
                patched.setattr(ActorCritic, "supports_shared_prompts", False)
            training = {
                "max_iterations": 2,
                "inner_epochs": 2,
                "kl_coefficient": 0.1,
                "trainable": trainable,
                "optimizer": "sgd",
                "learning_rate": 0.1,
            }
            method = trained(online_config(run, pico_folder, "grpo", training=training))
        assert method.share_prompts is shares
        found[shares] = events_of(run, "step"), load_file(run / "model" / "model.safetensors")
        tokens = found[shares][0][-1]["tokens"]
        found[shares] = (*found[shares], tokens)
    assert found[True][2] < found[False][2]
    for ours, theirs in zip(found[True][0], found[False][0], strict=True):
        for name in ("policy_loss", "kl_loss", "entropy", "gradient_norm", "ratio"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    largest = max(float((found[True][1][name] - weight).abs().max()) for name, weight in found[False][1].items())
    assert largest < 1e-5


@pytest.mark.parametrize("dynamic_sampling", [0, 3])
def test_a_forward_pass_that_nothing_reads_is_left_out(
    dynamic_sampling: int, tmp_path: Path, pico_folder: Path
) -> None:
    """A guard of the entropy reads it: the same losses and weights to the bit, and the entropy before each update."""
    found = {}
    for guards in ({}, {"entropy_share": 0.01}):
        run = tmp_path / str(len(guards)) / "run"
        run.parent.mkdir()
        training = {"gradient_accumulation": 2, "dynamic_sampling": dynamic_sampling}
        trained(online_config(run, pico_folder, "grpo", training=training, guards=guards))
        rollouts, steps = events_of(run, "rollout"), events_of(run, "step")
        assert all((name in event) == bool(guards) for event in rollouts for name in ("entropy", "logprob_mismatch"))
        if guards and not dynamic_sampling:
            assert rollouts[0]["entropy"] == pytest.approx(steps[0]["entropy"], rel=1e-5)
        found[bool(guards)] = steps, load_file(run / "model" / "model.safetensors")
    assert found[True][0] == found[False][0]
    assert all(weight.equal(found[True][1][name]) for name, weight in found[False][1].items())


def test_validation_has_pass_at_k(tmp_path: Path, pico_folder: Path) -> None:
    data = {"validation_data": str(tmp_path / "run.jsonl")}
    config = online_config(
        tmp_path / "run", pico_folder, "grpo", data=data, evaluation={"responses": 3},
        training={"max_iterations": 1, "validate_every": 1},
    )  # fmt: skip
    trained(config)
    validations = events_of(tmp_path / "run", "validation")
    assert len(validations) == 2
    for event in validations:
        assert event["pass@1"] == pytest.approx(event["reward"])
        assert event["pass@1"] <= event["pass@2"] <= event["pass@3"]
    samples = rows_of(tmp_path / "run" / "samples.jsonl")
    assert [sample["prompt"] for sample in samples] == [*ASKED, *ASKED]


def test_pass_at_k_by_hand() -> None:
    """Three responses, of which 1, 0 and 3 are right: 1 − C(n − c, 2)/C(n, 2) is 2/3, 0 and 1."""
    found = passing_metrics([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 3)
    assert found == pytest.approx({"pass@1": 4 / 9, "pass@2": 5 / 9, "pass@3": 2 / 3})
    assert passing_metrics([0.5, 1.0], 2) == {}


def test_the_curriculum_prefers_prompts_that_are_solved_sometimes() -> None:
    curriculum = Curriculum(CurriculumSection(floor=0.1), num_prompts=4, seed=1)
    for prompt, scores in {0: [1, 1], 1: [1, 0], 2: [0, 0]}.items():
        curriculum.observe(prompt, scores)
    assert [curriculum.weight(prompt) for prompt in range(4)] == [0.1, 1.0, 0.1, 1.0]
    # Half of the earlier rate and half of the new one.
    curriculum.observe(2, [1.0, 1.0])
    assert curriculum.pass_rates[2] == 0.5
    curriculum.observe(2, [0.0, 0.0])
    assert curriculum.weight(2) == pytest.approx(4 * 0.25 * 0.75)
    again = Curriculum(CurriculumSection(floor=0.1), num_prompts=4, seed=1)
    again.load(json.loads(json.dumps(curriculum.state())))
    draws = [curriculum.choose(iteration, 1)[0] for iteration in range(2000)]
    assert draws == [again.choose(iteration, 1)[0] for iteration in range(2000)]
    shares = [draws.count(prompt) / 2000 for prompt in range(4)]
    assert shares == pytest.approx([0.1 / 2.85, 1 / 2.85, 0.75 / 2.85, 1 / 2.85], abs=0.03)
    assert sorted(curriculum.choose(0, 4)) == [0, 1, 2, 3]


def is_early(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(response[:1].lower() in tuple("abcdefghijklm")) for response in responses]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_a_bandit_comes_to_its_optimum(name: str, tmp_path: Path, pico_folder: Path) -> None:
    """One token is written; the best policy always begins with one of the letters a to m."""
    training = {"batch_size": 64, "max_iterations": 60, "learning_rate": 2e-2, "kl_coefficient": 0.0, "inner_epochs": 2}
    if name == "gspo":
        training |= {"clip_epsilon": 0.2, "clip_epsilon_high": 0.2}
    generation = {"max_new_tokens": 1, "responses_per_prompt": 8, "overlong_buffer": None}
    trained(online_config(tmp_path / "run", pico_folder, name, training=training, generation=generation))
    rewards = [event["reward"] for event in events_of(tmp_path / "run", "rollout")]
    print(f"\n{name}: {rewards[0]:.3f} → {sum(rewards[-5:]) / 5:.3f}")
    assert rewards[0] < 0.6
    assert sum(rewards[-5:]) / 5 > 0.97


def settings_of(name: str) -> dict[str, Any]:
    training = {"max_iterations": 3, "optimizer": "sgd", "learning_rate": 0.05, "inner_epochs": 2, "minibatches": 2}
    if name == "dapo":
        training |= {"curriculum": {}}
    return training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", "grpo", "rloo"])
def test_two_processes_are_one(name: str, tmp_path: Path, pico_folder: Path) -> None:
    for world, size in {"one": 16, "two": 8}.items():
        config = online_config(
            tmp_path / world, pico_folder, name, training={**settings_of(name), "batch_size": size, "log_rollouts": 16}
        )
        if world == "one":
            trained(config)
        else:
            run_world(2, [(config, False)])
    for kind, number in {"step": 12, "rollout": 3}.items():
        one, two = (events_of(tmp_path / world, kind) for world in ("one", "two"))
        assert len(one) == len(two) == number
        for mine, theirs in zip(one, two, strict=True):
            own = {key: value for key, value in mine.items() if key != "tokens"}
            other = {key: value for key, value in theirs.items() if key != "tokens"}
            assert other == pytest.approx(own, abs=1e-5)
    one, two = (rows_of(tmp_path / world / "rollouts.jsonl") for world in ("one", "two"))
    assert [row["response"] for row in one] == [row["response"] for row in two]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["dapo", "rloo"])
def test_killed_at_random_moments(name: str, tmp_path: Path, pico_folder: Path) -> None:
    """With dynamic sampling and a curriculum, whose pass rates are in the checkpoint."""
    training = {
        **settings_of(name),
        "save_every": 1,
        "keep_last": 2,
        "log_rollouts": 4,
        "mask_truncated": name == "rloo",
    }
    runs = {which: tmp_path / which / "run" for which in ("whole", "killed")}
    configs = {}
    for which, run in runs.items():
        run.parent.mkdir()
        configs[which] = online_config(run, pico_folder, name, training=training)
    began = time.monotonic()
    trained(configs["whole"])
    seconds = time.monotonic() - began
    if name == "dapo":
        assert sum(event["groups_redrawn"] for event in events_of(runs["whole"], "rollout")) > 0
    check_kills_leave_no_trace(
        lambda: resumed(configs["killed"]), runs["killed"], bits_of, bits_of(runs["whole"]),
        kills=2 if NUM_KILLS <= 5 else NUM_KILLS, seconds=seconds, latest=0.8, seed=f"{name} moments",
    )  # fmt: skip


def held_bytes(plan: dict[str, Any]) -> int:
    """The peak without the process itself, which occupies more or less from one call to the next."""
    memory = plan["memory"]
    return int(memory["peak"] - memory["process"])


def test_the_dry_run_counts_what_is_held(tmp_path: Path, pico_folder: Path) -> None:
    """No critic; a reference only for a KL; with shared prompts a prompt counts once."""
    plans = {}
    cases = {
        "grpo": ("grpo", {}),
        "with kl": ("grpo", {"kl_coefficient": 0.04}),
        "ppo": ("ppo", {"value_model": "policy"}),
    }
    for name, (method, training) in cases.items():
        config = online_config(tmp_path / "run", pico_folder, method, training=training, evaluation={"responses": 2})
        file = tmp_path / "run.json"
        file.write_text(json.dumps(config.model_dump(mode="json")))
        result = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--json"], catch_exceptions=False)
        plans[name] = json.loads(result.stdout)
    roles = {name: set(plan["model"]["roles"]) for name, plan in plans.items()}
    assert roles == {
        "grpo": {"policy"},
        "with kl": {"policy", "reference"},
        "ppo": {"policy", "reference", "value model"},
    }
    held = {name: held_bytes(plan) for name, plan in plans.items()}
    assert held["grpo"] < held["with kl"] < held["ppo"]
    assert plans["grpo"]["model"]["copies"] == 1
