"""Memory and traffic of a GPU, against figures reckoned by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loopos.config.diagnostics import UserError
from loopos.config.sections import TrainingSection
from loopos.planning.cluster.memory import (
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    Need,
    Transfer,
    iteration_transfers,
    need_of,
    persistent_of,
    step_transfers,
)
from loopos.planning.cluster.plan import plan_of, setting_of
from loopos.planning.cluster.setting import Cluster, RequestedSharding, Setting
from loopos.planning.cluster.work import Cache, Load, Network
from loopos.planning.estimate import Architecture, Parameters
from loopos.planning.shapes import Model, Units

# 1000 parameters: 8 layers of 100, 200 outside of them; tensor parallelism divides 640. d = 4, k = 2, m = 8, h = 4.
COUNTS = Parameters(total=1000, trained_matrices=900, trained_rest=100, matrix_sides=80, multiplied=800, largest=100)
SHAPE = Architecture(width=4, key_width=2, feed_forward=8, heads=4, layers=8)
MODEL = Model("Toy", COUNTS, SHAPE, 8, Units(layer=100, outside=200, split=640, split_trained=640))
NETWORK = Network("model", COUNTS, MODEL, "")
FROZEN = Network(
    "reference", Parameters(total=1000, trained_matrices=0, trained_rest=0, matrix_sides=0, multiplied=800, largest=0), MODEL, ""
)  # fmt: skip


def load(*networks: Network, precision: str = "bf16", accumulation: int = 1, **more: object) -> Load:
    training = TrainingSection(learning_rate=0.1, optimizer="adamw", precision=precision)  # type: ignore[arg-type]
    return Load("toy", training, list(networks) or [NETWORK], 4, 16, accumulation, **more)  # type: ignore[arg-type]


def setting(shard_size: int = 1, **changed: object) -> Setting:
    plain = {"tensor_parallel": 1, "cpu_offload": False, "reshard_after_forward": True, "checkpointing": False}
    return Setting(shard_size, **{**plain, **changed})  # type: ignore[arg-type]


def cluster(gpus: int = 8, memory: str = "80GiB", gpus_a_node: int = 4) -> Cluster:
    return Cluster.of(gpus=gpus, memory=memory, gpus_a_node=gpus_a_node, inside="100GB", between="80Gbit")


def sizes(transfers: list[Transfer]) -> dict[str, int]:
    return {each.collective: each.size for each in transfers}


def test_replicated_every_gpu_holds_all() -> None:
    assert persistent_of(NETWORK, load(), setting()) == {
        "weights": 2000, "master weights": 4000, "gradients": 4000, "optimizer": 8000
    }  # fmt: skip


def test_sharded_the_master_weights_are_the_weights() -> None:
    assert persistent_of(NETWORK, load(), setting(4)) == {
        "weights": 0, "master weights": 1000, "gradients": 1000, "optimizer": 2000
    }  # fmt: skip
    assert persistent_of(FROZEN, load(), setting(4)) == {
        "weights": 500,
        "master weights": 0,
        "gradients": 0,
        "optimizer": 0,
    }
    assert persistent_of(NETWORK, load(precision="fp32"), setting(4))["weights"] == 1000


def test_sharded_a_model_in_training_keeps_fp32_where_it_is_frozen_too() -> None:
    half_frozen = replace(NETWORK, parameters=replace(COUNTS, trained_matrices=400))
    assert persistent_of(half_frozen, load(), setting(4)) == {
        "weights": 500, "master weights": 500, "gradients": 500, "optimizer": 1000
    }  # fmt: skip


def test_tensor_parallelism_divides_what_the_plan_names() -> None:
    # 640 of 1000 over 4: 160 + 360 stay.
    assert persistent_of(NETWORK, load(), setting(tensor_parallel=4))["weights"] == 2 * 520
    assert persistent_of(NETWORK, load(), setting(tensor_parallel=4))["optimizer"] == 8 * 520


def test_a_layer_at_work_is_whole_and_the_next_one_beside_it() -> None:
    # f·(200 + 2·100), and 6 bytes a gradient of what lies outside and of one layer.
    assert need_of(load(), setting(8)).update["gathered"] == 2 * 400 + 6 * 300
    assert need_of(load(), setting(8, reshard_after_forward=False)).update["gathered"] == 2 * 1000 + 6 * 300
    # Replicated, it is the gradient of the largest tensor in both formats.
    assert need_of(load(), setting()).update["gathered"] == 6 * 100


def test_activations_by_rows_recomputation_and_tensor_parallelism() -> None:
    # A token and layer: 2·(8·4 + 2·2 + 4·8) + 8·4 = 168 bytes; 64 tokens, 8 layers.
    assert need_of(load(), setting()).update["activations"] == 8 * 64 * 168
    assert need_of(load(), setting(splits=4)).update["activations"] == 8 * 16 * 168
    assert need_of(load(), setting(checkpointing=True)).update["activations"] == 64 * 168 + 64 * 8 * 2 * 4
    # 6d and the norms' fp32 stay: 2·24 + 32; the other 44 features are divided.
    assert need_of(load(), setting(tensor_parallel=4)).update["activations"] == 8 * 64 * (2 * (24 + 11) + 32)


def test_offload_moves_to_the_host_what_is_held() -> None:
    kept, moved = need_of(load(), setting(8)), need_of(load(), setting(8, cpu_offload=True))
    assert (moved.persistent, moved.host) == ({}, sum(kept.persistent.values()))
    assert moved.peak == sum(kept.update.values())


def test_responses_are_written_beside_what_is_held_but_not_beside_an_update() -> None:
    cached = load(NETWORK, FROZEN, cache=Cache(rows=8, columns=32))
    need = need_of(cached, setting(8))
    # 2·L·k·f a token, and both roles whole.
    assert need.rollout == {"cache": 8 * 32 * 2 * 8 * 2 * 2, "gathered": 4000}
    assert need.peak == sum(need.persistent.values()) + max(sum(need.update.values()), 4000 + 16384)
    assert need_of(cached, setting()).rollout["gathered"] == 0
    assert need.roles == {"model": (4000 + 4000 + 8000) // 8, "reference": 2000 // 8}


def test_the_peak_is_held_and_the_larger_phase() -> None:
    assert Need({"weights": 5}, {"activations": 3}, {"cache": 7}, 0, {}).peak == 12


def test_replicated_gradients_are_summed_once_a_step() -> None:
    (found,) = step_transfers(load(accumulation=3), setting(splits=2), cluster())
    assert found == Transfer(ALL_REDUCE, "gradients of the model", 4000, group=8, stride=1)
    # Twice 7/8 of 4000 bytes.
    assert found.sent == 7000


def test_sharded_weights_are_gathered_twice_a_pass_but_for_what_lies_outside() -> None:
    found = step_transfers(load(accumulation=3), setting(8, splits=2), cluster())
    assert sizes(found) == {ALL_GATHER: 6 * 2 * (1000 + 800), REDUCE_SCATTER: 6 * 4000}
    once = step_transfers(load(), setting(8, reshard_after_forward=False), cluster())
    assert sizes(once)[ALL_GATHER] == 2 * 1000


def test_groups_that_share_weights_sum_their_parts() -> None:
    found = {each.collective: each for each in step_transfers(load(), setting(4), cluster(gpus=16))}
    assert (found[ALL_GATHER].group, found[ALL_GATHER].stride) == (4, 1)
    assert (found[ALL_REDUCE].size, found[ALL_REDUCE].group, found[ALL_REDUCE].stride) == (1000, 4, 4)


def test_tensor_parallelism_sums_hidden_states_of_every_layer() -> None:
    found = step_transfers(load(), setting(tensor_parallel=4), cluster())
    activations = found[-1]
    # Behind attention and feed-forward, forward and backward, 8 layers, 64 tokens of 4 features of 2 bytes.
    assert (activations.size, activations.group, activations.stride) == (2 * 2 * 8 * 64 * 4 * 2, 4, 1)
    # The 520 parameters that a GPU has are summed with the one other copy, which is 4 GPUs away.
    assert (found[0].size, found[0].group, found[0].stride) == (4 * 520, 2, 4)
    again = step_transfers(load(), setting(tensor_parallel=4, checkpointing=True), cluster())
    assert again[-1].size == activations.size * 3 // 2


def test_an_iteration_gathers_every_role_once() -> None:
    ppo = load(NETWORK, FROZEN, cache=Cache(8, 32), writes_responses=True)
    assert [each.size for each in iteration_transfers(ppo, setting(8), cluster())] == [2000, 2000]
    assert iteration_transfers(ppo, setting(), cluster()) == []


def test_rings_share_the_network_cards_of_a_node() -> None:
    machines = cluster(gpus=16)
    assert machines.ring_seconds(1e9, size=1, stride=1) == 0
    assert machines.ring_seconds(1e9, size=4, stride=1) == pytest.approx(0.01)
    # 80 Gbit/s are 10 GB/s: one ring over all GPUs leaves a node once,
    assert machines.ring_seconds(1e9, size=16, stride=1) == pytest.approx(0.1)
    # four rings, each with a GPU on every node, leave it four times.
    assert machines.ring_seconds(1e9, size=4, stride=4) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("actual", "expected"), [("80GiB", 80 * 2**30), ("24 GB", 24e9), ("512MiB", 2**29), ("1.5tb", 1.5e12)]
)
def test_amounts_of_memory(actual: str, expected: float) -> None:
    assert cluster(memory=actual).memory == expected


@pytest.mark.parametrize("actual", ["80", "GiB", "80Gbit", "-1GB", "0GB", "80 gallons"])
def test_amounts_that_are_none(actual: str) -> None:
    with pytest.raises(UserError, match=r"--memory: got .*; give a unit, for example 80GiB"):
        cluster(memory=actual)


def test_half_nodes_are_refused() -> None:
    with pytest.raises(UserError, match="not whole nodes of 4"):
        cluster(gpus=6)
    assert cluster(gpus=3).gpus_a_node == 3


AUTO = RequestedSharding("auto", None, 1, False, True)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (RequestedSharding("shard", 3, 1, False, True), "shard_size 3: 8 copies"),
        (RequestedSharding("replicate", 4, 1, False, True), "expected mode shard"),
        (RequestedSharding("replicate", None, 1, True, True), "cpu_offload"),
        (RequestedSharding("auto", None, 3, False, True), "tensor_parallel 3"),
        (RequestedSharding("auto", None, 8, False, True), "tensor_parallel 8"),
    ],
)
def test_layouts_that_cannot_be(asked: RequestedSharding, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        plan_of(load(), asked, cluster())


def test_auto_shards_weights_that_fill_more_than_half_of_a_gpu() -> None:
    # 4 bytes of each parameter and 12 of each that trains: 16,000; the reference has no part in it.
    both = load(NETWORK, FROZEN)
    assert setting_of(both, AUTO, cluster(memory="32kB")).mode == "replicate"
    assert setting_of(both, AUTO, cluster(memory="31kB")).mode == "shard"


def test_optimizers_that_need_whole_matrices_are_not_sharded() -> None:
    toy = load()
    muon = replace(toy, training=toy.training.model_copy(update={"optimizer": "muon"}))
    assert setting_of(muon, AUTO, cluster(memory="1kB")).mode == "replicate"
    assert plan_of(muon, AUTO, cluster(memory="8kB")).smallest is None
    with pytest.raises(UserError, match="muon with mode shard"):
        plan_of(muon, RequestedSharding("shard", None, 1, False, True), cluster())


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        # 104,616 bytes replicated.
        ("120kB", []),
        # Half the rows: 61,608.
        ("70kB", ["training.batch_size=2", "training.gradient_accumulation=2"]),
        # One row: 40,104; with activations computed twice 18,000 + 600 + 2,688 + 1,024 = 22,312.
        (
            "30kB",
            ["training.batch_size=2", "training.gradient_accumulation=2", "training.gradient_checkpointing=true"],
        ),
        # 22,312 at one row; shared by the 4 GPUs of a node 4,000 + 2,600 + 3,712 at one row.
        (
            "12kB",
            [
                "training.batch_size=1",
                "training.gradient_accumulation=4",
                "training.gradient_checkpointing=true",
                "distributed.mode=shard",
                "distributed.shard_size=4",
            ],
        ),
    ],
)
def test_the_smallest_setting_that_fits_costs_no_more_than_it_must(memory: str, words: list[str]) -> None:
    plan = plan_of(load(), RequestedSharding("replicate", None, 1, False, True), cluster(memory=memory))
    assert plan.fits == (words == [])
    assert plan.overrides == words


def test_where_nothing_fits_it_suggests_a_number_of_gpus() -> None:
    # At one row 2,688 + 1,024 + 2,600 stay on each GPU however many there are, and 16,000 over them in host or GPU.
    plan = plan_of(load(), RequestedSharding("auto", None, 1, False, True), cluster(memory="6kB"))
    assert (plan.fits, plan.smallest, plan.gpus) == (False, None, None)
