"""One process, several replicas, and several processes with a sharded model are one run; checkpoints pass between
them.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pico_runs import slow_but
from safetensors.torch import load_file
from sharded_methods import METHODS, measured, small_run
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel
from worlds import run_world, start_world, train_here

from loopos.config.diagnostics import UserError
from loopos.config.sections import DistributedSection, check_distributed
from loopos.training import checkpoint, sharding
from loopos.training.distributed import World
from loopos.training.sharding import Sharding, sharding_for, split_layers

SHARD = {"mode": "shard"}
SPLIT = {"tensor_parallel": 2}


def assert_same(found: Path, expected: Path, *, relative: float = 1e-6) -> None:
    """All figures that training and validation gave, one after the other."""
    mine, theirs = measured(found), measured(expected)
    assert [(kind, step) for kind, step, _ in mine] == [(kind, step) for kind, step, _ in theirs]
    assert any(kind == "step" for kind, _, _ in mine)
    for (kind, step, one), (_, _, other) in zip(mine, theirs, strict=True):
        # The norm is a sum of squares over all weights, in another order.
        norms = [figures.pop("gradient_norm", 0.0) for figures in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=5 * relative), (kind, step)
        # A loss near 0 is known no better than its terms, a correlation of few values and a KL of answers, which is sums
        # of log-probabilities less other ones, no better than their differences.
        looser = {name: 10 * relative for name in one if name.endswith(("_correlation", "response_kl"))}
        for name, value in other.items():
            bound = looser.get(name, relative)
            assert one[name] == pytest.approx(value, rel=bound, abs=bound), (kind, step, name)


def exported(run: Path) -> dict[str, torch.Tensor]:
    [file] = [*run.glob("model/model.safetensors"), *run.parent.glob(f"{run.name}.bin/model.safetensors")]
    found: dict[str, torch.Tensor] = load_file(file)
    return found


def shares_of(size: int, settings: Mapping[str, Any]) -> int:
    """Processes, or groups of them that split layers, that see rows of their own."""
    return size // int(settings.get("tensor_parallel", 1))


def compare_worlds(
    home: Path,
    weights: Path,
    size: int,
    ways: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    **training: Any,
) -> None:
    """Every method in one process, and in `size` of them by each way."""
    for method in methods:
        train_here(small_run(method, home / method / "alone", weights, 1, {}, **training))
    runs = {
        (method, way): small_run(method, home / method / way, weights, shares_of(size, settings), settings, **training)
        for method in methods
        for way, settings in ways.items()
    }
    run_world(size, [(config, False) for config in runs.values()])
    for method, way in runs:
        assert_same(home / method / way, home / method / "alone")
        if method in ("fine_tuning", "chain_of_thought", "ppo"):
            mine, theirs = exported(home / method / way), exported(home / method / "alone")
            assert set(mine) == set(theirs)
            for name, tensor in theirs.items():
                torch.testing.assert_close(mine[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", slow_but("fine_tuning", ["fine_tuning", "ppo"]))
def test_two_processes_that_share_a_model(method: str, tmp_path: Path, pico_folder: Path) -> None:
    compare_worlds(tmp_path, pico_folder, 2, {"shard": SHARD, "split": SPLIT}, (method,))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_all_methods_replicated_and_shared_out(size: int, tmp_path: Path, pico_folder: Path) -> None:
    ways: dict[str, dict[str, Any]] = {"replicate": {"mode": "replicate"}, "shard": SHARD, "split": SPLIT}
    if size == 4:
        ways["two copies"] = {**SHARD, "shard_size": 2, "reshard_after_forward": False}
        ways["shared out and split"] = {**SHARD, **SPLIT}
    compare_worlds(tmp_path, pico_folder, size, ways, METHODS)


@pytest.mark.parametrize(
    "training",
    [
        pytest.param({"trainable": "lora", "lora": {"rank": 4}}, id="adapters", marks=pytest.mark.slow),
        pytest.param(
            {"trainable": "lora", "lora": {"rank": 4, "init_lora_weights": "pissa"}},
            id="adapters taken out of the base",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"freeze_layers": 1, "unfreeze_step": 2, "optimizer": "adamw", "learning_rate": 1e-4},
            id="layers that train later",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"gradient_checkpointing": True, "momentum": 0.9},
            id="activations computed twice",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_trains_and_how(training: dict[str, Any], tmp_path: Path, pico_folder: Path) -> None:
    compare_worlds(tmp_path, pico_folder, 2, {"shard": SHARD, "split": SPLIT}, ("fine_tuning", "ppo"), **training)


@pytest.mark.slow
def test_dora_is_sharded_but_not_split(tmp_path: Path, pico_folder: Path) -> None:
    training: dict[str, Any] = {"trainable": "lora", "lora": {"rank": 4, "use_dora": True}}
    compare_worlds(tmp_path, pico_folder, 2, {"shard": SHARD}, ("fine_tuning",), **training)
    config = small_run("fine_tuning", tmp_path / "split", pico_folder, shares_of(2, SPLIT), SPLIT, **training)
    with pytest.raises(AssertionError, match=r"use_dora: got true with distributed\.tensor_parallel"):
        run_world(2, [(config, False)])


def check_resumed(home: Path, weights: Path, sizes: Sequence[int], *, first: Mapping[str, Any], size: int) -> None:
    """A run of which `size` processes train the first 3 steps and `sizes` the rest is that of one process."""
    settings: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "max_grad_norm": 0.5}
    train_here(small_run("fine_tuning", home / "whole", weights, 1, {}, **settings))
    shares = shares_of(size, first)
    begun = small_run("fine_tuning", home / "first", weights, shares, first, max_steps=3, **settings)
    run_world(size, [(begun, False)])
    for other in sizes:
        run = home / f"then-{other}"
        shutil.copytree(home / "first", run)
        shutil.rmtree(run / "model")
        config = small_run("fine_tuning", run, weights, other, SHARD, **settings)
        if other == 1:
            train_here(config, resume=True)
        else:
            run_world(other, [(config, True)])
        assert_same_but_for_a_validation(run, home / "whole", step=3)


def assert_same_but_for_a_validation(run: Path, whole: Path, *, step: int) -> None:
    """The run that was cut at `step` validated there too."""
    mine = [each for each in measured(run) if each[:2] != ("validation", step)]
    theirs = measured(whole)
    assert [each[:2] for each in mine] == [each[:2] for each in theirs]
    for one, other in zip(mine, theirs, strict=True):
        figures = [{name: value for name, value in each[2].items() if name != "best"} for each in (one, other)]
        assert figures[0] == pytest.approx(figures[1], rel=2e-6, abs=2e-6), one[:2]


def test_slices_of_two_processes_are_resumed_by_one(tmp_path: Path, pico_folder: Path) -> None:
    check_resumed(tmp_path, pico_folder, [1], first=SHARD, size=2)
    folder = tmp_path / "first" / "checkpoints" / "step-00000003"
    weights = [load_file(folder / f"weights-0000{number}-of-00002.safetensors") for number in (1, 2)]
    whole = checkpoint.load(folder).tensors["weights"]
    assert set(whole) == set(weights[0]) == set(weights[1])
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([weights[0][name], weights[1][name]]))
        # Nobody wrote more than a half, rounded up to whole rows.
        assert len(weights[0][name]) == -(-len(tensor) // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "size", "sizes"),
    [(SHARD, 2, [4]), ({"mode": "replicate"}, 2, [4]), (SHARD, 4, [2]), ({**SHARD, **SPLIT}, 4, [1, 2])],
)
def test_checkpoints_pass_between_worlds_and_modes(
    first: dict[str, Any], size: int, sizes: list[int], tmp_path: Path, pico_folder: Path
) -> None:
    check_resumed(tmp_path, pico_folder, sizes, first=first, size=size)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_killed_while_a_checkpoint_is_written(mode: str, tmp_path: Path, pico_folder: Path) -> None:
    """The resumed run has the figures and weights of the uninterrupted one."""
    settings: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "save_every": 1, "num_epochs": 8}
    whole, cut = (
        small_run("fine_tuning", tmp_path / name, pico_folder, 2, {"mode": mode}, **settings)
        for name in ("whole", "cut")
    )
    run_world(2, [(whole, False)])
    checkpoints = tmp_path / "cut" / "checkpoints"
    for number, resume in enumerate((False, True, True)):
        processes = start_world(2, [(cut, resume)])
        limit = time.monotonic() + 120
        while not _is_writing(checkpoints, after=4 * number) and time.monotonic() < limit:
            assert all(process.poll() is None for process in processes)
        for process in processes:
            process.kill()
        for process in processes:
            with process:
                assert process.wait() == -signal.SIGKILL
    run_world(2, [(cut, True)])
    assert measured(tmp_path / "cut") == measured(tmp_path / "whole")
    mine, theirs = exported(tmp_path / "cut"), exported(tmp_path / "whole")
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def _is_writing(checkpoints: Path, *, after: int) -> bool:
    """Whether a checkpoint of a later step than `after` is on its way to the disk."""
    names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return any(".partial-" in name and int(name[6:14]) > after for name in names)


@pytest.mark.slow
def test_half_precision(tmp_path: Path, pico_folder: Path) -> None:
    """Shared out, a tied embedding's gradient is rounded once more: the runs are alike, not the same."""
    ways = {"replicate": {"mode": "replicate"}, "shard": SHARD}
    runs = {
        (method, way): small_run(method, tmp_path / method / way, pico_folder, 2, settings, precision="bf16")
        for method in ("fine_tuning", "chain_of_thought", "ppo")
        for way, settings in ways.items()
    }
    run_world(2, [(config, False) for config in runs.values()])
    for method in ("fine_tuning", "chain_of_thought"):
        mine, theirs = (
            [figures["loss"] for kind, _, figures in measured(tmp_path / method / way) if kind == "step"]
            for way in ways
        )
        assert mine == pytest.approx(theirs, rel=0.02)
    steps = [figures for kind, _, figures in measured(tmp_path / "ppo" / "shard") if kind == "step"]
    assert steps[0]["ratio"] == pytest.approx(1.0, abs=1e-6)


