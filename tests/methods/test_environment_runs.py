"""Training in an environment: what the model wrote trains, what tools wrote is context; and exact resume."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from environment_runs import OWN, TASKS, played_config, save_actor
from fake_workers import FakeWorkers
from killed_runs import NUM_KILLS, check_kills_leave_no_trace, digest
from online_runs import bits_of, resumed, rows_of, trained
from preference_runs import events_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from worlds import run_world

from loopos.cli.commands import app
from loopos.config.diagnostics import DataError, UserError
from loopos.evaluation.sandbox import missing
from loopos.methods.ppo import PpoTrainer
from loopos.rl.workers import opening
from loopos.rl.workers.worker import RolloutWorker
from loopos.training.progress import RunProgress


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    return save_actor(tmp_path_factory.mktemp("actor"), pico_folder)


def test_only_what_the_model_wrote_trains(tmp_path: Path, actor: Path) -> None:
    """The first update by plain SGD is that of a plain computation: Σ −A·∇log p over written tokens / their number."""
    training = {
        "max_iterations": 1, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": None, "log_rollouts": 12,
        "validate_every": 1, "loss_normalization": "token", "inner_epochs": 1,
    }  # fmt: skip
    config = played_config(
        tmp_path / "run", actor, training=training, data={"validation_data": str(tmp_path / "run.jsonl")}
    )
    method = PpoTrainer(config, progress=RunProgress(quiet=True))
    drawn: list[Any] = []
    collect = method._drawn
    method._drawn = lambda iteration: drawn.append(collect(iteration)) or drawn[-1]  # type: ignore[method-assign,func-returns-value]
    method.train()
    rollouts = drawn[0].trained
    episodes = [rollout.response.episode for rollout in rollouts]
    assert max(episode.turns for episode in episodes) > 1
    assert any(not written for episode in episodes for written in episode.mask)
    model = AutoModelForCausalLM.from_pretrained(actor)
    scores = torch.tensor([episode.reward for episode in episodes]).view(-1, 4)
    advantages = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)).flatten()
    total, loss = sum(sum(episode.mask) for episode in episodes), torch.zeros(())
    for rollout, episode, advantage in zip(rollouts, episodes, advantages, strict=True):
        whole = torch.tensor([[*episode.prompt_ids, *episode.ids]])
        logprobs = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        own = logprobs[len(episode.prompt_ids) - 1 :][torch.tensor(episode.mask)]
        assert len(rollout.logprobs) == len(own) == rollout.response.num_tokens
        torch.testing.assert_close(rollout.logprobs, own.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(rollout.engine_logprobs, own.detach(), atol=1e-5, rtol=0)
        loss = loss - advantage * own.sum() / total
    loss.backward()
    trained_weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - parameter.grad
        torch.testing.assert_close(trained_weights[name], expected, atol=2e-6, rtol=1e-5)
    [event] = events_of(tmp_path / "run", "rollout")
    assert event["score_environment"] == pytest.approx(event["reward"]) == float(scores.mean())
    assert event["turns"] == sum(episode.turns for episode in episodes) / 12
    assert event["model_tokens"] == total / 12 == event["response_length"]
    logged = rows_of(tmp_path / "run" / "rollouts.jsonl")
    assert [row["messages"][1]["role"] for row in logged if len(row["messages"]) > 1][:1] == ["tool"]
    assert sum(row["tool_tokens"] for row in logged) == pytest.approx(event["tool_tokens"] * 12)
    validation = events_of(tmp_path / "run", "validation")[0]
    assert {"turns", "tool_calls", "score_environment"} <= set(validation)
    assert len(rows_of(tmp_path / "run" / "samples.jsonl")) == 2 * len(TASKS)


def test_a_critic_and_functions_beside_the_environment(tmp_path: Path, actor: Path) -> None:
    """PPO over several turns; a reward function sees the messages, and its weight counts beside the environment's."""
    functions = [{"name": f"{OWN}:num_results", "label": "results", "weight": 0.5}]
    config = played_config(
        tmp_path / "run", actor, "ppo", environment={"reward_weight": 2.0}, functions=functions,
        generation={"responses_per_prompt": 1},
        training={"batch_size": 4, "value_model": "shared", "kl_coefficient": 0.1, "inner_epochs": 2, "minibatches": 2},
    )  # fmt: skip
    trained(config)
    for event in events_of(tmp_path / "run", "rollout"):
        weighted = 2.0 * event["score_environment"] + 0.5 * event["score_results"]
        assert event["reward"] == pytest.approx(weighted, abs=1e-6)
        assert event["logprob_mismatch"] < 1e-5
        assert "kl" in event


