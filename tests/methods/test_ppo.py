"""PPO through its real entry point, on the pico model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import slow_but
from preference_runs import ASKED, early_letters, events_of, ppo_config, reward_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.diagnostics import UserError
from loopos.config.ppo import PpoConfig
from loopos.methods.ppo import PpoTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.rl.experience import ReusedForward
from loopos.rl.roles import ActorCritic
from loopos.training.progress import RunProgress

EARLY = "preference_runs:early_letters"


def trained(config: PpoConfig) -> PpoTrainer:
    method = PpoTrainer(config, progress=RunProgress(quiet=True))
    method.train()
    return method


@pytest.fixture(scope="module")
def reward_runs(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> dict[str, Path]:
    """A reward model trained whole, and one trained as an adapter over the policy's own weights."""
    runs = {}
    for trainable in ("all", "lora"):
        runs[trainable] = tmp_path_factory.mktemp("rewards") / trainable
        training = {"trainable": trainable, "num_epochs": 2}
        config = reward_config(runs[trainable], pico_folder, training=training)
        RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
    return runs


@pytest.mark.parametrize(
    ("trainable", "value_model"),
    slow_but([("all", "reward"), ("lora", "shared")], product(("all", "lora"), ("reward", "policy", "shared"))),
)
def test_it_begins_where_the_reference_is(
    trainable: str, value_model: str, reward_runs: dict[str, Path], tmp_path: Path, pico_folder: Path
) -> None:
    training = {"trainable": trainable, "value_model": value_model}
    config = ppo_config(tmp_path / "run", pico_folder, reward_model=reward_runs[trainable], training=training)
    method = trained(config)
    first = events_of(tmp_path / "run", "step")[0]
    assert first["ratio"] == 1.0
    assert first["approximate_kl"] == 0.0
    assert first["clip_share"] == 0.0
    rollouts = events_of(tmp_path / "run", "rollout")
    assert len(rollouts) == 3
    assert rollouts[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(rollouts[2]["kl"]) > 1e-4
    assert rollouts[0]["logprob_mismatch"] < 1e-4
    assert len(events_of(tmp_path / "run", "step")) == 3 * 2 * 2
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    shares = list(method.roles.actor_critic.critic.parameters())
    assert (len(shares) > 1) == (trainable == "all" and value_model != "shared")


def test_with_adapters_one_copy_of_the_weights_serves_all_roles(
    reward_runs: dict[str, Path], tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Export merges the adapters into the weights.
    monkeypatch.setattr(PpoTrainer, "export", lambda self: None)
    training = {"trainable": "lora"}
    method = trained(ppo_config(tmp_path / "run", pico_folder, reward_model=reward_runs["lora"], training=training))
    roles = method.roles
    whole = [p for p in roles.actor_critic.policy.parameters() if p.ndim == 2 and p.numel() >= 32 * 32]
    assert roles.reward is not None
    assert roles.reward.backbone.model is roles.actor_critic.policy.backbone.model
    assert roles.actor_critic.critic.backbone.model is roles.actor_critic.policy.backbone.model
    assert whole
    names = {name for name, _ in roles.actor_critic.named_parameters() if ".lora_" in name}
    assert {name.split(".lora_")[1].split(".")[1] for name in names} == {"default", "reward_0", "value"}
    assert all(".reward_0." not in name for name in method.trained.now)
    assert any(".value." in name for name in method.trained.now)
    assert any(".default." in name for name in method.trained.now)


@pytest.mark.parametrize("trainable", slow_but("all", ["all", "lora"]))
def test_several_reward_models_are_an_ensemble(
    trainable: str, reward_runs: dict[str, Path], tmp_path: Path, pico_folder: Path
) -> None:
    """The same first responses, scored by each and by both: the mean of their normalized scores, less their spread; of
    two it is the smaller one where one deviation is taken off.
    """
    found = {}
    both = list(reward_runs.values())
    cases = {"one": (both[0], 0.0), "other": (both[1], 0.0), "both": (both, 0.0), "careful": (both, 1.0)}
    for name, (models, penalty) in cases.items():
        training = {"trainable": trainable, "max_iterations": 1, "value_model": "shared"}
        reward = {"ensemble_penalty": penalty}
        run = tmp_path / name
        method = trained(ppo_config(run, pico_folder, reward_model=models, training=training, reward=reward))
        assert not method.opened_rewards
        found[name] = events_of(run, "rollout")[0]["reward"]
    assert found["both"] == pytest.approx((found["one"] + found["other"]) / 2, abs=1e-4)
    assert found["careful"] <= min(found["one"], found["other"]) + 1e-4
    assert found["careful"] < found["both"]


@pytest.mark.slow
def test_an_adapters_reward_is_the_merged_models(
    reward_runs: dict[str, Path], tmp_path: Path, pico_folder: Path
) -> None:
    """The reward of responses by adapter over the policy's trunk equals that of the exported whole model."""
    training = {"trainable": "lora", "learning_rate": 1e-9}
    folders = {"adapter": pico_folder, "whole": pico_folder}
    rewards = {}
    for name, weights in folders.items():
        run = reward_runs["lora"]
        if name == "whole":
            moved = tmp_path / "moved"
            moved.mkdir()
            (moved / "model").symlink_to(run / "model")
            run = moved
        trained(ppo_config(tmp_path / name, weights, reward_model=run, training=training))
        rewards[name] = [event["reward"] for event in events_of(tmp_path / name, "rollout")]
    assert rewards["adapter"] == pytest.approx(rewards["whole"], abs=1e-3)


@pytest.mark.slow
def test_the_clip_and_the_penalty_follow_their_formulas(
    reward_runs: dict[str, Path], tmp_path: Path, pico_folder: Path
) -> None:
    runs = {}
    for name, training in {
        "plain": {},
        "narrow": {"clip_epsilon": 0.001},
        "dear": {"kl_coefficient": 5.0},
    }.items():
        setting = {"learning_rate": 1e-2, "inner_epochs": 4, "schedule": "constant", **training}
        trained(ppo_config(tmp_path / name, pico_folder, reward_model=reward_runs["all"], training=setting))
        runs[name] = (events_of(tmp_path / name, "step"), events_of(tmp_path / name, "rollout"))
    # The first minibatch is the same: nothing is clipped and no KL is there yet.
    for steps, _ in runs.values():
        assert steps[0]["policy_loss"] == pytest.approx(runs["plain"][0][0]["policy_loss"], abs=1e-5)
    shares = {name: sum(step["clip_share"] for step in steps) for name, (steps, _) in runs.items()}
    assert shares["narrow"] > shares["plain"]
    assert [rollout["kl_coefficient"] for rollout in runs["dear"][1]] == [5.0] * 3
    # In the first iteration there is no KL to penalise, so that both policies write the same in the second; from there
    # on the penalty of −β·kl_t a token is in the returns, which the values are held against.
    (plain_steps, plain), (dear_steps, dear) = runs["plain"], runs["dear"]
    assert dear[1]["reward"] == pytest.approx(plain[1]["reward"], abs=1e-3)
    assert dear[1]["kl"] == pytest.approx(plain[1]["kl"], abs=1e-2)
    assert abs(plain[1]["kl"]) > 0.05
    assert dear_steps[7]["value_loss"] == pytest.approx(plain_steps[7]["value_loss"], abs=1e-2)
    assert abs(dear_steps[8]["value_loss"] - plain_steps[8]["value_loss"]) > 0.05


@pytest.mark.slow
def test_recomputed_activations_change_nothing(reward_runs: dict[str, Path], tmp_path: Path, pico_folder: Path) -> None:
    losses = []
    for name in (False, True):
        run = tmp_path / str(name)
        training = {"gradient_checkpointing": name, "max_iterations": 1}
        trained(ppo_config(run, pico_folder, reward_model=reward_runs["all"], training=training))
        losses.append([(step["policy_loss"], step["value_loss"]) for step in events_of(run, "step")])
    assert losses[0] == losses[1]
    training = {"gradient_checkpointing": True, "trainable": "lora"}
    with pytest.raises(UserError, match="gradient_checkpointing"):
        trained(ppo_config(tmp_path / "lora", pico_folder, reward_model=reward_runs["lora"], training=training))


def test_the_coefficient_is_steered_to_its_target(tmp_path: Path, pico_folder: Path) -> None:
    training = {"kl_target": 100.0, "kl_horizon": 10, "kl_coefficient": 0.2}
    trained(ppo_config(tmp_path / "run", pico_folder, functions=[EARLY], training=training))
    found = [event["kl_coefficient"] for event in events_of(tmp_path / "run", "rollout")]
    # KL far under its target: e = −0.2, so β ← β·(1 − 0.2·6/10) = 0.88·β.
    assert found == pytest.approx([0.2, 0.176, 0.15488])


def test_inner_epochs_stop_at_the_limit(tmp_path: Path, pico_folder: Path) -> None:
    training = {"approximate_kl_limit": 1e-12, "inner_epochs": 4, "learning_rate": 1e-2}
    trained(ppo_config(tmp_path / "run", pico_folder, functions=[EARLY], training=training))
    # The first minibatch of an iteration is at 0 exactly; the second is beyond the limit and the last.
    assert len(events_of(tmp_path / "run", "step")) == 3 * 2
    assert len(events_of(tmp_path / "run", "rollout")) == 3


def asked_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 where the prompt is exactly one of the prompts in the data."""
    return [float(prompt in ASKED) for prompt in prompts]


def reads_a_key(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [{"no": 1.0}[prompt] for prompt in prompts]


def test_an_exception_of_a_function_is_reported_with_the_row(tmp_path: Path, pico_folder: Path) -> None:
    prompts = ["no", "where is it"]
    config = ppo_config(tmp_path / "run", pico_folder, functions=["test_ppo:reads_a_key"], prompts=prompts)
    with pytest.raises(UserError) as told:
        trained(config)
    first, second = str(told.value).splitlines()
    assert first.startswith(f"reward function test_ppo:reads_a_key: raised KeyError at {__file__}:")
    assert second == f"    for {tmp_path / 'run.jsonl'}:2, the prompt 'where is it'"


def test_reward_functions_and_samples_get_the_original_prompt(tmp_path: Path, pico_folder: Path) -> None:
    """The user's words, not what the chat template made of them."""
    data = {"chat_template": "plain", "validation_data": str(tmp_path / "run.jsonl")}
    training = {"validate_every": 3, "max_iterations": 1}
    functions, best_of = ["test_ppo:asked_words"], {"best_of": [2]}
    config = ppo_config(
        tmp_path / "run", pico_folder, functions=functions, data=data, training=training, evaluation=best_of
    )
    method = trained(config)
    # Best-of-n stands on the validation prompts too, and begins with one answer a prompt; KL: ln 2 − 1/2.
    found = events_of(tmp_path / "run", "best_of_n")
    assert [(each["n"], each["reward"]) for each in found] == [(1, 1.0), (2, 1.0)]
    assert [each["kl"] for each in found] == pytest.approx([0.0, 0.1931], abs=1e-4)
    # Nothing is better than a reward that is 1 from the start.
    assert (method.result.stopped_by, method.result.beat_start, method.result.best_step) == (
        "max_iterations",
        False,
        None,
    )
    assert [event["reward"] for event in events_of(tmp_path / "run", "rollout")] == [1.0]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == set(ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_one_step_problem_comes_to_its_known_optimum(kl_in: str, tmp_path: Path, pico_folder: Path) -> None:
    """One token is written, 1 for one that begins with a letter from a to m. With a KL penalty of β the best policy is
    π*(x) ∝ π_ref(x)·exp(r(x)/β) (Ziegler et al. 2019; Korbak et al. 2022), so that the chance of those letters is
    p·e^(1/β) / (p·e^(1/β) + 1 − p) with p that of the reference.
    """
    beta = 0.5
    prompt = ASKED[0]
    config = ppo_config(
        tmp_path / "run",
        pico_folder,
        functions=[EARLY],
        prompts=[prompt],
        training={
            "kl_coefficient": beta,
            "kl_in": kl_in,
            "batch_size": 160,
            "max_iterations": 40,
            "num_epochs": 100000,
            "inner_epochs": 2,
            "minibatches": 1,
            "optimizer": "adam",
            "learning_rate": 5e-3,
            "whiten_advantages": False,
            "gae_lambda": 1.0,
            "save_every": "never",
        },
        generation={"max_new_tokens": 1},
    )
    method = trained(config)
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    wins = (
        torch.tensor(
            early_letters([], [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))])
        )
        > 0
    )
    ids = torch.tensor([method.prompts[0]])
    chances = {}
    for name, place in {"reference": pico_folder, "policy": tmp_path / "run" / "model"}.items():
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        logits = model(input_ids=ids).logits[0, -1].detach().double()
        chances[name] = float(torch.softmax(logits, -1)[: len(wins)][wins].sum())
    p = chances["reference"]
    optimum = p * math.exp(1 / beta) / (p * math.exp(1 / beta) + 1 - p)
    assert 0.02 < p < 0.6
    assert optimum - p > 0.1
    assert chances["policy"] == pytest.approx(optimum, abs=0.02)


@pytest.mark.parametrize("trainable", slow_but("lora", ["all", "lora"]))
def test_the_scoring_pass_is_that_of_the_first_step(
    trainable: str, tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass less in each iteration whose first step takes all its responses, and the same bits."""
    found = {}
    for kept in (True, False):
        calls: list[bool] = []
        forward = ActorCritic.forward

        def counted(self: ActorCritic, *actual: Any, seen: list[bool] = calls, run: Any = forward) -> Any:
            seen.append(torch.is_grad_enabled())
            return run(self, *actual)

        with monkeypatch.context() as patched:
            patched.setattr(ActorCritic, "forward", counted)
            if not kept:
                patched.setattr(ReusedForward, "take", lambda *_: None)
            training = {"minibatches": 1, "trainable": trainable}
            run = tmp_path / str(kept) / "run"
            run.parent.mkdir()
            trained(ppo_config(run, pico_folder, functions=[EARLY], training=training))
        # Three iterations: each judges once, with its graph, and has two steps.
        assert calls == [True] * (3 * 2 if kept else 3 * 3)
        events = [event for name in ("rollout", "step") for event in events_of(run, name)]
        found[kept] = events, (run / "model" / "model.safetensors").read_bytes()
    assert found[True] == found[False]