def test_an_impossible_shard_size_is_refused(tmp_path: Path, pico_folder: Path) -> None:
    config = small_run("fine_tuning", tmp_path / "run", pico_folder, 1, SHARD)
    [finding] = check_distributed(config.distributed, "muon")
    assert finding.fields == ("training.optimizer", "distributed.mode")
    [finding] = check_distributed(DistributedSection(mode="replicate", shard_size=2), "adamw")
    assert finding.fields == ("distributed.shard_size", "distributed.mode")
    with pytest.raises(UserError, match="shard_size: got 3 with 4 processes"):
        Sharding(DistributedSection(mode="shard", shard_size=3), World(0, 4), torch.device("cpu"))


def test_layers_that_cannot_be_split_are_refused() -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1, "vocab_size": 8}
    three, gpt2 = Mock(**{"size.return_value": 3}), GPT2Config(n_embd=24, n_head=6, n_layer=1, vocab_size=8)
    with pytest.raises(UserError, match="tensor_parallel: got 3 for a model of type gpt2, for which transformers"):
        split_layers(GPT2Model(gpt2), three)
    with pytest.raises(UserError, match="got 3 for a model of type llama with num_key_value_heads 2"):
        split_layers(LlamaModel(LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=24)), three)
    with pytest.raises(UserError, match="got 3 for a model of type llama, one of whose layers is 32 wide"):
        split_layers(LlamaModel(LlamaConfig(**sizes, num_key_value_heads=3, intermediate_size=32)), three)
    [finding] = check_distributed(DistributedSection(tensor_parallel=2), "muon")
    assert finding.fields == ("training.optimizer", "distributed.tensor_parallel")