STEPS = {"max_iterations": 3, "inner_epochs": 2, "minibatches": 2, "optimizer": "sgd", "learning_rate": 0.05}


contained = pytest.mark.skipif(bool(missing()), reason=f"no containment on this system: {missing()}")


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["thread", pytest.param("process", marks=contained)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(tmp_path: Path, actor: Path, isolation: str) -> None:
    """In rollouts, inner epochs and saves; the tools wait a little, so that kills fall into them too."""
    training = {**STEPS, "save_every": 1, "keep_last": 2, "log_rollouts": 4, "dynamic_sampling": 1}
    runs = {which: tmp_path / which / "run" for which in ("whole", "killed")}
    configs = {}
    for which, run in runs.items():
        run.parent.mkdir()
        environment = {"name": f"{OWN}:SlowGuess", "isolation": isolation}
        configs[which] = played_config(run, actor, training=training, environment=environment)
    began = time.monotonic()
    trained(configs["whole"])
    seconds = time.monotonic() - began
    check_kills_leave_no_trace(
        lambda: resumed(configs["killed"]), runs["killed"], bits_of, bits_of(runs["whole"]),
        kills=2 if NUM_KILLS <= 5 else NUM_KILLS, seconds=seconds, latest=0.8, seed="environment moments",
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path, actor: Path) -> None:
    for world, size in {"one": 16, "two": 8}.items():
        training = {**STEPS, "batch_size": size, "log_rollouts": 16}
        config = played_config(tmp_path / world, actor, training=training)
        if world == "one":
            trained(config)
        else:
            run_world(2, [(config, False)])
    for kind in ("step", "rollout"):
        one, two = (events_of(tmp_path / world, kind) for world in ("one", "two"))
        assert len(one) == len(two) > 0
        for mine, theirs in zip(one, two, strict=True):
            own = {key: value for key, value in mine.items() if key != "tokens"}
            assert {key: value for key, value in theirs.items() if key != "tokens"} == pytest.approx(own, abs=1e-5)
    one, two = (rows_of(tmp_path / world / "rollouts.jsonl") for world in ("one", "two"))
    assert [row["messages"] for row in one] == [row["messages"] for row in two]


def test_workers_play_what_the_local_engine_plays(tmp_path: Path, actor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers with models of their own, one of which dies: the same episodes, so the same weights."""
    made: list[FakeWorkers] = []

    def transport(recipe: Any, section: Any) -> FakeWorkers:
        behave = lambda worker, order: "die" if (worker, order) == (1, 1) else "answer"  # noqa: E731
        made.append(FakeWorkers(lambda: RolloutWorker(recipe).write, behave))
        return made[-1]

    monkeypatch.setattr(opening, "RayTransport", transport)
    monkeypatch.setattr(opening, "find_spec", lambda name: name)
    for engine in ("local", "ray"):
        (tmp_path / engine).mkdir()
        training = {"max_iterations": 2, "learning_rate": 1e-2}
        trained(played_config(tmp_path / engine / "run", actor, rollout={"engine": engine}, training=training))
    ours, theirs = (load_file(tmp_path / e / "run" / "model" / "model.safetensors") for e in ("local", "ray"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(made) == 1


@contained
@pytest.mark.slow
def test_contained_episodes_train_what_those_of_threads_train(
    tmp_path: Path, actor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threads, in processes, and in processes of workers: the same weights and rollouts."""
    monkeypatch.setattr(
        opening, "RayTransport", lambda recipe, section: FakeWorkers(lambda: RolloutWorker(recipe).write)
    )
    monkeypatch.setattr(opening, "find_spec", lambda name: name)
    found = {}
    for which, engine, isolation in (
        ("threads", "local", "thread"), ("processes", "local", "process"), ("workers", "ray", "process"),
    ):  # fmt: skip
        (tmp_path / which).mkdir()
        config = played_config(
            tmp_path / which / "run", actor, rollout={"engine": engine}, environment={"isolation": isolation},
            training={"max_iterations": 2, "learning_rate": 1e-2, "log_rollouts": 12},
        )  # fmt: skip
        trained(config)
        weights, rollouts = (tmp_path / which / "run" / file for file in ("model/model.safetensors", "rollouts.jsonl"))
        found[which] = (digest(weights), digest(rollouts))
    assert found["threads"] == found["processes"] == found["workers"]
    # A run may be resumed with the other isolation.
    environment, training = {"isolation": "process"}, {"max_iterations": 3, "learning_rate": 1e-2, "log_rollouts": 12}
    resumed(played_config(tmp_path / "threads" / "run", actor, environment=environment, training=training))
    assert len(events_of(tmp_path / "threads" / "run", "rollout")) == 3


@contained
@pytest.mark.slow
def test_a_policy_trains_on_through_attacks(tmp_path: Path, actor: Path) -> None:
    environment = {
        "name": "tests.rl.own_attacks:Attacks", "tool_parser": "tests.rl.own_attacks:any_attack",
        "isolation": "process", "tool_seconds": 1, "tool_memory": 128,
    }  # fmt: skip
    training, generation = {"max_iterations": 3, "log_rollouts": 12}, {"max_new_tokens": 24}
    config = played_config(tmp_path / "run", actor, environment=environment, training=training, generation=generation)
    Path(config.data.source).write_text("".join(json.dumps({"prompt": each}) + "\n" for each in ("a", "b b", "the c")))
    trained(config)
    rollouts = events_of(tmp_path / "run", "rollout")
    assert len(rollouts) == 3
    broken = ("processes", "timeout", "memory", "output", "died")
    kinds = {kind: sum(each[f"tool_failures_{kind}"] for each in rollouts) for kind in (*broken, "exception")}
    assert sum(kinds[kind] > 0 for kind in broken) >= 3, kinds
    assert kinds["exception"] > 0
    logged = rows_of(tmp_path / "run" / "rollouts.jsonl")
    assert {row["finish_reason"] for row in logged} >= {"stuck"}
    children = ["ps", "--ppid", str(os.getpid()), "-o", "args"]
    assert "sandbox_server" not in subprocess.run(children, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"generation": {"stop": ["x"]}}, "stop strings with an environment"),
        ({"rollout": {"engine": "vllm"}}, '"local" or "ray"'),
        ({"rollout": {"engine": "ray", "max_staleness": 1}}, "episodes are not stored ahead"),
        ({"generation": {"overlong_buffer": 0.5}}, "environment.max_tokens an episode"),
        ({"environment": {"max_tokens": 400}, "training": {"max_length": 256}}, "environment.max_tokens"),
    ],
)
def test_settings_that_an_environment_does_not_take(
    sections: dict[str, Any], expected: str, tmp_path: Path, actor: Path
) -> None:
    config = played_config(tmp_path / "run", actor, **sections)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    result = CliRunner().invoke(app, ["validate", str(file)])
    assert result.exit_code == 2
    assert expected in result.stderr


