"""`loopos plan`: every method, from its config and the architecture alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke

CLUSTER = ("--gpus", "16", "--memory", "80GiB")
METHODS = ("fine_tuning", "sft", "chain_of_thought", "reward_model", "ppo", "rlhf", "autoregressive")


def config_of(folder: Path, weights: Path | str, method: str, **training: Any) -> Path:
    """The data is not there: a plan reads none."""
    sizes = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64, "vocab_size": 400}
    new = method == "autoregressive"
    data: dict[str, Any] = (
        {"output_dir": "outputs/run"} if new else {"pretrained_weights": str(weights), "output_dir": "outputs/run"}
    )
    data[{"ppo": "prompts", "autoregressive": "input_file"}.get(method, "training_data")] = "not/there.jsonl"
    config: dict[str, Any] = {
        "computation": {"mode": "pretraining" if new else "posttraining", "method": method},
        "training": {"learning_rate": 1e-3, "batch_size": 8, "max_length": 64, **training},
        "data": data,
    }
    if new:
        config["model"] = sizes
    if method == "ppo":
        config["reward"] = {"functions": [{"name": "judges:length_of"}]}
        config["training"]["value_model"] = "policy"
    if method in ("ppo", "rlhf"):
        config["generation"] = {"max_new_tokens": 16}
    file = folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def planned(invoke: Invoke, *words: object) -> Any:
    result = invoke("plan", *words, "--json")
    assert result.exit_code in (0, 1), result.stderr
    answer = json.loads(result.stdout)
    assert answer["fits"] == (result.exit_code == 0)
    return answer


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned(method: str, tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    answer = planned(invoke, config_of(tmp_path, pico_folder, method), *CLUSTER)
    assert answer["fits"]
    phases = {phase["phase"]: phase for phase in answer["phases"]}
    expected = {"rlhf": ["reward_model", "ppo"]}.get(method, [method])
    assert list(phases) == expected
    for phase in phases.values():
        assert phase["setting"]["mode"] == "replicate"
        (step, *others) = phase["traffic"]["step"]
        assert step["collective"] == "all-reduce"
        trained = 4 * phase["model"]["trained"]
        assert sum(each["bytes"] for each in (step, *others)) == trained
    last = phases[expected[-1]]
    if expected[-1] == "ppo":
        assert set(last["model"]["roles"]) >= {"policy", "reference", "value model"}
        assert last["memory"]["rollout"]["cache"] == 8 * 64 * 2 * 2 * 16 * 2
    if method == "reward_model":
        # Two responses of a comparison, each with its prompt.
        assert last["forward"]["tokens"] == 8 * 2 * 64


def test_sharded_it_holds_a_part_and_gathers(tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    config = config_of(tmp_path, pico_folder, "rlhf")
    whole = planned(invoke, config, *CLUSTER)["phases"][1]
    shared = planned(invoke, config, *CLUSTER, "--mode", "shard")["phases"][1]
    assert sum(shared["memory"]["held"].values()) < sum(whole["memory"]["held"].values()) / 15
    assert whole["traffic"]["iteration"] == []
    gathered = {each["what"] for each in shared["traffic"]["iteration"]}
    assert gathered == {f"weights of the {role}" for role in ("policy", "reference", "reward model", "value model")}
    parts = planned(invoke, config, *CLUSTER, "--mode", "shard", "--shard-size", "4")["phases"][1]
    assert {each["group"] for each in parts["traffic"]["step"]} == {4}
    assert {each["collective"] for each in parts["traffic"]["step"]} == {"all-gather", "reduce-scatter", "all-reduce"}


def test_with_adapters_the_weights_are_there_once(tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    config = config_of(tmp_path, pico_folder, "ppo", trainable="lora")
    roles = planned(invoke, config, *CLUSTER)["phases"][0]["model"]["roles"]
    assert roles["reference"] == 0
    assert roles["value model"] < roles["policy"] / 2


def test_tensor_parallelism_goes_by_the_plan_of_transformers(tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    config = config_of(tmp_path, pico_folder, "chain_of_thought", precision="fp32")
    (phase,) = planned(invoke, config, *CLUSTER, "--tensor-parallel", "2")["phases"]
    # 2 layers of q, o 32·32, k, v 32·16, gate, up, down 32·64, and an output layer of 400·32 are halved.
    halved = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 400 * 32
    assert phase["memory"]["held"]["weights"] == 4 * (phase["model"]["parameters"] - halved // 2)
    refused = invoke("plan", config, *CLUSTER, "--tensor-parallel", "8")
    assert refused.exit_code == 2
    assert "has 4 attention heads; expected a divisor" in refused.stderr


def test_what_does_not_fit_is_reported_with_what_would(tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    config = config_of(tmp_path, pico_folder, "chain_of_thought", batch_size=64)
    small = ("--gpus", "16", "--memory", "12MB", "--mode", "replicate")
    result = invoke("plan", config, *small)
    assert result.exit_code == 1
    assert "does not fit (needs " in result.stdout
    words = result.stdout.rstrip().splitlines()[-1].split()
    assert any(word.startswith("training.batch_size=") for word in words)
    # What it says is true: with these words it fits.
    assert planned(invoke, config, *words, *small)["fits"]


def test_tokens_can_be_set(tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    config = config_of(tmp_path, pico_folder, "fine_tuning")
    full, told = (planned(invoke, config, *CLUSTER, *words)["phases"][0] for words in ((), ("--tokens", "128")))
    assert (full["forward"]["tokens"], told["forward"]["tokens"]) == (8 * 64, 128)
    assert told["memory"]["update"]["activations"] * 4 == full["memory"]["update"]["activations"]


def test_people_read_the_same(tmp_path: Path, pico_folder: Path, invoke: Invoke) -> None:
    result = invoke("plan", config_of(tmp_path, pico_folder, "rlhf"), *CLUSTER, "--mode", "shard")
    assert result.exit_code == 0
    for summary in (
        "phase 1 of 2: reward_model",
        "phase 2 of 2: ppo",
        "16 GPUs with 85.9 GB each, on 2 nodes",
        "reduce-scatter",
        "fits",
    ):
        assert summary in result.stdout


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        (("--gpus", "16", "--memory", "80"), "--memory: got '80'"),
        (("--gpus", "0", "--memory", "80GiB"), "--gpus 0"),
        ((*CLUSTER, "--mode", "spread"), "--mode: got 'spread'"),
        ((*CLUSTER, "--shard-size", "-1"), "--shard-size: got -1"),
        ((*CLUSTER, "--interconnect", "fast"), "--interconnect: got 'fast'"),
    ],
)
def test_mistakes_name_what_is_expected(
    words: tuple[str, ...], summary: str, tmp_path: Path, pico_folder: Path, invoke: Invoke
) -> None:
    refused = invoke("plan", config_of(tmp_path, pico_folder, "fine_tuning"), *words)
    assert refused.exit_code == 2
    assert summary in refused.stderr
    assert "expected" in refused.stderr or "give a unit" in refused.stderr


@pytest.mark.parametrize(
    ("weights", "summary"),
    [("./gone.safetensors", "does not exist"), ("nobody/nothing", "neither a file or folder here nor reachable")],
)
def test_a_model_that_is_not_available_is_reported(weights: str, summary: str, tmp_path: Path, invoke: Invoke) -> None:
    refused = invoke("plan", config_of(tmp_path, weights, "fine_tuning"), *CLUSTER)
    assert refused.exit_code == 2
    assert summary in refused.stderr
