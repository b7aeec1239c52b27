"""The formulas of `loopos plan` against runs: bytes of tensors that training holds, the most that a step takes, and
what two processes really send.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_run import LiveBytes, count, counting, train
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from worlds import run_processes

from loopos.config.methods import config_classes
from loopos.planning.cluster.memory import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, need_of, step_transfers
from loopos.planning.cluster.setting import Cluster, Setting
from loopos.planning.cluster.work import Load, loads_of

TESTS = Path(__file__).parents[1]
REPLICATE = Setting(1, 1, False, True, False)
TWO = Cluster.of(gpus=2, memory="80GiB", gpus_a_node=2, inside="300GB", between="400Gbit")
TEXT = "the parcel came late and the box was open "


def config_of(folder: Path, weights: Path, method: str, **training: Any) -> dict[str, Any]:
    """A run of two steps on full rows: each text is longer than max_length."""
    rows = [{"text": TEXT * 12, "label": i % 2, "prompt": f"where is it, {i}"} for i in range(96)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = {"learning_rate": 1e-3, "batch_size": 8, "max_length": 64, "max_steps": 2, "precision": "fp32"}
    data = {"pretrained_weights": str(weights), "output_dir": str(folder / "run"), "validation_share": 0.0}
    chosen: dict[str, Any] = {
        "computation": {"mode": "posttraining", "method": method},
        "training": {**small, "device": "cpu", "optimizer": "adamw", **training},
        "data": {**data, ("prompts" if method == "ppo" else "training_data"): str(file)},
    }
    if method == "ppo":
        chosen["reward"] = {"functions": [{"name": "preference_runs:length_of"}]}
        chosen["generation"] = {"max_new_tokens": 8}
    return chosen


def load_of(config: dict[str, Any]) -> Load:
    chosen = config_classes()[config["computation"]["mode"], config["computation"]["method"]].model_validate(config)
    (load,) = loads_of(chosen, tokens=None, trust_remote_code=False)
    return load


def bytes_of(file: Path) -> int:
    """Bytes of the tensors in a file; numbers, such as counts of steps, left out."""
    return sum(tensor.numel() * tensor.itemsize for tensor in load_file(file).values() if tensor.ndim)


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "adafactor"},
        {"optimizer": "muon"},
        {"optimizer": "adamw", "trainable": "lora"},
        {"optimizer": "adamw", "freeze_layers": 1},
    ],
    ids=lambda training: "-".join(map(str, training.values())),
)
def test_the_estimated_memory_of_training_is_exact(training: dict[str, Any], tmp_path: Path, pico_folder: Path) -> None:
    config = config_of(tmp_path, pico_folder, "fine_tuning", **training)
    train(config)
    saved = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    held = need_of(load_of(config), REPLICATE).persistent
    assert held["gradients"] == bytes_of(saved / "weights.safetensors")
    assert held["optimizer"] == bytes_of(saved / "optimizer.safetensors")


def test_the_estimated_memory_of_every_ppo_role_is_exact(
    tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS / "methods"))
    config = config_of(tmp_path, pico_folder, "ppo", value_model="policy", inner_epochs=1)
    train(config)
    saved = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    load = load_of(config)
    held = need_of(load, REPLICATE).persistent
    assert held["gradients"] == bytes_of(saved / "weights.safetensors")
    assert held["optimizer"] == bytes_of(saved / "optimizer.safetensors")
    # Policy and reference are whole; the value model has a head of one number a feature, and no output embedding.
    policy = sum(t.numel() for t in load_file(pico_folder / "model.safetensors").values())
    assert {each.role: each.parameters.total for each in load.networks} == {
        "policy": policy,
        "reference": policy,
        "value model": policy - 400 * 32 + 32,
    }


@pytest.fixture(scope="module")
def medium_folder(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer: Path) -> Path:
    """A Llama whose activations are many times its weights at 8 rows of 64 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, vocab_size=400, num_hidden_layers=6, max_position_embeddings=64, pad_token_id=0, eos_token_id=2
    )
    folder = tmp_path_factory.mktemp("medium")
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [8, 24])
def test_the_estimated_peak_memory_is_within_a_tenth(
    rows: int, checkpointing: bool, tmp_path: Path, medium_folder: Path
) -> None:
    config = config_of(
        tmp_path,
        medium_folder,
        "fine_tuning",
        batch_size=rows,
        gradient_checkpointing=checkpointing,
        gradient_accumulation=2,
        precision="bf16",
    )
    live = LiveBytes()
    with counting(lambda: live):
        train(config)
    load = load_of(config)
    need = need_of(load, Setting(1, 1, False, True, checkpointing), longest=64)
    assert load.tokens == rows * 64
    # The steps make gradients and the optimizer's state, and whatever a pass keeps meanwhile; weights were there.
    measured = live.peak + need.persistent["weights"] + need.persistent["master weights"]
    assert measured == pytest.approx(need.peak, rel=0.1)


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> dict[str, Any]:
    """What two processes send, by run; and the configs under "configs"."""
    folder, configs = tmp_path_factory.mktemp("sent"), {}
    for name, method, training in (
        ("fine_tuning", "fine_tuning", {"gradient_accumulation": 2}),
        ("lora", "fine_tuning", {"trainable": "lora"}),
        ("ppo", "ppo", {"value_model": "policy", "inner_epochs": 1, "batch_size": 4}),
    ):
        (folder / name).mkdir()
        configs[name] = config_of(folder / name, pico_folder, method, **training)

    def work() -> None:
        sys.path.insert(0, str(TESTS / "methods"))
        count(configs, str(pico_folder), folder / "answer.json")

    run_processes(2, work)
    return {**json.loads((folder / "answer.json").read_text(encoding="utf-8")), "configs": configs}


@pytest.mark.parametrize("run", ["fine_tuning", "lora", "ppo"])
def test_replicated_processes_send_the_estimated_bytes(run: str, sent: dict[str, Any]) -> None:
    told = step_transfers(load_of(sent["configs"][run]), REPLICATE, TWO)
    assert {each.collective for each in told} == {ALL_REDUCE}
    assert len(sent[run]) == 2
    for step in sent[run]:
        assert step == {"allreduce_": sum(each.size for each in told)}


@pytest.mark.parametrize("reshard", [True, False])
def test_sharded_processes_send_the_estimated_bytes(reshard: bool, sent: dict[str, Any], pico_folder: Path) -> None:
    """FSDP2 itself, on a language model with one pass a step."""
    config = {
        "computation": {"mode": "posttraining", "method": "chain_of_thought"},
        "training": {"learning_rate": 1e-3, "precision": "fp32"},
        "data": {"pretrained_weights": str(pico_folder), "training_data": "rows.jsonl", "output_dir": "run"},
    }
    told = step_transfers(load_of(config), Setting(2, 1, False, reshard, False), TWO)
    size = {each.collective: each.size for each in told}
    assert sent["shard"][0 if reshard else 1] == {
        "_allgather_base_": size[ALL_GATHER],
        "_reduce_scatter_base_": size[REDUCE_SCATTER],
    }
    # Two processes that share one copy have no other group to sum with.
    assert ALL_REDUCE not in size