def test_limits_without_processes_have_no_effect(tmp_path: Path, actor: Path) -> None:
    for isolation, expected in {"thread": True, "process": False}.items():
        config = played_config(tmp_path / "run", actor, environment={"tool_memory": 256, "isolation": isolation})
        file = tmp_path / "run.json"
        file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
        result = CliRunner().invoke(app, ["validate", str(file)])
        assert result.exit_code == 0, result.output
        assert ('environment.tool_memory has no effect: isolation is not "process"' in result.output) is expected


def test_mistakes_name_the_row_and_the_class(tmp_path: Path, actor: Path) -> None:
    config = played_config(tmp_path / "run", actor, environment={"name": f"{OWN}:Counter"})
    with pytest.raises(
        UserError, match=r"reset needs the column prompt; the row has goal, secret\n    for .*run\.jsonl:1"
    ):
        trained(config)
    Path(config.data.source).write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="has no method reward"):
        trained(config)
    Path(config.data.source).write_text('{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(DataError, match=r"run\.jsonl:2"):
        trained(config)


def test_check_and_dry_run(tmp_path: Path, actor: Path) -> None:
    config = played_config(tmp_path / "run", actor)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["prompts"]["train"], plan["tokens"]["response"]) == (len(TASKS), 60)
    result = CliRunner().invoke(app, ["rl", "check", str(file), "--samples", "4"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "environment" in result.stdout