def test_auto_shards_what_fills_more_than_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather", lambda self, value: [value])
    monkeypatch.setattr(sharding, "_memory", lambda device: 16 * 2**30)
    monkeypatch.setattr(Sharding, "_made_mesh", lambda self: None)
    world, cpu = World(0, 4), torch.device("cpu")
    for needed, optimizer, is_shared in ((8, "adamw", False), (9, "adamw", True), (9, "muon", False)):
        found, summary = sharding_for(world, cpu, needed=needed * 2**30, optimizer=optimizer)
        assert (found is not None) == is_shared
        assert f"{needed} GiB of weights" in summary
        assert "16 GiB of memory" in summary
    assert sharding_for(World(), cpu, needed=2**50, optimizer="adamw") == (None, "")
    found, _ = sharding_for(World(0, 4, settings=DistributedSection(shard_size=2)), cpu, needed=2**50, optimizer="sgd")
    assert found is not None
    assert (found.size, found.replicas, found.rank) == (2, 2, 0)


def test_the_rows_of_each_process_are_those_of_torch_chunk() -> None:
    for rows, size in ((7, 2), (4, 4), (5, 4), (1, 3), (400, 3)):
        parts = torch.arange(rows).chunk(size)
        for rank in range(size):
            share = object.__new__(Sharding)
            share.rank, share.size, share.replicas, share.part, share.parts = rank, size, 1, 0, 1
            found = share.rows_of((rows,)).of(torch.arange(rows))
            assert found.tolist() == (parts[rank].tolist() if rank < len(parts) else [])


@pytest.mark.parametrize("split", [None, 0, 1])
def test_the_parts_of_a_split_matrix_are_all_of_it(split: int | None) -> None:
    """Two copies, each on two groups of two processes that split layers."""
    whole = torch.arange(48).view(8, 6)
    held = torch.zeros_like(whole)
    for share in range(4):
        for part in range(2):
            process = object.__new__(Sharding)
            process.replicas, process.size, process.rank = 2, 2, share % 2
            process.part, process.parts = part, 2
            rows = process.rows_of(whole.shape, split)
            assert rows.copies == (4 if split is None else 2)
            assert rows.of(whole).numel() == (24 if split is None else 12)
            held[rows.first : rows.first + rows.count].narrow(1, *(rows.columns or (0, 6))).add_(1)
            # Of each group one writes what all of it have.
            assert process.writes(rows) == (part == 0 or split is not None)
    assert torch.equal(held, torch.full_like(whole, 4 if split is None else 2))
